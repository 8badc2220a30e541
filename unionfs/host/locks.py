"""Locks: by name between threads, by a file between processes, and a lease that says whether somebody writes.

The lock of a file is the kernel's (flock(2)): it ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.errors import StoreLockedError

_POLL_S = 0.02


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


def wait_until_free(path: str, timeout_s: float | None = None) -> bool:
    """Wait until nobody holds a lock; somebody else may get it before the caller.

    Args:
        path: the lock's file.
        timeout_s: how long to wait; None for as long as it takes.

    Returns:
        Whether it was free.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while end is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_S)
            else:
                return True
        fcntl.flock(fd, fcntl.LOCK_EX)
        return True
    finally:
        os.close(fd)


class StoreLock:
    """Keeps a store for one process until :meth:`release`.

    Args:
        path: the lock's file; created where it is missing, and never deleted: who waits on a deleted file waits on
            nothing.

    Raises:
        StoreLockedError: another process, or this one, holds it.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            who = f"process {holder}" if holder.isdecimal() else "another process"
            if holder == str(os.getpid()):
                who = "this process"
            raise StoreLockedError(
                f"the layer store {os.path.dirname(path)} is in use by {who}; close it there, or wait for it to end",
                "" if who == "this process" else path,
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let others in; releasing twice is harmless."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def has_writers(path: bytes, *, follow: bool) -> bool:
    """Whether somebody has the file ``path`` open for writing, or mapped so; True where that cannot be found out.

    A lease for reading is granted only where nobody does (fcntl(2), F_SETLEASE). It ends when the descriptor is
    closed. Who wants to write meanwhile waits for that, and we would be told by a signal that could end us.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError:
        return True
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)
