"""When a request may wait for the disk in the thread that serves all others.

Handing a short wait to another thread costs more than the wait. As long as one program alone sends requests, each when
it has the answer to the one before, nobody is held up by waiting on the spot; whoever comes meanwhile waits for one
disk access, which he may have to do anyway. When that turns out to be slow, it is left to other threads for some time,
so that this thread stands still for a tenth of the time at most.
"""

from __future__ import annotations

import time
from typing import Final

from unionfs.fuse_ops.requests.job import SHORT_WAIT_S

_IN_A_ROW: Final = 8  # requests of one thread of one program, until it counts as alone
_PAUSE_FACTOR: Final = 10  # after a slow wait, leave waiting to others for so many times its length


class Patience:
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
