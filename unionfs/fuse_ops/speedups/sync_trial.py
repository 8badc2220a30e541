"""Tries out where a client that syncs again and again is served sooner: on its own processor or on any other.

A sync waits for the disk several times, and each time an interrupt has to wake the server. Where a disk interrupts one
processor only, that is slow on the others; but so is waking a client that is elsewhere, for each request between the
syncs. Which of both takes longer depends on the machine, on what lies above it, and on the client, so it is measured.
"""

from __future__ import annotations

import math
from typing import Final

_WINDOW: Final = 8  # syncs that are timed one after the other: two commits of SQLite
_ORDER: Final = (True, False, False, True)  # so that a client that slows down by and by is fair to both
_HOLD: Final = 512  # syncs, until it is tried again


class SyncTrial:
    """``beside`` says where the client is to be served at present."""

    def __init__(self) -> None:
        self.beside = True
        self._step = 0  # of the order; behind its end, what was found holds
        self._syncs = 0  # in this step
        self._last = 0.0
        # Logarithms of the times: a disk is slow for a moment now and then, ten times as slow, and as often in one
        # place as in the other. As they are, those times would decide.
        self._window = 0.0
        self._took = {True: 0.0, False: 0.0}

    def sync(self, now: float) -> None:
        """The client syncs, at ``now`` (seconds of a clock that is never set): may change ``beside``."""
        self._syncs += 1
        if self._step == len(_ORDER):
            if self._syncs > _HOLD:
                self._took = {True: 0.0, False: 0.0}
                self._go_to(0)
            return
        if self._syncs > 2:  # the first one may have had to move
            self._window += math.log(max(now - self._last, 1e-9))
        else:
            self._window = 0.0
        self._last = now
        if self._syncs == 2 + _WINDOW:
            self._took[self.beside] += self._window
            self._go_to(self._step + 1)

    def interrupt(self) -> None:
        """The client did other things meanwhile: what was being timed is begun again."""
        if self._step < len(_ORDER):
            self._syncs = 0

    def _go_to(self, step: int) -> None:
        self._step = step
        self._syncs = 1  # the present one
        if step < len(_ORDER):
            self.beside = _ORDER[step]
        else:
            self.beside = self._took[True] <= self._took[False]
