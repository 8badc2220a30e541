"""What pyfuse3 takes from trio, with a wait that looks again before it goes to sleep.

Programs send their requests one after the other. A server that sleeps between two of them is woken for each, which
takes longer than most answers; one that looks again for some tens of microseconds finds the next request there. An idle
mount sleeps as before: it looks only for a moment after a request.

pyfuse3 looks trio up under a name in its own module, so that ``pyfuse3.asyncio`` can put something else in its place.
:func:`install` does the same.
"""

from __future__ import annotations

import select
import time
from types import SimpleNamespace, TracebackType
from typing import Final

import pyfuse3
import trio

_LOOK_AGAIN_S: Final = 50e-6
_TURN_S: Final = 2e-3  # how long to serve before trio's other tasks get their turn


class QuickLock:
    """A lock of trio's tasks that is free to take while it is free: no turn of the scheduler."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
        self._waiting.unpark()


class PatientWait:
    """trio's ``wait_readable`` for the one descriptor that requests come from."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._last_request = 0.0
        self._turn_began = 0.0

    async def wait_readable(self, fd: int) -> None:
        """Return when ``fd`` can be read; raises trio.ClosedResourceError when it is closed."""
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        now = time.perf_counter
        if now() - self._turn_began < _TURN_S:
            until = now() + _LOOK_AGAIN_S
            while True:
                if self._poll.poll(0):
                    return
                if now() > until:
                    break
        await trio.lowlevel.wait_readable(fd)
        self._turn_began = now()


def install() -> None:
    """Let pyfuse3 wait with patience."""
    lowlevel = SimpleNamespace(
        wait_readable=PatientWait().wait_readable,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
        notify_closing=trio.lowlevel.notify_closing,
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=QuickLock,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        from_thread=trio.from_thread,
        lowlevel=lowlevel,
    )
