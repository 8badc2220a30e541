"""Counts of how often a path was asked to be mounted, which survive a restart of the process while mounts live on.

The rules are moby's ``RefCounter``: on the first touch of a path the mount table is asked, and a
path that is mounted starts at 1; an entry that falls to 0 is forgotten, so that the next touch asks again.
"""

from __future__ import annotations

import threading

from unionfs.drivers.contract import Checker
from unionfs.host import mountinfo
from unionfs.host.mounts import is_dead


class MountChecker:
    """A :class:`Checker` that asks the kernel's mount table, and the file system whether its server still answers."""

    def is_mounted(self, path: str) -> bool:
        """See :meth:`Checker.is_mounted`; a mount whose server is gone does not count."""
        return mountinfo.top_mount(path) is not None and not is_dead(path)


class RefCounter:
    """Counts by mount path.

    Args:
        checker: asked once for each path that has no count.
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def increment(self, path: str) -> int:
        """Count one user more; the new count. The caller keeps others from the same path meanwhile."""
        return self._add(path, 1)

    def decrement(self, path: str) -> int:
        """Count one user less, never below 0; the new count."""
        return self._add(path, -1)

    def forget(self, path: str) -> None:
        """Drop the count of a path that is not mounted any more."""
        with self._lock:
            self._counts.pop(path, None)

    def paths(self) -> list[str]:
        """The paths with a count, sorted."""
        with self._lock:
            return sorted(self._counts)

    def _add(self, path: str, step: int) -> int:
        with self._lock:
            count = self._counts.get(path)
        if count is None:
            # Not under the lock: a FUSE server that takes its time must not hold up everybody.
            count = 1 if self._checker.is_mounted(path) else 0
        count = max(0, count + step)
        with self._lock:
            if count:
                self._counts[path] = count
            else:
                self._counts.pop(path, None)
        return count
