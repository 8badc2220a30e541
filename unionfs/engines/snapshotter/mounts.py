"""How snapshots are mounted: what their users are to mount, and the unions that we mount for them.

Three ways, the cheapest that is right:

*  A tree of one directory is that directory, bind-mounted: an active snapshot without parents, a view of one layer.
*  A snapshot that containerd unpacks a layer into is said to be an overlay mount. containerd's applier mounts nothing
   when it finds exactly one mount of that type: it writes into the upper directory, whiteouts as the kernel's overlayfs
   makes them, and looks for attributes of parent directories in the lower ones (core/diff/apply, ``apply_linux.go``). A
   client that does mount it gets the kernel's overlayfs over the same directories.
*  Anything else is a union that we mount ourselves, and its users bind-mount. containerd could be told to run our mount
   program (type ``fuse3.unionfs``), but its shim, which reaps children that it did not start, makes that fail at times.

A union is served by a process of its own. It is mounted when somebody first asks for it and stays until its snapshot
is committed or removed. Neither the snapshotter nor containerd is needed to keep it: containers run on while both are
restarted. What the kernel's mount table says counts, nothing is remembered here.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from unionfs.drivers.layered import Stack
from unionfs.drivers.union import FuseMounter
from unionfs.engines.snapshotter.contract import Kind, Mount
from unionfs.engines.snapshotter.directories import SnapshotDirectories
from unionfs.engines.snapshotter.store import Chain
from unionfs.errors import MountError, SnapshotArgumentError, SnapshotterError
from unionfs.fuse_ops.copy_up.unsynced import was_noted
from unionfs.fuse_ops.stack.workdir import Claim
from unionfs.host import mounts, unmount
from unionfs.host.mounts import is_dead

_log = logging.getLogger(__name__)

# Source: containerd, core/snapshots/snapshotter.go.
UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"

REF_LABEL = "containerd.io/snapshot.ref"
"""The chain id of the layer that a snapshot is going to be, or is."""

SIZE_LABEL = "containerd.io/snapshot/max-size"
"""Bytes that an active snapshot itself may take."""

_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", re.ASCII)


class _Range(NamedTuple):
    container: int
    host: int
    length: int


class MountRequirements(NamedTuple):
    """What a mount is to do beyond showing the tree: shift ids, limit the size.

    A client that relies on the snapshotter for shifted ids (``ctr run --remap-labels``, the capability ``remap-ids``)
    sets labels with lists ``container:host:length[,...]``, rather than copy the whole tree to change its owners. Ids on
    disk are the container's; the mount shows the host's for them.
    """

    uids: tuple[_Range, ...] = ()
    gids: tuple[_Range, ...] = ()
    max_size_bytes: int = 0

    @classmethod
    def of_labels(cls, labels: Mapping[str, str], *, writable: bool) -> MountRequirements:
        """What the labels of a snapshot ask for.

        Raises:
            SnapshotArgumentError: a label cannot be understood.
        """
        size = _size(labels)
        return cls(_ranges(UID_LABEL, labels), _ranges(GID_LABEL, labels), size if writable else 0)

    def mount_options(self) -> tuple[str, ...]:
        """The options of our mount program; none when any mount will do."""
        options = [
            f"{option}=" + ":".join(f"{one.container}:{one.host}:{one.length}" for one in ranges)
            for option, ranges in (("uidmapping", self.uids), ("gidmapping", self.gids))
            if ranges
        ]
        return (*options, f"quota={self.max_size_bytes}") if self.max_size_bytes else tuple(options)


def _size(labels: Mapping[str, str]) -> int:
    text = labels.get(SIZE_LABEL, "0")
    if not _NUMBER.fullmatch(text):
        raise SnapshotArgumentError(f"label {SIZE_LABEL}={text!r} is no size; write a number of bytes")
    return int(text)


def _ranges(label: str, labels: Mapping[str, str]) -> tuple[_Range, ...]:
    text = labels.get(label, "")
    if not text:
        return ()
    found = [_RANGE.fullmatch(part) for part in text.split(",")]
    ranges = tuple(_Range(*map(int, match.groups())) for match in found if match is not None)
    if len(ranges) != len(found) or any(one.length == 0 for one in ranges):
        raise SnapshotArgumentError(f"label {label}={text!r} is no id mapping; write container:host:length[,...]")
    return ranges


# containerd's snapshots.UnpackKeyFormat, behind the namespace and number that its metadata store puts before a key.
_UNPACK_KEY = re.compile(r"(?:.*/)?extract-[^/ ]+ ([a-z0-9]+:[0-9a-f]+)", re.DOTALL)


def unpacked_layer(key: str) -> str | None:
    """The chain id of the layer that containerd unpacks into the snapshot ``key``; None when it does not do that."""
    match = _UNPACK_KEY.fullmatch(key)
    return None if match is None else match[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a snapshot is mounted.

    Attributes:
        mounts: what its users mount.
        union: what we mount before; None for nothing.
        options: of that mount.
    """

    mounts: tuple[Mount, ...]
    union: Stack | None = None
    options: tuple[str, ...] = ()


