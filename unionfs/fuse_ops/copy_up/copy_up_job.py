"""The slow part of a copy-up, which knows descriptors only: it may run in a worker thread while the tree goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from unionfs.fuse_ops.copy_up.unsynced import Attribute, settle
from unionfs.fuse_ops.stack.upper_dir import NewFile
from unionfs.fuse_ops.tree.attributes import CAPABILITY
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
    data_is_below: tuple[bytes, ...] = ()  # attributes of a target without data that say where that is
    complete: bool = False  # whether such a target has its data
    empties: bool = False  # whether the copy stands for a truncation, which is a change

    def run(self) -> None:
        """Copy the data, and see to it that it is on disk if that was asked for; in any thread."""
        if self.mark is not None:
            settle(self.target_fd, self.mark, self.origin)
            return
        copy_data(
            self.source_fd,
            self.target_fd,
            self.size,
            sync=self.sync,
            overwrite=self.overwrites,
            is_wanted=self.is_wanted,
        )
        if self.data_is_below:
            self._complete()

    def _complete(self) -> None:
        """The target has the data: it need not be looked for below any more.

        Synced after that: see :func:`settle`.
        """
        if self.size < self.st.st_size:
            os.ftruncate(self.target_fd, self.size)
        self._restore()
        self.empty()
        os.removexattr(self.target_fd, self.data_is_below[0])
        self.complete = True
        for name in self.data_is_below[1:]:
            with contextlib.suppress(OSError):
                os.removexattr(self.target_fd, name)
        if self.sync:
            os.fsync(self.target_fd)

    def empty(self) -> None:
        """Give the copy the times of a file that has just been truncated, if it stands for that."""
        if self.empties:
            os.ftruncate(self.target_fd, 0)

    def undo(self) -> None:
        """Make the target what it was, as far as that can be done."""
        if not self.data_is_below or self.complete:
            return
        with contextlib.suppress(OSError):
            if not self.overwrites:  # a metacopy stays a file without data
                os.ftruncate(self.target_fd, 0)
            os.ftruncate(self.target_fd, self.st.st_size)
            self._restore()

    def _restore(self) -> None:
        if self.capability is not None:
            os.setxattr(self.target_fd, CAPABILITY, self.capability)
        os.utime(self.target_fd, ns=(self.st.st_atime_ns, self.st.st_mtime_ns))

    def close(self, *, keep_target: bool = False) -> None:
        """Close the descriptors; ``keep_target``: but not that of the copy, which somebody else has now."""
        source_fd, target_fd = self.source_fd, self.target_fd
        self.source_fd = self.target_fd = -1
        for fd in (source_fd, -1 if keep_target else target_fd):
            if fd >= 0:
                os.close(fd)
