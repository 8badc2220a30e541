"""The processes of this namespace: which there are, whether they run, and how much memory they hold."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator

_KILL_WAIT_S = 5.0


def running() -> set[int]:
    """All processes that have not ended."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and is_running(int(name))}


def is_running(pid: int) -> bool:
    """Whether the process still runs; one that ended is reaped if that is up to us."""
    with contextlib.suppress(OSError):
        os.waitpid(pid, os.WNOHANG)  # a daemon is a child of the first process of the namespace, which we are
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def wait_for_end(pids: Collection[int], timeout_s: float) -> bool:
    """Wait until all of them have ended; what is left then is killed, and the answer is False."""
    if wait_until(lambda: not any(is_running(pid) for pid in pids), timeout_s):
        return True
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), _KILL_WAIT_S)
    return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for ``condition``; False when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def pss_bytes(pids: Collection[int]) -> int:
    """The memory of some processes together, what is shared divided among those that share it (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@contextlib.contextmanager
def computing(count: int) -> Iterator[None]:
    """Have ``count`` further processes compute meanwhile, each without a pause and at the usual priority."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
