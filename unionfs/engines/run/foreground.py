"""Running a container in the foreground: its input, output, terminal and signals are ours."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
    runtime = ready.runtime
    place = ready.place
    command = runtime.run_command(ready.mount_id, place.path, place.log, place.pid_file)
    with terminal_restored(), _blocked(_FORWARDED | {signal.SIGCHLD}) as before:
        process = subprocess.Popen(
            command,
            stdin=None if ready.interactive or ready.terminal else subprocess.DEVNULL,
            # Safe: no thread of ours is running.
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),  # noqa: PLW1509
        )
        asked = 0
        while process.poll() is None:
            got = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
            if got.si_signo == signal.SIGCHLD:
                continue
            number = signal.Signals(got.si_signo)
            if number == signal.SIGWINCH and ready.terminal:
                pass_size_on(place.pid_file)
                continue
            asked += number in _ENDING
            if asked >= _PATIENCE:
                runtime.kill(ready.mount_id, "KILL")
            elif got.si_code != _SI_KERNEL:
                # The runtime passes it on to the container. What the terminal sent, it has got itself.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        status = process.returncode
    if status != 0 and (problem := failure(place.log)):
        raise RunError(f"{runtime.name} could not run container {ready.name}: {problem}")
    return status if status >= 0 else 128 - status


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[set[signal.Signals]]:
    """Signals wait until they are asked for; those that nobody asked for are dropped at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        while signal.sigtimedwait(signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