def plan_mounts(
    directories: SnapshotDirectories,
    number: int,
    kind: Kind,
    key: str,
    chain: Chain,
    requirements: MountRequirements,
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
        requirements: what its labels ask for.
        overlay_unpack: whether layers may be unpacked without a mount.
    """
    paths = directories.paths(number)
    parents = tuple(directories.paths(parent).fs for parent in chain.numbers)
    options = requirements.mount_options()
    if kind is Kind.VIEW:
        if len(parents) < 2 and not options:
            return Plan((_bind(parents[0] if parents else paths.fs, "ro"),))
        stack = Stack(home=directories.root, target=paths.union, lowers=parents or (directories.empty,))
        return Plan((_bind(paths.union, "ro"),), stack, options)
    if not options:
        if not parents:
            return Plan((_bind(paths.fs, "rw"),))
        if overlay_unpack and unpacked_layer(key) and _is_plain(chain, parents[0]):
            named = ("index=off", f"workdir={paths.work}", f"upperdir={paths.fs}", "lowerdir=" + ":".join(parents))
            return Plan((Mount(type="overlay", source="overlay", options=named),))
    return Plan((_bind(paths.union, "rw"),), writable_union(directories, number, chain), options)


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


class SnapshotUnions:
    """Mounts and unmounts unions.

    Args:
        options: of every mount (docs/unionfs-mount.md).
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        # What a container may find in its root, devices and setuid programs, only root can grant.
        self._options = (*(("dev", "suid") if os.geteuid() == 0 else ()), *options)

    def ensure(self, stack: Stack, options: Sequence[str]) -> None:
        """See that ``stack`` is mounted; one whose server has died is mounted anew.

        Who still uses the dead one gets errors until it ends; a container that is started again works.

        Raises:
            SnapshotterError: it cannot be mounted.
        """
        if self._is_served(stack.target):
            return
        self.detach(stack.target)
        # The mount point is lost when a snapshot was restored from a backup.
        os.makedirs(stack.target, 0o700, exist_ok=True)
        try:
            FuseMounter((*self._options, *options)).mount(stack)
        except MountError as error:
            raise SnapshotterError(str(error)) from error

    def end(self, stack: Stack, options: Sequence[str]) -> None:
        """Unmount ``stack`` for good: afterwards its upper directory has all that was written, as a layer has it.

        Raises:
            SnapshotterError: a crash has left files without their data, and they cannot be copied again.
            OSError: the disk fails.
        """
        assert stack.upper is not None
        assert stack.work is not None
        self._settle(stack.target)
        self.detach(stack.target)
        if _is_alone(stack.upper, stack.work):
            if not _has_unsynced(stack.work):
                return
            # Its server was killed, or the machine crashed. A mount copies the data of marked files again.
            self.ensure(stack, options)
            self.detach(stack.target)
            if not _is_alone(stack.upper, stack.work) or not _has_unsynced(stack.work):
                return
            raise SnapshotterError(
                f"{stack.upper}: a crash has left files whose data cannot be copied again; "
                "see the log for the reason, or remove the snapshot and make it again"
            )
        # It is mounted elsewhere too, so its server goes on. That is rare, and needs much of the file system's code.
        from unionfs.fuse_ops.speedups.late_sync import sync_marked

        sync_marked(stack.upper)

    def detach(self, target: str) -> None:
        """Unmount everything at ``target``; its server ends with the last user, who may be a container.

        The mount point goes with it, and so do copies of the mount in other namespaces.
        """
        while mounts.top_mount(target) is not None:
            unmount.take_down(target, lazy=True)

    @staticmethod
    def _settle(target: str) -> None:
        """Have everything written to the mount arrive in its upper directory. Fine when nothing is mounted."""
        if mounts.top_mount(target) is None:
            return
        try:
            FuseMounter().settle(target)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            # Its server was killed. What it had been told is in the upper directory, and the rest is lost already.
            _log.warning("%s: its server is gone; what programs had not written yet is lost", target)

    @staticmethod
    def _is_served(target: str) -> bool:
        mount = mounts.top_mount(target)
        return mount is not None and mount.is_union and not is_dead(target)


def _is_alone(upper: str, work: str) -> bool:
    """Whether no server uses the directories, after waiting for one that is about to end."""
    with _directory(work) as work_fd, _directory(upper) as upper_fd:
        return Claim(work_fd, upper_fd).acquire()


def _has_unsynced(work: str) -> bool:
    """Whether there may be files in the upper directory whose data is not on the disk, or not there."""
    with _directory(work) as fd:
        return was_noted(fd)


@contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
