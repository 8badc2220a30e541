"""The process that runs a container, found and reached from another one.

An ordinary user's is process 1 of a PID namespace in a user namespace of its own: signals for the container, and more
processes in it, have to go in there.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from unionfs.engines.run.records import Place, Running, boot_id
from unionfs.engines.run.runtime import Runtime
from unionfs.errors import RunError
from unionfs.host.locks import wait_until_free

_GONE_S = 60.0


def words_to_enter(running: Running) -> tuple[str, ...]:
    """The beginning of a command that runs the rest of it where the container was started; none if that is here.

    Raises:
        RunError: the process cannot be found.
    """
    if running.boot == boot_id():
        return ()
    pid = _seen_from_here(running)
    return ("nsenter", f"--target={pid}", "--user", "--mount", "--pid", "--preserve-credentials", "--")


def send_signal(place: Place, name: str) -> None:
    """Send a signal to a container's process 1.

    Args:
        place: of the container.
        name: such as ``TERM``.

    Raises:
        RunError: the container does not run, or cannot be reached.
    """
    running = _running(place)
    enter = words_to_enter(running)
    Runtime(running.runtime, running.path, place.state, running.rootless, enter).kill(place.mount_id, name)


def stop(place: Place, name: str, timeout_s: float) -> None:
    """Ask a container to end, kill it when that takes too long, and wait until it has been cleaned up.

    Args:
        place: of the container.
        name: of the signal that asks.
        timeout_s: how long it may take.

    Raises:
        RunError: the container does not run, or cannot be ended.
    """
    send_signal(place, name)
    if _ended(place, timeout_s):
        return
    with suppress(RunError):  # it has ended at this moment
        send_signal(place, "KILL")
    if not _ended(place, _GONE_S):
        raise RunError(f"container {place.record().name} does not end; its runner is process {_running(place).pid}")


def kill_runner(place: Place) -> None:
    """Kill the process that runs a container elsewhere, and with it all of its PID namespace."""
    with suppress(ProcessLookupError):
        os.kill(_seen_from_here(_running(place)), signal.SIGKILL)
    _ended(place, _GONE_S)


def _running(place: Place) -> Running:
    running = place.running()
    if running is None or not place.is_running():
        raise RunError(f"container {place.record().name} is not running; start it: unionfs container start")
    return running


def _ended(place: Place, timeout_s: float) -> bool:
    try:
        return wait_until_free(place.lock, timeout_s)
    except FileNotFoundError:
        return True  # it was to be removed when it ends


def _seen_from_here(running: Running) -> int:
    """The number of the process here. Source: proc(5), ``NSpid``."""
    boot, _, namespace = running.boot.partition(" ")
    if boot == boot_id().partition(" ")[0]:
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError, StopIteration):
                if os.readlink(f"/proc/{name}/ns/pid") != namespace:
                    continue
                with open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as lines:
                    numbers = next(line for line in lines if line.startswith("NSpid:")).split()
                if int(numbers[-1]) == running.pid:
                    return int(name)
    raise RunError("the process that runs the container cannot be seen from here; use the user who started it, or root")
