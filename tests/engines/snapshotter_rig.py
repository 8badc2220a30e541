"""Snapshotters for tests, and what containerd does with what they say: mount it, apply changes, unmount."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.engines.snapshotter_client import SnapshotterClient
from tests.support.mounts import servers_of, take_down
from tests.support.snapshot import Snapshot, assert_same, snapshot
from tests.support.syscalls import MS_RDONLY, MS_REC, mount
from unionfs.engines.snapshotter import Mount, Snapshotter, UnionSnapshotter
from unionfs.engines.snapshotter.service import SocketServer, make_handler
from unionfs.host.mounts import read_mounts

Change = Callable[[str], None]
"""Changes the tree below the directory that it is given."""

MS_REMOUNT, MS_BIND = 32, 4096  # linux/mount.h
ROOTED = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}


@contextmanager
def snapshotter_at(
    root: Path, over: str, *, overlay_unpack: bool = True, share_layers: bool = False
) -> Iterator[Snapshotter]:
    """A snapshotter with everything below ``root``, reached as ``over`` says: ``object``, or by ``socket``.

    At the end nothing may be mounted below ``root`` once all snapshots are removed.
    """
    store = UnionSnapshotter(str(root / "root"), overlay_unpack=overlay_unpack, share_layers=share_layers)
    try:
        if over == "object":
            yield store
        else:
            server = SocketServer(str(root / "socket"), make_handler(store))
            server.start()
            client = SnapshotterClient(server.path)
            try:
                yield client
            finally:
                client.close()
                server.stop(5.0)
        remove_all(store)
    finally:
        store.close()
        for point in mounts_below(root):
            take_down(point, servers_of(point))
    left = os.listdir(root / "root/snapshots")
    assert left == [], f"directories are left: {left}"


def remove_all(store: Snapshotter) -> None:
    """Remove every snapshot, children first, and what is left of them. Nothing to do when it was closed."""
    try:
        left = {info.name: info.parent for info in store.walk()}
    except Exception:  # closed by the test
        return
    while left:
        for name in set(left) - set(left.values()):
            store.remove(name)
            del left[name]
    store.cleanup()


def mounts_below(root: Path) -> list[str]:
    """What is mounted below a directory, the latest first."""
    points = [one.mount_point for one in read_mounts() if one.mount_point.startswith(f"{root}/")]
    return points[::-1]


@contextmanager
def mounted(mounts: tuple[Mount, ...], target: Path) -> Iterator[str]:
    """What a snapshotter says, mounted at ``target`` as containerd mounts it, until the end of the block."""
    target.mkdir(parents=True, exist_ok=True)
    (one,) = mounts
    where = str(target)
    if one.type == "bind":
        assert one.options[0] == "rbind"
        mount(one.source, where, "", MS_BIND | MS_REC)
        if "ro" in one.options:
            mount("none", where, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    else:
        # containerd makes long options short in the same way: relative to the directory that all have in common.
        (upper,) = (word.partition("=")[2] for word in one.options if word.startswith("upperdir="))
        common = os.path.dirname(os.path.dirname(upper))
        options = ",".join(one.options).replace(f"{common}/", "")
        subprocess.run(["mount", "-t", one.type, "-o", options, one.source, where], cwd=common, check=True)
    try:
        yield where
    finally:
        faults = take_down(where)
        assert not faults, faults


def tree(root: str | Path) -> Snapshot:
    """A tree for comparison: no times, since it is made twice, and no link counts, which overlays show differently."""
    found = snapshot(os.fspath(root), check_ino=False, xattrs=False, mtime=lambda _: 0)
    return {path: replace(entry, nlink=0) for path, entry in found.items()}


def assert_trees_agree(ours: str | Path, theirs: str | Path) -> None:
    """Fail with what differs."""
    assert_same(tree(ours), tree(theirs), ("snapshot", "flat"))


def check_snapshots(sn: Snapshotter, work: Path, *layers: Change) -> str:
    """Make a snapshot of each change over the one before, and compare each with a directory that gets all of them.

    Returns the name of the topmost. It may be called again with the same ``work``.
    """
    run = f"{work.name}-{len(sn.walk())}"
    flat = work / f"{run}-flat"
    flat.mkdir(mode=0o755)
    parent = ""
    for number, change in enumerate(layers):
        key = f"{run}/layer {number}"
        with mounted(sn.prepare(key, parent, ROOTED), work / "mnt") as here:
            assert_trees_agree(here, flat)
            change(here)
            change(str(flat))
            assert_trees_agree(here, flat)
        parent = f"{run}/committed {number}"
        sn.commit(parent, key, ROOTED)
        with mounted(sn.view(f"{run}/view {number}", parent, ROOTED), work / "mnt") as here:
            assert_trees_agree(here, flat)
    shutil.rmtree(flat)
    return parent


# The changes that the suite is written in.


def file(path: str, text: str, mode: int = 0o644) -> Change:
    """Write a file, as it is or new."""

    def change(root: str) -> None:
        with open(os.path.join(root, path), "w") as out:
            out.write(text)
        os.chmod(os.path.join(root, path), mode)

    return change


def directory(path: str, mode: int = 0o755) -> Change:
    """Make a directory."""

    def change(root: str) -> None:
        os.mkdir(os.path.join(root, path))
        os.chmod(os.path.join(root, path), mode)

    return change


def gone(path: str) -> Change:
    """Remove a file, or a directory with all that is in it."""

    def change(root: str) -> None:
        where = os.path.join(root, path)
        if os.path.isdir(where) and not os.path.islink(where):
            shutil.rmtree(where)
        else:
            os.unlink(where)

    return change


def owner(path: str, uid: int, gid: int) -> Change:
    """Give something away."""
    return lambda root: os.chown(os.path.join(root, path), uid, gid)


def renamed(path: str, to: str) -> Change:
    """Rename something."""
    return lambda root: os.rename(os.path.join(root, path), os.path.join(root, to))


def linked(path: str, to: str) -> Change:
    """Make a further name for a file."""
    return lambda root: os.link(os.path.join(root, path), os.path.join(root, to))


def all_of(*changes: Change) -> Change:
    """One change after the other."""

    def change(root: str) -> None:
        for one in changes:
            one(root)

    return change
