"""Short reads for which the disk is asked again and again, rather than slept for.

A fast disk answers after some 100 µs. Who sleeps until then gives the processor away and has to be woken by an
interrupt, perhaps of another processor, in a virtual machine with the help of its host: with that the read of a small
file takes half as long again. While the server runs beside its client nobody else wants this processor, so it can just
as well wait awake. Not for long: a slow disk is slept for.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from unionfs.fuse_ops.speedups.placement import BesideClient

_SOON_S: Final = 300e-6
_CANNOT_SAY: Final = (errno.EOPNOTSUPP, errno.EINVAL)  # whether it would wait
_LEFT_OUT: Final = 64  # reads after one that took longer; so slow disks cost a fraction of their own time


class ShortReads:
    """Reads for one mount; used by the thread that serves it."""

    def __init__(self, beside: BesideClient) -> None:
        self._beside = beside
        self._left_out = 0
        self._usable = True

    def read(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill ``data`` from ``offset`` of the file, as preadv(2) does; fewer bytes only at the file's end."""
        if self._beside.active and self._usable:
            if self._left_out:
                self._left_out -= 1
            elif self._read_awake(fd, data, offset):
                return len(data)
        return os.preadv(fd, [data], offset)

    def _read_awake(self, fd: int, data: memoryview, offset: int) -> bool:
        """Whether all was read soon; the first attempt makes the kernel begin."""
        until = time.perf_counter() + _SOON_S
        while True:
            try:
                return os.preadv(fd, [data], offset, os.RWF_NOWAIT) == len(data)
            except BlockingIOError:
                if time.perf_counter() >= until:
                    self._left_out = _LEFT_OUT
                    return False
            except OSError as error:  # if it is about the file, the caller gets it from the other way to read
                if error.errno in _CANNOT_SAY:
                    self._usable = False
                return False
