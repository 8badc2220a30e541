"""The union mounts of snapshots, each served by a process of its own.

A mount is made when somebody first asks for it and stays until its snapshot is committed or removed. Neither the
snapshotter nor containerd is needed to keep it: containers run on while both are restarted. What the kernel's mount
table says counts, nothing is remembered here.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from unionfs.drivers.fuse_server import FuseMounter
from unionfs.drivers.layered import Stack
from unionfs.errors import MountError, SnapshotterError
from unionfs.fuse_ops.copy_up.unsynced import was_noted
from unionfs.fuse_ops.stack.workdir import Claim
from unionfs.host import mountinfo, unmount
from unionfs.host.mounts import is_dead

_log = logging.getLogger(__name__)


class SnapshotUnions:
    """Mounts and unmounts.

    Args:
        options: words for ``-o`` of every mount.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        # What a container may find in its root, devices and setuid programs, only root can grant.
        self._options = (*(("dev", "suid") if os.geteuid() == 0 else ()), *options)

    def ensure(self, stack: Stack, words: Sequence[str]) -> None:
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
            FuseMounter((*self._options, *words)).mount(stack)
        except MountError as error:
            raise SnapshotterError(str(error)) from error

    def end(self, stack: Stack, words: Sequence[str]) -> None:
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
            self.ensure(stack, words)
            self.detach(stack.target)
            if not _is_alone(stack.upper, stack.work) or not _has_unsynced(stack.work):
                return
            raise SnapshotterError(
                f"{stack.upper}: a crash has left files whose data cannot be copied again; "
                "see the log for the reason, or remove the snapshot and make it again"
            )
        # It is mounted elsewhere too, so its server goes on. That is rare, and needs much of the file system's code.
        from unionfs.fuse_ops.speedups.late_sync.recovery import settle_marked

        settle_marked(stack.upper)

    def detach(self, target: str) -> None:
        """Unmount everything at ``target``; its server ends with the last user, who may be a container.

        The mount point goes with it, and so do copies of the mount in other namespaces.
        """
        while mountinfo.top_mount(target) is not None:
            unmount.take_down(target, lazy=True)

    @staticmethod
    def _settle(target: str) -> None:
        """Have everything written to the mount arrive in its upper directory. Fine when nothing is mounted."""
        if mountinfo.top_mount(target) is None:
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
        mount = mountinfo.top_mount(target)
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
