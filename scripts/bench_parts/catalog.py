"""All workloads, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench_parts import change_workloads as change
from bench_parts import data_workloads as data
from bench_parts import driver_calls, registering
from bench_parts import tree_workloads as tree
from bench_parts.errors import BenchError
from bench_parts.mount_workloads import Idle, Memory, MountTime
from bench_parts.peers import Peer
from bench_parts.rootless import Rootless
from bench_parts.samples import Row
from bench_parts.scale import Scale
from bench_parts.supervised import SupervisedMemory, SupervisedMountTime
from bench_parts.workload import Timed, Workload

# Those in which a server without privileges works otherwise: it has no passthrough, and may not leave its place.
_ROOTLESS: Final = frozenset(
    [
        "find-cold",
        "open-cold",
        "open-warm",
        "python-warm",
        "untar",
        "rm",
        "chown",
        "create-unlink",
        "git",
        "read-large",
        "copy-up",
        "random-write",
        "write-large",
        "fdatasync",
        "sqlite",
    ]
)


def all_workloads(scale: Scale) -> list[Workload[Peer]]:
    """The workloads in mounts of a run of this scale."""
    workloads = _privileged(scale)
    rootless = [Rootless(w) for w in workloads if isinstance(w, Timed) and w.name in _ROOTLESS]
    return [*workloads, *rootless]


def _privileged(scale: Scale) -> list[Workload[Peer]]:
    deep = f"{scale.deep_layers} layers"
    return [
        MountTime(),
        SupervisedMountTime(),
        Timed("find-cold", "find with stat, cold", "debian", tree.find_cold, cold=True),
        Timed("find-warm", "find with stat, warm", "debian", tree.find_warm),
        Timed("find-parallel", "four parallel finds, cold", "debian", tree.find_parallel, cold=True),
        Timed("stat-cold", "random stat, cold", "debian", tree.stat_cold, cold=True),
        Timed("stat-warm", "random stat, warm", "debian", tree.stat_warm),
        Timed("missing-cold", "missing names, cold", "debian", tree.missing_cold, cold=True),
        Timed("missing-warm", "missing names, again", "debian", tree.missing_warm),
        Timed("open-cold", "open+read+close small files, cold", "debian", tree.open_cold, cold=True),
        Timed("open-warm", "open+read+close small files, warm", "debian", tree.open_warm),
        Timed("tar", "tar of the tree, cold", "debian", tree.tar, cold=True),
        Timed("python-cold", "python with many imports, cold", "debian", tree.python_cold, cold=True),
        Timed("python-warm", "python with many imports, warm", "debian", tree.python_warm),
        Timed("untar", "untar of many files", "files", change.untar),
        Timed("rm", "rm -rf of lower files", "files", change.remove),
        Timed("chown", "chown -R of lower files", "files", change.change_owner),
        Timed("chown-metacopy", "the same, ours with metacopy", "files", change.change_owner, options=("metacopy=on",)),
        Timed("create-unlink", "create, unlink", "files", change.create_unlink),
        Timed("git", "git add, commit, status", "files", change.git),
        Timed("read-large", "sequential read, cold", "files", data.read_large, cold=True),
        Timed("copy-up", "copy-up of a large file, cold", "files", data.copy_up_large, cold=True),
        Timed("random-read", "random read, 4 KiB", "files", data.random_read),
        Timed("random-write", "random write, 4 KiB", "files", data.random_write),
        Timed("write-large", "sequential write", "files", data.write_large),
        Timed("fdatasync", "write 4 KiB, fdatasync", "files", data.fdatasync),
        Timed("sqlite", "SQLite commits", "files", data.sqlite_commits),
        Timed("deep-find", f"find with stat, cold, {deep}", "deep", tree.find_cold, cold=True),
        Timed("deep-stat", f"random stat, cold, {deep}", "deep", tree.stat_cold, cold=True),
        Timed("deep-missing", f"missing names, cold, {deep}", "deep", tree.missing_cold, cold=True),
        Timed("deep-open", f"open+read+close, cold, {deep}", "deep", tree.open_cold, cold=True),
        Memory(scale.memory_mounts),
        SupervisedMemory(scale.memory_mounts),
        Idle(),
    ]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is measured: workloads in mounts, whether images are taken in, and whether drivers are called."""

    mounts: list[Workload[Peer]]
    images: bool
    drivers: bool


def all_rows(scale: Scale) -> list[Row]:
    """The lines of all tables."""
    return [row for workload in all_workloads(scale) for row in workload.rows] + [*registering.ROWS, *driver_calls.ROWS]


def chosen_workloads(scale: Scale, only: Sequence[str]) -> Chosen:
    """Those that have a row named in ``only``, or a whole group; all when it is empty."""
    everything = all_workloads(scale)
    if not only:
        return Chosen(everything, images=True, drivers=True)
    names = {name for row in all_rows(scale) for name in (row.name, row.group.value)}
    for name in only:
        if name not in names:
            raise BenchError(f"there is no workload {name}; choose from {', '.join(sorted(names))}")

    def has_one(rows: Sequence[Row]) -> bool:
        return any(row.name in only or row.group.value in only for row in rows)

    mounts = [workload for workload in everything if has_one(workload.rows)]
    images, drivers = has_one(registering.ROWS), has_one(driver_calls.ROWS)
    return Chosen(mounts, images, drivers)
