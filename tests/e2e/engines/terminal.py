"""A terminal with a person in front: types when it is time, reads what is shown, changes the window's size."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_PATIENCE_S = 60.0


@dataclass(slots=True)
class Terminal:
    """A program in a terminal of its own. Use `terminal` to get one."""

    process: subprocess.Popen[bytes]
    _master: int
    _slave: int
    _shown: bytes = field(default=b"")

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Read until the screen has shown ``text``; returns what it showed up to there, which is then forgotten."""
        wanted = text.encode()
        end = time.monotonic() + _PATIENCE_S
        while wanted not in self._shown:
            assert self._read(end), f"{text!r} was not shown, but {self._shown!r}"
        seen, _, self._shown = self._shown.partition(wanted)
        return (seen + wanted).decode(errors="replace")

    def wait(self) -> int:
        """Wait for the program's end; returns its exit status."""
        end = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            self._read(min(end, time.monotonic() + 0.05))
            assert time.monotonic() < end, f"the program goes on; it showed {self._shown!r}"
        return self.process.returncode

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the kernel tells the program."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def settings(self) -> list[object]:
        """The terminal's modes, as tcgetattr(3) has them."""
        return list(termios.tcgetattr(self._slave))

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
        if ready:
            self._shown += os.read(self._master, 65536)
        return bool(ready)


@contextlib.contextmanager
def terminal(argv: Sequence[str], rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
    """A terminal in which ``argv`` runs, killed with all of its process group at the end of the block."""
    master, slave = pty.openpty()
    process = None
    try:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Safe: one call to the kernel.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,  # noqa: PLW1509
        )
        yield Terminal(process, master, slave)
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_PATIENCE_S)
        os.close(master)
        os.close(slave)
