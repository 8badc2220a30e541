"""Running a container in the foreground: its input, output, terminal and signals are ours."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unionfs.engines.run.console import pass_size_on, terminal_restored
from unionfs.engines.run.containers import Ready
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
_PATIENCE = 3
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

    def told(number: signal.Signals, from_terminal: bool) -> None:
        nonlocal asked
        asked += number in _ENDING
        if number == signal.SIGWINCH and ready.terminal:
            pass_size_on(place.pid_file)
        elif asked >= _PATIENCE:
            runtime.kill(ready.mount_id, "KILL")
        elif not from_terminal:
            # The runtime passes it on to the container.
            process.send_signal(number)

    with terminal_restored(), supervise() as supervisor:
        process = subprocess.Popen(
            command,
            stdin=None if ready.interactive or ready.terminal else subprocess.DEVNULL,
            # Safe: no thread of ours is running.
            preexec_fn=supervisor.restore_signals,  # noqa: PLW1509
        )
        status = supervisor.wait(process, told)
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

    def wait(self, process: subprocess.Popen[bytes], told: Callable[[signal.Signals, bool], None]) -> int:
        """The exit status of a child, 128 + N after signal N.

        Args:
            process: the child, in our process group.
            told: called with each signal that we get, and whether it came from the terminal: then the child has got
                it too.
        """
        while process.poll() is None:
            got = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
            if got.si_signo == signal.SIGCHLD:
                continue
            told(signal.Signals(got.si_signo), got.si_code == _SI_KERNEL)
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
