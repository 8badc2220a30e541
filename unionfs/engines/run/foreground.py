"""Running a container: in the foreground its input, output, terminal and signals are ours."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from unionfs.engines.run.containers import Ready
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.process import check_command, make_process, resolve_user
from unionfs.engines.run.records import Place, Record
from unionfs.engines.run.rootfs import RootFs
from unionfs.engines.run.runner import words_to_enter
from unionfs.engines.run.runtime import Runtime, failure
from unionfs.engines.run.spec import build_process
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
_POLL_S = 0.01
_EXECUTION_S = 0.1
_REQUESTS_TO_KILL = 3
"""A person who asks that often wants it to end now: process 1 of a container ignores what it has no handler for."""


def run_in_foreground(ready: Ready, output: int | None = None, started: Callable[[], None] | None = None) -> int:
    """Run a container until its process ends; returns the process's exit status, 128 + N after signal N.

    Signals that we get are passed on; the third that asks to end kills the container.

    Args:
        ready: the container.
        output: where its output and errors go; None: to ours.
        started: called when its process runs.

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
            stdout=output,
            stderr=output,
            # Safe: no thread of ours is running.
            preexec_fn=supervisor.restore_signals,  # noqa: PLW1509
        )
        if started is not None and _has_started(process, place):
            started()
        status = supervisor.wait(process, on_signal)
    if status != 0 and (problem := failure(place.log)):
        raise RunError(f"{runtime.name} could not run container {ready.name}: {problem}")
    return status


def run_one_more(place: Place, record: Record, options: RunOptions, hostname: str) -> int:
    """Run one more process in a container that runs; returns its exit status, 128 + N after signal N.

    Of a container of an ordinary user, it is this program that goes on where the container was started.

    Args:
        place, record: of the container.
        options: of the process.
        hostname: the container's.

    Raises:
        RunError: the container does not run, or the process cannot be started.
    """
    running = place.running()
    if running is None or not place.is_running():
        raise RunError(f"container {record.name} is not running; start it with: unionfs container start {record.name}")
    if options.terminal and not os.isatty(0):
        raise RunError("-t needs a terminal as standard input; leave it out")
    if enter := words_to_enter(running):
        os.execvp(enter[0], [*enter, sys.executable, *sys.orig_argv[1:]])
    runtime = Runtime(running.runtime, running.path, place.state, running.rootless)
    with RootFs(f"/proc/{_process_1(place.pid_file)}/root") as rootfs:
        process = make_process(
            record.config, options, resolve_user(rootfs, options.user or record.config.user), hostname
        )
        check_command(rootfs, process.args[0], process.search, process.cwd, ["/dev", "/proc", "/sys"])
    window = os.get_terminal_size(0) if options.terminal else None
    described = build_process(process, options, window=window)
    with tempfile.TemporaryDirectory(dir=place.state) as directory:
        log, file = os.path.join(directory, "log"), os.path.join(directory, "process.json")
        with open(file, "w", encoding="utf-8", errors="surrogateescape") as out:
            json.dump(described, out, ensure_ascii=False)
        with _terminal_restored(), supervise() as supervisor:
            started = subprocess.Popen(
                runtime.exec_command(place.mount_id, file, log),
                stdin=None if options.interactive or options.terminal else subprocess.DEVNULL,
                # Safe: no thread of ours is running.
                preexec_fn=supervisor.restore_signals,  # noqa: PLW1509
            )

            def on_signal(number: signal.Signals, from_terminal: bool) -> None:
                if not from_terminal and number != signal.SIGWINCH:
                    started.send_signal(number)

            status = supervisor.wait(started, on_signal)
        if status != 0 and (problem := failure(log)):
            raise RunError(f"{runtime.name} could not run that in container {record.name}: {problem}")
    return status


def _process_1(pid_file: str) -> int:
    with open(pid_file, encoding="ascii") as file:
        return int(file.read())


def _has_started(process: subprocess.Popen[bytes], place: Place) -> bool:
    """Wait until the runtime has started the container's process; False when it could not."""
    while not os.path.exists(place.pid_file):
        if process.poll() is not None:
            return not failure(place.log)
        time.sleep(_POLL_S)
    # The file is there a moment before the command is executed, which may fail.
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_EXECUTION_S) == 0 or not failure(place.log)
    return True


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
        with RootFs(f"/proc/{_process_1(pid_file)}/root") as rootfs:
            console = rootfs.open_device("/dev/console", _PSEUDO_TERMINALS)
        try:
            fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
        finally:
            os.close(console)
