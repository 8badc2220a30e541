"""A container in the background: what runs it leaves the terminal and its caller as soon as the container is started.

Until then it is a child whose caller waits, so that errors are said and statuses kept as in the foreground. It goes on
in a session of its own, whose standard output and error lead nowhere: the container's go to a file.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

_PIPE = "UNIONFS_STARTED_PIPE"


def in_background(run: Callable[[], int]) -> int:
    """Call ``run`` in another process, and wait until it has called :func:`tell_started` or has ended.

    Args:
        run: what it returns is the exit status if it ends before. It may be called by a process that ours has become,
            or has started with :func:`pipe_to_pass`.

    Returns:
        0 when it is started, else the exit status.
    """
    if _PIPE in os.environ:
        return run()  # this is that other process, inside of a user namespace
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    said = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_in_background(writer, said, run)
    os.close(writer)
    name = b""
    try:
        # Not to the end of the pipe: others that live as long as the container hold it too.
        while not name.endswith(b"\0") and (piece := os.read(reader, 4096)):
            name += piece
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)  # what it has begun is cleaned up as when it dies
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reader)
    # Without a name it has ended; with one it goes on, and what it says from now on is for nobody.
    status = 0 if name else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(said, "rb") as errors:
        errors.seek(0)
        sys.stderr.buffer.write(errors.read())
        sys.stderr.flush()
    if name:
        print(os.fsdecode(name[:-1]))
    return status if status >= 0 else 128 - status


def _be_in_background(writer: int, said: int, run: Callable[[], int]) -> None:
    status = 125
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (said, 2)):
            os.dup2(source, target)
        os.environ[_PIPE] = str(writer)
        status = run()
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def is_in_background() -> bool:
    """Whether this process runs a container for :func:`in_background`."""
    return _PIPE in os.environ


def pipe_to_pass() -> tuple[int, ...]:
    """What a process that goes on for us must inherit."""
    return (int(os.environ[_PIPE]),) if _PIPE in os.environ else ()


def tell_started(name: str) -> None:
    """Let the caller of :func:`in_background` go on."""
    writer = int(os.environ.pop(_PIPE))
    with suppress(BrokenPipeError):  # the caller was killed meanwhile
        os.write(writer, os.fsencode(name) + b"\0")
    os.close(writer)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
