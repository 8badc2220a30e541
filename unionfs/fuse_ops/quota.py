"""What limits an upper directory: what is in use, what may be added, and what df(1) is told.

It counts as a project quota of XFS does: blocks, of every file once, those of directories too, the work directory
included. At the limit there is ENOSPC, as XFS answers for projects, and not the EDQUOT that it has for users.

The count is taken when the mount begins and kept up by asking each changed file for its blocks. What was counted of a
file is remembered, so a file system that changes its mind later (compression, delayed allocation) makes no lasting
error. Only before something is refused is everything counted again, in case that others, such as a second mount of the
same directories, have made room.

What a change will allocate is answered before anything is written, from the extents that the file has. These answers
are upper bounds, exact where the file system tells its extents. Source: Documentation/filesystems/fiemap.rst, lseek(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.fuse_ops.tree.inodes import FileInode, Inode, as_file
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host.files import open_directory, walk_tree

_FIEMAP: Final = 0xC020660B  # linux/fs.h: _IOWR('f', 11, struct fiemap)
_FIEMAP_HEADER: Final = struct.Struct("=QQIIII")  # start, length, flags, extents filled in, room for, reserved
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xI12x")  # logical and physical offset, length, flags
_EXTENTS: Final = 64  # asked for at a time
_NOT_TOLD: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EBADF})


def round_up(size: int, block: int) -> int:
    """``size`` in whole blocks."""
    return -(-size // block) * block


def growth(fd: int, offset: int, size: int, block: int, counted: int, beyond: int) -> int:
    """How much the count of a file can grow when ``size`` bytes are written, or allocated, at ``offset``.

    Args:
        fd: the file, in any mode.
        offset: where.
        size: how many.
        block: what the file system allocates at least.
        counted: what is counted of the file before its end.
        beyond: what is counted of it beyond its end; anything else that is allocated there is not, so far.
    """
    present = os.fstat(fd).st_size
    end = offset + size
    # A file that is all there has no room for more than this, whatever is said of its extents.
    most = round_up(max(present, end), block) - counted
    if most <= 0:
        return 0
    first, last = offset // block * block, round_up(end, block)
    bound = max(first, min(last, round_up(present, block)))
    inside = bound - first - _allocated_bytes(fd, first, bound, block)
    outside = last - bound - min(beyond, _allocated_bytes(fd, bound, last, block))
    return min(most, inside + outside)


def data_bytes(fd: int, end: int, block: int) -> int:
    """How much a copy of the first ``end`` bytes takes that keeps the holes."""
    return sum(round_up(stop, block) - start // block * block for start, stop in _data(fd, 0, end))


def _allocated_bytes(fd: int, start: int, end: int, block: int) -> int:
    if start >= end:
        return 0
    # Where only holes are told, data may end with the file, in the middle of a block.
    return sum(round_up(stop, block) - first for first, stop in _allocated(fd, start, end))


def _allocated(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The allocated ranges between two offsets, which are at the bounds of blocks, in order."""
    found = _extents(fd, start, end)
    if found is None:
        yield from _data(fd, start, end)
        return
    while found:
        for logical, length in found:
            low, high = max(logical, start), min(logical + length, end)
            if low < high:
                yield low, high
        start = found[-1][0] + found[-1][1]
        found = _extents(fd, start, end) if start < end else []


def _extents(fd: int, start: int, end: int) -> list[tuple[int, int]] | None:
    """Offsets and lengths of the first extents between two offsets: with those that were never written.

    None where the file system does not tell them.
    """
    buffer = bytearray(_FIEMAP_HEADER.size + _EXTENTS * _FIEMAP_EXTENT.size)
    _FIEMAP_HEADER.pack_into(buffer, 0, start, end - start, 0, 0, _EXTENTS, 0)
    try:
        fcntl.ioctl(fd, _FIEMAP, buffer)
    except OSError as error:
        if error.errno not in _NOT_TOLD:
            raise
        return None
    count = _FIEMAP_HEADER.unpack_from(buffer)[3]
    raw = memoryview(buffer)[_FIEMAP_HEADER.size : _FIEMAP_HEADER.size + count * _FIEMAP_EXTENT.size]
    return [(logical, length) for logical, _, length, _ in _FIEMAP_EXTENT.iter_unpack(raw)]


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges with data between two offsets, in order."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        if at < end:
            yield at, min(stop, end)
        at = stop


_SECTOR: Final = 512  # the unit of st_blocks

# How seldom everything is counted again while things are refused: at most this share of the time is spent on it.
_RECOUNT_SHARE: Final = 0.02
_RECOUNT_PAUSE_S: Final = 2.0

_FALLOC_KEEP_SIZE: Final = 0x01
_FALLOC_FREES: Final = 0x02 | 0x08  # FALLOC_FL_PUNCH_HOLE, FALLOC_FL_COLLAPSE_RANGE
_FALLOC_MOVES: Final = 0x20  # FALLOC_FL_INSERT_RANGE


