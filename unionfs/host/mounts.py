"""What is mounted still: whether it answers, asked without waiting for a server that hangs; whether others have it too.

The kernel tells of each FUSE file system, by its device minor, in its control file system as long as it is mounted
anywhere (Documentation/filesystems/fuse.rst, "Control filesystem").
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto

from unionfs.host import syscalls

_CONTROL = "/sys/fs/fuse/connections"

# Enough for a server on a machine that swaps; one that takes longer is told from one that is gone all the same.
_LIMIT_S = 5.0
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Answer(Enum):
    """What a mount says when it is asked."""

    ALIVE = auto()
    DEAD = auto()
    """Errors only: the server of this FUSE mount is gone."""
    SILENT = auto()
    """Nothing in time: its server hangs, or is very slow."""


class _Question:
    """One question on its way, in a thread of its own: no signal ends the wait for a FUSE server but SIGKILL."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._answer = Answer.SILENT
        self._thread = threading.Thread(target=self._ask, name="statfs", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            os.statvfs(self._path)  # the one question that the kernel never answers from memory
        except OSError as error:
            self._answer = Answer.DEAD if error.errno in _GONE else Answer.ALIVE
        else:
            self._answer = Answer.ALIVE
        with _lock:
            if _asked.get(self._path) is self:
                del _asked[self._path]

    def wait(self, limit_s: float) -> Answer:
        self._thread.join(limit_s)
        return self._answer


_lock = threading.Lock()
_asked: dict[str, _Question] = {}  # a server that hangs is asked once, and not again by everybody who comes


def probe(path: str, limit_s: float | None = None) -> Answer:
    """Ask the file system at ``path`` for a sign of life.

    Args:
        path: an absolute path.
        limit_s: how long to wait for it; None for five seconds.
    """
    with _lock:
        question = _asked.get(path)
        if question is None:
            question = _asked[path] = _Question(path)
    return question.wait(_LIMIT_S if limit_s is None else limit_s)


def is_dead(path: str) -> bool:
    """Whether the server of the FUSE mount at ``path`` is gone. One that does not answer in time is not."""
    return probe(path) is Answer.DEAD


def is_mounted_anywhere(minor: int) -> bool | None:
    """Whether the FUSE file system of this device minor is mounted in any mount namespace, or used unseen.

    None where nobody can tell: the control file system is not mounted, and we may not do that.
    """
    with _control() as fd:
        if fd is None:
            return None
        try:
            os.stat(str(minor), dir_fd=fd)
        except FileNotFoundError:
            return False
        return True


def waiting_requests(minor: int) -> int | None:
    """How many requests the server of a FUSE file system has not answered; None where nobody can tell."""
    with _control() as fd:
        if fd is None:
            return None
        try:
            with open(os.open(f"{minor}/waiting", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            return None


@contextmanager
def _control() -> Iterator[int | None]:
    """The control file system's root: where it is mounted, as systemd does it, or else mounted for us alone."""
    fd = None
    try:
        if os.path.ismount(_CONTROL):
            fd = os.open(_CONTROL, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = syscalls.mount_detached(b"fusectl")
    except OSError:
        pass
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)
