"""Turning a server into a daemon whose parent returns once the server is of use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

Ready = Callable[[], None]


def open_standard_fds() -> None:
    """Make sure that 0, 1 and 2 are taken, or the next file opened would be mistaken for one of them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has None for a stream whose descriptor was closed when it started.
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def inherited_fds() -> list[int]:
    """The descriptors above 2 that the caller left open to us; only right before we open any."""
    try:
        fds = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []
    # The listing's own descriptor is among them, closed by now.
    return [fd for fd in fds if fd > 2 and _is_open(fd)]


def open_null() -> int:
    """A descriptor for :func:`release_caller`."""
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def release_caller(null: int) -> None:
    """Give up what is the caller's: his standard descriptors, ``null`` in their place, and his working directory.

    Names no path but the root: a mount that was made meanwhile may cover any other.
    """
    # The directory that we were started in may have to be unmounted while we live.
    os.chdir("/")
    sys.stdout.flush()
    sys.stderr.flush()
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def daemonize(serve: Callable[[Ready], int]) -> int:
    """Run ``serve`` in a child process and return 0 as soon as it has called its argument, else 1.

    The child has its own session from the start. It keeps the caller's standard descriptors until it is ready,
    for its messages, and gives them up then: engines wait until every holder of their pipes is gone.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _serve_and_exit(serve, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        ready = answers.read(1)
    if ready:
        return 0
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        print(f"unionfs-mount: the server was ended by {name} before the mount was usable", file=sys.stderr)
    return 1


def _serve_and_exit(serve: Callable[[Ready], int], writing: int) -> None:
    status = 1
    try:
        os.setsid()
        null = open_null()

        def ready() -> None:
            release_caller(null)
            # Fails when the parent was killed while it waited: then nobody knows of the mount, and it must end.
            os.write(writing, b"r")
            os.close(writing)

        status = serve(ready)
    finally:
        # Not sys.exit: what the parent registered to run at its end is not ours to run.
        sys.stderr.flush()
        os._exit(status)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
