"""An io_uring that is told to look names up and of which nobody takes the results: the disk is read ahead by it.

The kernel has no call that reads a directory ahead. Looking a name up in one reads it, and io_uring does that in
threads of the kernel's, many at a time, without Python's lock. Written here because that is all that is needed:
io_uring_setup(2), io_uring_enter(2), linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from typing import Final

from unionfs.host.syscalls import system_call

# The same numbers on every architecture.
_NR_SETUP: Final = 425
_NR_ENTER: Final = 426
_NR_REGISTER: Final = 427

_PARAMS_SIZE: Final = 120
_OFFSETS: Final = struct.Struct("=10I")  # struct io_sqring_offsets and io_cqring_offsets, as far as they are used
_SQ_OFFSETS_AT: Final = 40
_CQ_OFFSETS_AT: Final = 80
_RING_AT: Final = 0  # IORING_OFF_SQ_RING; from Linux 5.4 on both rings are there
_ENTRIES_AT: Final = 0x1000_0000  # IORING_OFF_SQES
_REGISTER_WORKERS: Final = 19  # IORING_REGISTER_IOWQ_MAX_WORKERS: Linux 5.15, an error before
_OP_STATX: Final = 21
_STATX_FLAGS: Final = 0x100 | 0x4000  # AT_SYMLINK_NOFOLLOW, AT_STATX_DONT_SYNC

_ENTRY: Final = struct.Struct("=BBHiQQIIQ24x")  # struct io_uring_sqe
_U32: Final = struct.Struct("=I")

_ENTRIES: Final = 64
_WORKERS: Final = 4
_NAMES_BYTES: Final = 64 * 1024

# Where the kernel writes results, of this ring or one that was closed a moment ago; so it is never given back.
_results = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_results_at: Final = ctypes.addressof(ctypes.c_char.from_buffer(_results))


class LookupRing:
    """Looks names up in the background; raises OSError where the kernel has no io_uring, or does not allow it."""

    def __init__(self) -> None:
        params = bytearray(_PARAMS_SIZE)
        raw = (ctypes.c_char * len(params)).from_buffer(params)
        self._fd = system_call(_NR_SETUP, ctypes.c_uint(_ENTRIES), raw)
        try:
            os.set_inheritable(self._fd, False)
            workers = (ctypes.c_uint * 2)(_WORKERS, _WORKERS)
            system_call(_NR_REGISTER, self._fd, _REGISTER_WORKERS, workers, ctypes.c_uint(2))
            sq = _OFFSETS.unpack_from(params, _SQ_OFFSETS_AT)
            cq = _OFFSETS.unpack_from(params, _CQ_OFFSETS_AT)
            entries, cq_entries = struct.unpack_from("=II", params)
            size = max(sq[6] + 4 * entries, cq[5] + 16 * cq_entries)
            self._ring = mmap.mmap(self._fd, size, offset=_RING_AT)
            self._entries = mmap.mmap(self._fd, entries * _ENTRY.size, offset=_ENTRIES_AT)
        except OSError:
            os.close(self._fd)
            raise
        self._capacity: int = entries
        self._tail_at, self._array_at = sq[1], sq[6]
        self._done_head_at, self._done_tail_at = cq[0], cq[1]
        for position in range(entries):
            _U32.pack_into(self._ring, self._array_at + 4 * position, position)
        # The kernel copies names when it is told of them.
        self._names = mmap.mmap(-1, _NAMES_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._names_at = ctypes.addressof(ctypes.c_char.from_buffer(self._names))
        self._told = 0
        self._new = 0
        self._names_end = 0

    @property
    def room(self) -> int:
        """How many names can be added now; those that the kernel works at count until it has ended."""
        done = int.from_bytes(self._ring[self._done_tail_at : self._done_tail_at + 4], sys.byteorder)
        under_way = self._told + self._new - done & 0xFFFF_FFFF
        return self._capacity - under_way

    def add(self, dir_fd: int, path: bytes) -> bool:
        """Have ``path`` below ``dir_fd`` looked up, after :meth:`submit`; false when there is no room.

        ``dir_fd`` must stay open until then and longer: it is used when the kernel comes to it.
        """
        start = self._names_end
        end = start + len(path) + 1
        if self.room <= 0 or end > _NAMES_BYTES:
            return False
        self._names[start:end] = path + b"\0"
        position = (self._told + self._new) % self._capacity
        entry = (_OP_STATX, 0, 0, dir_fd, _results_at, self._names_at + start, 0, _STATX_FLAGS, 0)
        _ENTRY.pack_into(self._entries, position * _ENTRY.size, *entry)
        self._new += 1
        self._names_end = end
        return True

    def submit(self) -> None:
        """Tell the kernel of the names that were added."""
        if not self._new:
            return
        # Nobody looks at what has ended.
        self._ring[self._done_head_at : self._done_head_at + 4] = self._ring[
            self._done_tail_at : self._done_tail_at + 4
        ]
        _U32.pack_into(self._ring, self._tail_at, self._told + self._new & 0xFFFF_FFFF)
        taken = system_call(_NR_ENTER, self._fd, self._new, 0, 0, None, ctypes.c_size_t(0))
        self._told = self._told + taken & 0xFFFF_FFFF
        self._new -= taken
        if not self._new:
            self._names_end = 0

    def close(self) -> None:
        """End it; what the kernel is at ends by itself."""
        os.close(self._fd)
