"""What a change of a file will allocate: answered from the extents it has, before anything is written.

All sizes are in bytes. The answers are upper bounds, exact where the file system tells its extents.
Source: Documentation/filesystems/fiemap.rst, lseek(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

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
