"""The slow part of a copy-up, which knows descriptors only: it may run in a worker thread while the tree goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from unionfs.fuse_ops.copy_up.unsynced import Attribute, settle
from unionfs.fuse_ops.stack.upper_dir import NewFile
from unionfs.fuse_ops.tree.inodes import FileInode
from unionfs.overlay.copying import always, copy_data


@dataclass(eq=False, slots=True)
class CopyUpJob:
    """The copying of one file's data, or its syncing."""

    inode: FileInode
    st: os.stat_result  # of the file that is copied
    source_fd: int
    target_fd: int
    new: NewFile | None  # the file behind ``target_fd``; None when the data goes straight into the upper file
    size: int
    sync: bool
    later: bool = False  # whether it is to be synced later
    overwrites: bool = False  # whether the target may have data by now
    capability: bytes | None = None  # file capabilities of the target, which writing to it takes away
    mark: bytes | None = None  # the attribute to remove from a copy that was made before, to be settled now
    origin: Attribute | None = None  # what such a copy is given in its place
    is_wanted: Callable[[], bool] = always  # asked now and then; where nobody wants it, the copying ends with EINTR

    def run(self) -> None:
        """Copy the data, and see to it that it is on disk if that was asked for; in any thread."""
        if self.mark is not None:
            settle(self.target_fd, self.mark, self.origin)
        else:
            copy_data(
                self.source_fd,
                self.target_fd,
                self.size,
                sync=self.sync,
                overwrite=self.overwrites,
                is_wanted=self.is_wanted,
            )

    def close(self) -> None:
        for fd in (self.source_fd, self.target_fd):
            if fd >= 0:
                os.close(fd)
