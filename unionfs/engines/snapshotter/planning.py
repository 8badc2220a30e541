"""What a snapshot's users are to mount, and what we have to mount for them first.

Three ways, the cheapest that is right:

*  A tree of one directory is that directory, bind-mounted: an active snapshot without parents, a view of one layer.
*  A snapshot that containerd unpacks a layer into is said to be an overlay mount. containerd's applier mounts nothing
   when it finds exactly one mount of that type: it writes into the upper directory, whiteouts as the kernel's overlayfs
   makes them, and looks for attributes of parent directories in the lower ones (core/diff/apply, ``apply_linux.go``). A
   client that does mount it gets the kernel's overlayfs over the same directories.
*  Anything else is a union that we mount ourselves, and its users bind-mount. containerd could be told to run our mount
   program (type ``fuse3.unionfs``), but its shim, which reaps children that it did not start, makes that fail at times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from unionfs.drivers.layered import Stack
from unionfs.engines.snapshotter.contract import Kind, Mount
from unionfs.engines.snapshotter.directories import SnapshotDirectories
from unionfs.engines.snapshotter.store import Chain
from unionfs.engines.snapshotter.wishes import Wishes

# containerd's snapshots.UnpackKeyFormat, behind the namespace and number that its metadata store puts before a key.
_UNPACK_KEY = re.compile(r"(?:.*/)?extract-[^/ ]+ [a-z0-9]+:[0-9a-f]+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a snapshot is mounted.

    Attributes:
        mounts: what its users mount.
        union: what we mount before; None for nothing.
        words: options of that mount.
    """

    mounts: tuple[Mount, ...]
    union: Stack | None = None
    words: tuple[str, ...] = ()


def plan_mounts(
    directories: SnapshotDirectories,
    number: int,
    kind: Kind,
    key: str,
    chain: Chain,
    wishes: Wishes,
    *,
    overlay_unpack: bool,
) -> Plan:
    """The plan for an active snapshot or a view.

    Args:
        directories: where the files are.
        number: of the snapshot.
        kind: what it is.
        key: its name, which tells what containerd is going to do with it.
        chain: what it stands on.
        wishes: what its labels ask for.
        overlay_unpack: whether layers may be unpacked without a mount.
    """
    paths = directories.paths(number)
    parents = tuple(directories.paths(parent).fs for parent in chain.numbers)
    words = wishes.mount_words()
    if kind is Kind.VIEW:
        if len(parents) < 2 and not words:
            return Plan((_bind(parents[0] if parents else paths.fs, "ro"),))
        stack = Stack(home=directories.root, target=paths.union, lowers=parents or (directories.empty,))
        return Plan((_bind(paths.union, "ro"),), stack, words)
    if not words:
        if not parents:
            return Plan((_bind(paths.fs, "rw"),))
        if overlay_unpack and _UNPACK_KEY.fullmatch(key) and _is_plain(chain, parents[0]):
            options = ("index=off", f"workdir={paths.work}", f"upperdir={paths.fs}", "lowerdir=" + ":".join(parents))
            return Plan((Mount(type="overlay", source="overlay", options=options),))
    return Plan((_bind(paths.union, "rw"),), writable_union(directories, number, chain), words)


def writable_union(directories: SnapshotDirectories, number: int, chain: Chain) -> Stack:
    """The union of an active snapshot, whether its plan has one or not."""
    paths = directories.paths(number)
    return Stack(
        home=directories.root,
        target=paths.union,
        lowers=tuple(directories.paths(parent).fs for parent in chain.numbers) or (directories.empty,),
        upper=paths.fs,
        work=paths.work,
    )


def _bind(source: str, mode: str) -> Mount:
    return Mount(type="bind", source=source, options=("rbind", mode))


def _is_plain(chain: Chain, path: str) -> bool:
    """Whether the applier finds every directory of the parents where it looks: it knows nothing of redirects."""
    return not chain.redirected and not any(mark in path for mark in ":,\\")
