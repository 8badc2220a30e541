"""Running a container in the foreground: its input, output, terminal and signals are ours."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from unionfs.engines.run.containers import Ready
from unionfs.engines.run.rootfs import RootFs
from unionfs.engines.run.runtime import failure
from unionfs.errors import RunError

_FORWARDED = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}
_ENDING = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}
_SI_KERNEL = 0x80  # asm-generic/siginfo.h: sent by the kernel, as by a terminal to its whole foreground group
_PSEUDO_TERMINALS = range(136, 144)  # linux/major.h: UNIX98_PTY_SLAVE_MAJOR
_REQUESTS_TO_KILL = 3
"""A person who asks that often wants it to end now: process 1 of a container ignores what it has no handler for."""


def run_in_foreground(ready: Ready) -> int:
    """Run a container until its process ends; returns the process's exit status, 128 + N after signal N.

    Signals that we get are passed on; the third that asks to end kills the container.

    Raises:
        RunError: the runtime could not start it.
    """
    runtime, place = ready.runtime, ready.place
    command = runtime.run_command(ready.mount_id, place.path, place.log, place.pid_file)
    asked = 0

    def on_signal(number: signal.Signals, from_terminal: bool) -> None:
        nonlocal asked
        asked += number in _ENDING
        if number == signal.SIGWINCH and ready.terminal:
            _pass_size_on(place.pid_file)
        elif asked >= _REQUESTS_TO_KILL:
            runtime.kill(ready.mount_id, "KILL")
        elif not from_terminal:
            # The runtime passes it on to the container.
            process.send_signal(number)

    with _terminal_restored(), supervise() as supervisor:
        process = subprocess.Popen(
            command,
            stdin=None if ready.interactive or ready.terminal else subprocess.DEVNULL,
            # Safe: no thread of ours is running.
            preexec_fn=supervisor.restore_signals,  # noqa: PLW1509
        )
        status = supervisor.wait(process, on_signal)
    if status != 0 and (problem := failure(place.log)):
        raise RunError(f"{runtime.name} could not run container {ready.name}: {problem}")
    return status


class Supervisor:
    """Waits for a child and for the signals that it is to get; see :func:`supervise`.

    Args:
        before: the signals that were blocked before.
    """

    def __init__(self, before: set[signal.Signals]) -> None:
        self._before = before

    def restore_signals(self) -> None:
        """To be called in the child: it gets signals as if we had not blocked them."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def wait(self, process: subprocess.Popen[bytes], on_signal: Callable[[signal.Signals, bool], None]) -> int:
        """The exit status of a child, 128 + N after signal N.

        Args:
            process: the child, in our process group.
            on_signal: called with each signal that we get, and whether it came from the terminal: then the child has
                got it too.
        """
        while process.poll() is None:
            got = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
            if got.si_signo == signal.SIGCHLD:
                continue
            on_signal(signal.Signals(got.si_signo), got.si_code == _SI_KERNEL)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode


@contextmanager
def supervise() -> Iterator[Supervisor]:
    """Signals wait until they are asked for; those that nobody asked for are dropped at the end."""
    signals = _FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield Supervisor({signal.Signals(number) for number in before})
    finally:
        while signal.sigtimedwait(signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _terminal_restored() -> Iterator[None]:
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


def _pass_size_on(pid_file: str) -> None:
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
