"""When the thread that serves all others may wait for the disk itself, and how it waits for a short read.

Handing a short wait to another thread costs more than the wait. As long as one program alone sends requests, each when
it has the answer to the one before, waiting on the spot holds nobody up. A request that comes meanwhile waits for one
disk access, which it may have to do anyway. When that turns out to be slow, it is left to other threads for some time,
so that this thread stands still for a tenth of the time at most.

A fast disk answers a read after some 100 µs. To sleep until then gives the processor away, and an interrupt, perhaps of
another processor, has to wake the server: in a virtual machine that makes the read of a small file half as long again.
While the server runs beside its client nobody else wants this processor, so it asks the disk again and again. Not for
long: it sleeps for a slow disk.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from unionfs.fuse_ops.requests.job import SHORT_WAIT_S
from unionfs.fuse_ops.speedups.placement import ClientAffinity

_IN_A_ROW: Final = 8  # requests of one thread of one program, until it counts as alone
_PAUSE_FACTOR: Final = 10  # after a slow wait, leave waiting to others for so many times its length


class InlineWaitPolicy:
    """Watches who sends requests, and how long waiting takes."""

    __slots__ = ("_not_before", "_sender", "_usable", "in_a_row")

    def __init__(self, *, usable: bool = True) -> None:
        self._usable = usable
        self._sender = 0
        self.in_a_row = 0  # requests of the same sender before the present one
        self._not_before = 0.0

    def request_from(self, pid: int) -> int:
        """A request came from the thread ``pid``; 0 is any of another PID namespace.

        Returns how many came from it before this one, without any of another.
        """
        if pid != self._sender or not pid:
            self._sender = pid
            self.in_a_row = 0
        else:
            self.in_a_row += 1
        return self.in_a_row

    def may_wait(self) -> bool:
        """Whether a short wait for the disk is better done here and now."""
        return self._usable and self.in_a_row >= _IN_A_ROW and time.perf_counter() >= self._not_before

    def waited_since(self, start: float) -> None:
        """A wait that began when time.perf_counter() was ``start`` is over."""
        now = time.perf_counter()
        if now - start > SHORT_WAIT_S:
            self._not_before = now + _PAUSE_FACTOR * (now - start)


_SOON_S: Final = 300e-6
_CANNOT_SAY: Final = (errno.EOPNOTSUPP, errno.EINVAL)  # whether it would wait
_LEFT_OUT: Final = 64  # reads after one that took longer; so slow disks cost a fraction of their own time


class ShortReads:
    """Reads for one mount; used by the thread that serves it."""

    def __init__(self, affinity: ClientAffinity) -> None:
        self._affinity = affinity
        self._left_out = 0
        self._usable = True

    def read(self, fd: int, data: memoryview, offset: int) -> int:
        """Fill ``data`` from ``offset`` of the file, as preadv(2) does; fewer bytes only at the file's end."""
        if self._affinity.active and self._usable:
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
