"""Who is asked for room before a change of the upper directory, and told after it: nobody, unless it is limited."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.quota.allocation import data_bytes, round_up
from unionfs.fuse_ops.quota.space_limit import SpaceLimit
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, as_file
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.need import Need

# Up to this size a file is taken to have no holes, when it is asked what a copy of it needs.
_WHOLE_BYTES: Final = 1 << 20


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

    def copying(self, inode: Inode, fd: int, size_bytes: int) -> None:
        """The data of a copy of ``inode`` is coming by and by, into ``fd``."""

    def copied(self, inode: Inode) -> None:
        """It has come, or does not come any more."""

    def changed(self, inode: Inode, *, truncated: bool = False) -> None:
        """What ``inode`` has in the upper directory has another size, or other names."""

    def removing(self, inode: Inode | None, remove: Callable[[], None]) -> None:
        """Call ``remove``, by which ``inode`` loses a name, perhaps its last."""
        remove()

    def closed(self, inode: FileInode) -> None:
        """A program has closed ``inode``."""

    def statvfs(self, st: os.statvfs_result) -> os.statvfs_result:
        """What statfs(2) shows where the file system has ``st``."""
        return st

    def statistics(self) -> dict[str, int]:
        """Counters for a person."""
        return {}


class LimitedAccounts(Accounts):
    """Counts the upper objects of inodes, and those that were unlinked for as long as somebody has them."""

    def __init__(self, view: MergedView, limit: SpaceLimit) -> None:
        self.space = self._limit = limit
        self._view = view
        self._unlinked: dict[Inode, int] = {}  # inodes without a name on disk, with their number there
        self._expected: dict[Inode, tuple[int, int]] = {}  # inodes that are copied, with their new number on disk

    def require(self, size_bytes: int) -> None:
        self._limit.require(round_up(size_bytes, self._limit.block_bytes))

    def require_entry(self) -> None:
        self._limit.require_entry()

    def require_copy(self, inode: Inode, need: Need) -> int:
        needed = self._needed(inode, need)
        self._limit.require(needed)
        return needed

    def _needed(self, inode: Inode, need: Need) -> int:
        """The bytes that a copy-up may take. Directories are not refused: what is removed needs them, too."""
        if inode.kind == stat.S_IFDIR:
            return 0
        block = self._limit.block_bytes
        st = self._view.real_stat(inode)
        if not stat.S_ISREG(st.st_mode) or (not need.data and self._view.options.metacopy):
            return block
        wanted = need.bytes_of(st.st_size)
        if wanted <= _WHOLE_BYTES:
            return round_up(wanted, block)
        layer, path = self._view.data_source(as_file(inode))
        fd = layer.open(path, os.O_RDONLY)
        try:
            return data_bytes(fd, wanted, block)
        finally:
            os.close(fd)

    def copying(self, inode: Inode, fd: int, size_bytes: int) -> None:
        ino = os.fstat(fd).st_ino
        self._limit.expect(ino, size_bytes)
        self._expected[inode] = ino, size_bytes

    def copied(self, inode: Inode) -> None:
        if inode in self._expected:
            self._limit.arrived(*self._expected.pop(inode))
        self.changed(inode)

    def changed(self, inode: Inode, *, truncated: bool = False) -> None:
        if not inode.upper or (inode.orphan and inode.orphan_fd < 0):
            return
        try:
            st = self._view.real_stat(inode)
        except OSError:  # what was asked for has been done; the next recount sees it
            return
        if st.st_nlink == 0 and not (isinstance(inode, FileInode) and inode.handles):
            # What the kernel still remembers of it goes in a moment, and nobody can write to it.
            self._gone(inode, st.st_ino)
            return
        if truncated:
            self._limit.truncated(st)
        else:
            self._limit.settle(st)
        if st.st_nlink == 0:
            self._unlinked[inode] = st.st_ino
            self._limit.unlinked(st.st_ino)
        elif self._unlinked.pop(inode, None) is not None:
            self._limit.named(st.st_ino)

    def removing(self, inode: Inode | None, remove: Callable[[], None]) -> None:
        if inode is None or not inode.upper or (inode.orphan and not _is_staged(inode)):
            remove()
            return
        dir_fd, name = self._view.upper_at(inode)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            remove()
            with contextlib.suppress(OSError):  # what was asked for has been done; the next recount sees it
                st = os.fstat(fd)
                if inode.orphan_fd >= 0:
                    self.changed(inode)
                elif st.st_nlink == 0:
                    self._limit.gone(st.st_ino)
        finally:
            os.close(fd)

    def closed(self, inode: FileInode) -> None:
        if inode in self._unlinked and not inode.handles:
            self._gone(inode, self._unlinked[inode])

    def _gone(self, inode: Inode, ino: int) -> None:
        self._unlinked.pop(inode, None)
        self._limit.gone(ino)

    def statvfs(self, st: os.statvfs_result) -> os.statvfs_result:
        return self._limit.statvfs(st)

    def statistics(self) -> dict[str, int]:
        return {"quota_bytes": self._limit.limit_bytes, "quota_used_bytes": self._limit.used_bytes}


def _is_staged(inode: Inode) -> bool:
    return isinstance(inode, FileInode) and inode.staged_link is not None
