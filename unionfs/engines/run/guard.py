"""A process that cleans up when we are killed.

It is forked before there is anything to clean up, and waits for the end of a pipe that only we hold: the kernel closes
it however we end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

_DISMISSED = b"done"


class Guard:
    """Calls ``clean_up`` in another process, unless the block is left in order.

    An :class:`Exception` is in order, since what raised it has cleaned up; to be interrupted by the user is not.

    Args:
        clean_up: what it raises is seen by nobody.
    """

    def __init__(self, clean_up: Callable[[], None]) -> None:
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._writer)
                _wait(reader, clean_up)
            finally:
                os._exit(0)
        os.close(reader)

    def __enter__(self) -> Guard:
        return self

    def dismiss(self) -> None:
        """There is nothing to clean up, however the block is left."""
        with suppress(BrokenPipeError):  # somebody killed it
            os.write(self._writer, _DISMISSED)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self.dismiss()
        os.close(self._writer)
        os.waitpid(self._pid, 0)


def _wait(reader: int, clean_up: Callable[[], None]) -> None:
    # Away from our terminal and process group, whose signals are not for it.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    # Whoever reads our output waits until all copies of it are closed.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.chdir("/")
    if os.read(reader, len(_DISMISSED)) != _DISMISSED:
        clean_up()
