"""The terminal of a container, which the runtime connects with ours: its settings and its size."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.engines.run.rootfs import RootFs

_PSEUDO_TERMINALS = range(136, 144)  # linux/major.h: UNIX98_PTY_SLAVE_MAJOR


@contextmanager
def terminal_restored() -> Iterator[None]:
    """Our terminal's settings are afterwards what they were, even if the runtime was killed."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        # From the background, this would stop us.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def pass_size_on(pid_file: str) -> None:
    """Give the container's terminal the size of ours.

    runc does so by itself; crun (1.8) only at the start. Nothing is done while there is no container.

    Args:
        pid_file: with the number of the container's process 1.
    """
    with suppress(OSError, ValueError):
        size = os.get_terminal_size(0)
        with open(pid_file, encoding="ascii") as file:
            pid = int(file.read())
        with RootFs(f"/proc/{pid}/root") as rootfs:
            console = rootfs.open_device("/dev/console", _PSEUDO_TERMINALS)
        try:
            fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
        finally:
            os.close(console)
