"""The union mounts of snapshots, each served by a process of its own.

A mount is made when somebody first asks for it and stays until its snapshot is committed or removed. Neither the
snapshotter nor containerd is needed to keep it: containers run on while both are restarted. What the kernel's mount
table says counts, nothing is remembered here.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence

from unionfs.drivers.fuse_server import FuseMounter
from unionfs.drivers.layered import Stack
from unionfs.errors import MountError, SnapshotterError
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

    def settle(self, target: str) -> None:
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

    def detach(self, target: str) -> None:
        """Unmount everything at ``target``; its server ends with the last user, who may be a container.

        The mount point goes with it, and so do copies of the mount in other namespaces.
        """
        while mountinfo.top_mount(target) is not None:
            unmount.take_down(target, lazy=True)

    @staticmethod
    def _is_served(target: str) -> bool:
        mount = mountinfo.top_mount(target)
        return mount is not None and mount.is_union and not is_dead(target)
