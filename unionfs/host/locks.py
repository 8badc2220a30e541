"""Locks by name, which exist only while somebody uses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class _Entry:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class NamedLocks:
    """A mutex for every name; a store has too many names in its life to keep them all."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    @contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """Hold the locks of all ``names``; empty names are left out. Always in the same order, so none deadlocks."""
        with ExitStack() as stack:
            for name in sorted({name for name in names if name}):
                stack.enter_context(self._hold_one(name))
            yield

    @contextmanager
    def _hold_one(self, name: str) -> Iterator[None]:
        with self._guard:
            entry = self._entries.setdefault(name, _Entry())
            entry.users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._guard:
                entry.users -= 1
                if not entry.users:
                    del self._entries[name]

    def __len__(self) -> int:
        """How many names are in use; 0 when nobody holds or waits for a lock."""
        return len(self._entries)