class SpaceLimit:
    """The space of one upper directory. The thread that owns the tree owns this, too.

    It remembers about a hundred bytes for each file that takes space.

    Args:
        limit_bytes: how much may be held.
        roots: readable descriptors of the directories that count, on one file system; they stay their owner's.
    """

    def __init__(self, limit_bytes: int, roots: tuple[int, ...]) -> None:
        self.limit_bytes = limit_bytes
        self.block_bytes = os.fstatvfs(roots[0]).f_frsize
        self._roots = roots
        self._counted: dict[int, int] = {}  # sectors by inode number, of those that have any
        self._used = 0  # sectors
        self._expected: dict[int, int] = {}  # bytes by inode number, of files that are growing in another thread
        self._expected_total = 0
        self._unlinked: set[int] = set()  # inode numbers that no directory shows
        # Sectors by inode number that files have beyond what reaches to their end: attributes, and what somebody
        # asked for. More than these do not count: XFS allocates ahead of a writer, up to gigabytes, and takes it back.
        self._beyond: dict[int, int] = {}
        self._next_recount = 0.0
        self._count_all()

    # -- what there is ----------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """What is in use."""
        return self._used * _SECTOR

    @property
    def free_bytes(self) -> int:
        """What may still be added, without that which is promised to changes under way."""
        return max(0, self.limit_bytes - self.used_bytes - self._expected_total)

    def statvfs(self, st: os.statvfs_result) -> os.statvfs_result:
        """What statfs(2) shows: the limit as the size, where the file system ``st`` is not smaller yet."""
        blocks = min(st.f_blocks, self.limit_bytes // st.f_frsize)
        left = max(0, self.limit_bytes - self.used_bytes) // st.f_frsize
        free, available = min(st.f_bfree, left), min(st.f_bavail, left)
        rest = (st.f_files, st.f_ffree, st.f_favail, st.f_flag, st.f_namemax)
        return os.statvfs_result((st.f_bsize, st.f_frsize, blocks, free, available, *rest))

    # -- before a change --------------------------------------------------------------------------------------

    def require(self, size_bytes: int) -> None:
        """Raise ENOSPC unless there is room for ``size_bytes`` more."""
        if size_bytes > self.free_bytes and not (self._count_again() and size_bytes <= self.free_bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def require_entry(self) -> None:
        """Raise ENOSPC unless there is room for a new name: a block, which its directory or it itself may need."""
        self.require(self.block_bytes)

    def fitting(self, fd: int, offset: int, size: int) -> int:
        """How many of ``size`` bytes may be written to a file at ``offset``; ENOSPC if none."""
        block = self.block_bytes
        # If there is room even when everything is new. The ends may lie in blocks of their own.
        if size + 2 * block <= self.free_bytes or not size:
            return size
        fits = self._fitting(fd, offset, size)
        if fits < size and self._count_again():
            fits = self._fitting(fd, offset, size)
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fits

    def _fitting(self, fd: int, offset: int, size: int) -> int:
        block, free, ino = self.block_bytes, self.free_bytes, os.fstat(fd).st_ino

        def needed(count: int) -> int:
            return growth(fd, offset, count, block, *self._parts(ino))

        if needed(size) <= free:
            return size
        to_ends_of_blocks = range(block - offset % block, size, block)
        fitting = bisect_right(to_ends_of_blocks, free, key=needed)
        return to_ends_of_blocks[fitting - 1] if fitting else 0

    def _parts(self, ino: int) -> tuple[int, int]:
        """The bytes counted of a file before its end and beyond it."""
        beyond = self._beyond.get(ino, 0)
        return max(0, self._counted.get(ino, 0) - beyond) * _SECTOR, beyond * _SECTOR

    def allocation(self, fd: int, mode: int, offset: int, length: int) -> int:
        """What fallocate(2) with these arguments may add; ENOSPC if there is no room for it."""
        if mode & (_FALLOC_FREES | _FALLOC_MOVES):
            return 0
        st, block = os.fstat(fd), self.block_bytes
        needed = growth(fd, offset, length, block, *self._parts(st.st_ino))
        self.require(needed)
        beyond = round_up(offset + length, block) - max(round_up(st.st_size, block), offset // block * block)
        if mode & _FALLOC_KEEP_SIZE and beyond > 0:
            self._beyond[st.st_ino] = self._beyond.get(st.st_ino, 0) + beyond // _SECTOR
        return needed

    # -- changes in another thread ----------------------------------------------------------------------------

    def expect(self, ino: int, size_bytes: int) -> None:
        """Promise the file ``ino`` that it may grow by ``size_bytes``, until :meth:`arrived`."""
        self._expected[ino] = self._expected.get(ino, 0) + size_bytes
        self._expected_total += size_bytes

    def arrived(self, ino: int, size_bytes: int) -> None:
        """End a promise; the file is to be counted by :meth:`recount` then."""
        left = self._expected[ino] - size_bytes
        if left:
            self._expected[ino] = left
        else:
            del self._expected[ino]
        self._expected_total -= size_bytes

    # -- after a change ---------------------------------------------------------------------------------------

    def recount(self, st: os.stat_result) -> None:
        """Count a file of the upper directory as it is now."""
        self._note_beyond(st)
        self._count(st.st_ino, self._sectors(st))

    def written(self, st: os.stat_result) -> None:
        """Count a file as it is now, of which only the contents were changed."""
        self._count(st.st_ino, self._sectors(st))

    def truncated(self, st: os.stat_result) -> None:
        """Count a file as it is now, which has lost what it had beyond its end."""
        self._beyond.pop(st.st_ino, None)
        self.recount(st)

    def _count(self, ino: int, sectors: int) -> None:
        before = self._counted.get(ino, 0)
        if sectors == before:
            return
        self._used += sectors - before
        if sectors:
            self._counted[ino] = sectors
        else:
            del self._counted[ino]

    def _note_beyond(self, st: os.stat_result) -> None:
        beyond = st.st_blocks - round_up(st.st_size, self.block_bytes) // _SECTOR
        if beyond > self._beyond.get(st.st_ino, 0) and stat.S_ISREG(st.st_mode):
            self._beyond[st.st_ino] = beyond

    def unlinked(self, ino: int) -> None:
        """Note a file without a name: it counts until it is :meth:`gone`, or has a name again."""
        self._unlinked.add(ino)

    def named(self, ino: int) -> None:
        """Note that a file of which :meth:`unlinked` was said has a name."""
        self._unlinked.discard(ino)

    def gone(self, ino: int) -> None:
        """Count a file no more: the file system has it no longer."""
        self._used -= self._counted.pop(ino, 0)
        self._unlinked.discard(ino)
        self._beyond.pop(ino, None)

    def _sectors(self, st: os.stat_result) -> int:
        if not stat.S_ISREG(st.st_mode):
            return st.st_blocks
        return min(st.st_blocks, round_up(st.st_size, self.block_bytes) // _SECTOR + self._beyond.get(st.st_ino, 0))

    # -- counting ---------------------------------------------------------------------------------------------

    def _count_again(self) -> bool:
        """Count everything, unless it was done a short time ago; whether it was done."""
        if time.monotonic() < self._next_recount:
            return False
        self._count_all()
        return True

    def _count_all(self) -> None:
        began = time.monotonic()
        first = not self._next_recount
        counted: dict[int, int] = {}
        for root in self._roots:
            self._count_object(os.fstat(root), counted)
            walk_tree(root, lambda fd: self._count_entries(fd, counted), open_below=_open_quietly)
        for ino in (*self._unlinked, *self._expected):
            counted.pop(ino, None)
            if ino in self._counted:
                counted[ino] = self._counted[ino]
        self._counted = counted
        self._used = sum(counted.values())
        ended = time.monotonic()
        self._next_recount = ended if first else ended + max(_RECOUNT_PAUSE_S, (ended - began) / _RECOUNT_SHARE)

    def _count_entries(self, fd: int, counted: dict[int, int]) -> list[bytes]:
        """Count what is in the directory ``fd``; the names of directories in it. What vanishes is left out."""
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            try:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except OSError:
                continue
            self._count_object(st, counted)
            if stat.S_ISDIR(st.st_mode):
                directories.append(name)
        return directories

    def _count_object(self, st: os.stat_result, counted: dict[int, int]) -> None:
        if st.st_ino not in self._counted:
            self._note_beyond(st)
        sectors = self._sectors(st)
        if sectors:
            counted[st.st_ino] = sectors


def _open_quietly(dir_fd: int, name: bytes) -> int:
    """A descriptor of the directory ``name``; -1 for one that cannot be read, which is left out."""
    try:
        return open_directory(dir_fd, name)
    except OSError:
        return -1


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

    def require_copy(self, inode: Inode, *, data: bool, size: int | None) -> int:
        """``inode`` is about to be copied up, with ``data`` its first ``size`` bytes; returns what this may take."""
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

    def require_copy(self, inode: Inode, *, data: bool, size: int | None) -> int:
        needed = self._needed(inode, data, size)
        self._limit.require(needed)
        return needed

    def _needed(self, inode: Inode, data: bool, size: int | None) -> int:
        """The bytes that a copy-up may take. Directories are not refused: what is removed needs them, too."""
        if inode.kind == stat.S_IFDIR:
            return 0
        block = self._limit.block_bytes
        st = self._view.real_stat(inode)
        if not stat.S_ISREG(st.st_mode) or (not data and self._view.options.metacopy):
            return block
        wanted = st.st_size if size is None else min(size, st.st_size)
        if wanted <= _WHOLE_BYTES:
            return round_up(wanted, block)
        fd = self._view.open_data(as_file(inode))
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
            self._limit.recount(st)
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
