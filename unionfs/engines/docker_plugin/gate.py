"""Calls beside each other, and one that has to be alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class CallGate:
    """Many calls share it; one that is to be alone waits for them to end, and others wait for it."""

    def __init__(self) -> None:
        self._changed = trio.Condition()
        self._running = 0
        self._closed = 0

    @property
    def running(self) -> int:
        """How many calls are inside."""
        return self._running

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be inside together with others."""
        async with self._changed:
            while self._closed:
                await self._changed.wait()
            self._running += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside when nobody else is."""
        async with self._changed:
            self._closed += 1  # from now on nobody else comes in, so that this does end
            try:
                while self._running:
                    await self._changed.wait()
                self._running += 1
            except BaseException:
                self._closed -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            self._closed -= 1
            await self._leave()

    async def _leave(self) -> None:
        self._running -= 1
        with trio.CancelScope(shield=True):
            async with self._changed:
                self._changed.notify_all()
