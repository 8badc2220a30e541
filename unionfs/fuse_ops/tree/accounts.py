"""Who is asked for room before a change of the upper directory, and told after it: nobody, unless there is a limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.need import Need

if TYPE_CHECKING:
    from unionfs.fuse_ops.copy_up.copy_up_job import CopyUpJob
    from unionfs.fuse_ops.quota.space_limit import SpaceLimit


class Accounts:
    """What the parts of a tree call around their changes. Without a limit, as here, all of it does nothing.

    What may take room raises OSError (ENOSPC) before anything is changed.
    """

    space: SpaceLimit | None = None
    """What limits the upper directory, for requests that only have a descriptor."""

    def require(self, size_bytes: int) -> None:
        """So many bytes are about to be added."""

    def require_entry(self) -> None:
        """A name is about to be added."""

    def require_copy(self, inode: Inode, need: Need) -> int:
        """``inode`` is about to be copied up; returns the bytes that this may take."""
        return 0

    def copying(self, job: CopyUpJob, size_bytes: int) -> None:
        """The data of a copy is coming by and by."""

    def copied(self, job: CopyUpJob) -> None:
        """It has come, or does not come any more."""

    def changed(self, inode: Inode, *, truncated: bool = False) -> None:
        """What ``inode`` has in the upper directory has another size, or other names."""

    def removing(self, inode: Inode | None, remove: Callable[[], None]) -> None:
        """Call ``remove``, by which ``inode`` loses a name, perhaps its last."""
        remove()

    def closed(self, inode: Inode) -> None:
        """A program has closed ``inode``."""

    def statvfs(self, st: os.statvfs_result) -> os.statvfs_result:
        """What statfs(2) shows where the file system has ``st``."""
        return st

    def statistics(self) -> dict[str, int]:
        """Counters for a person."""
        return {}
