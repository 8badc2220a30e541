"""Runs a function as root of a user namespace: what it mounts there has none of the host's privileges."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from bench_parts.errors import BenchError, SkippedError
from bench_parts.syscalls import CLONE_NEWNS, CLONE_NEWUSER, unshare
from unionfs.errors import UnionfsError

Answer = TypeVar("Answer")

# Every id is itself in there, so that the layers need not be given to somebody else first. That makes no difference to
# what a server may do: it has no capability outside.
_IDS = 65536


def run_rootless(run: Callable[[], Answer]) -> Answer:
    """Run ``run`` in a child process as root of new user and mount namespaces; returns, or raises, what it did.

    Raises:
        SkippedError: this machine gives nobody a user namespace.
    """
    ready, tell_ready = os.pipe()
    go, tell_go = os.pipe()
    answer, tell_answer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        for fd in (ready, tell_go, answer):
            os.close(fd)
        _child(run, tell_ready, go, tell_answer)
    for fd in (tell_ready, go, tell_answer):
        os.close(fd)
    with open(ready, "rb") as started, open(tell_go, "wb") as begin, open(answer, "rb") as answered:
        try:
            if started.read():
                _map_ids(pid)
                begin.write(b"1")
                begin.close()
            data = answered.read()
        except BaseException:
            os.kill(pid, signal.SIGINT)  # it cleans up
            raise
        finally:
            os.waitpid(pid, 0)
    if not data:
        raise BenchError("what ran in the user namespace ended before its time; the reason may be in dmesg")
    value, error = pickle.loads(data)
    if error is not None:
        raise error
    found: Answer = value
    return found


def is_rootless() -> bool:
    """Whether this process is in a user namespace that has not all ids, as those of :func:`run_rootless`."""
    with open("/proc/self/uid_map", encoding="ascii") as lines:
        return sum(int(line.split()[2]) for line in lines) < 2**32 - 1


def _map_ids(pid: int) -> None:
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
            file.write(f"0 0 {_IDS}\n")


def _child(run: Callable[[], object], tell_ready: int, go: int, tell_answer: int) -> NoReturn:
    status = 1
    try:
        with open(tell_answer, "wb") as file:
            pickle.dump(_outcome(run, tell_ready, go), file)
        status = 0
    finally:  # whatever it was: the code that this process was made in is not for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _outcome(run: Callable[[], object], tell_ready: int, go: int) -> tuple[object, UnionfsError | None]:
    """What ``run`` returned, or an error that can be told to another process."""
    try:
        _enter(tell_ready, go)
        return run(), None
    except (BenchError, SkippedError) as error:
        return None, error
    except (OSError, subprocess.SubprocessError) as error:
        return None, BenchError(str(error))


def _enter(tell_ready: int, go: int) -> None:
    try:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
    except OSError as error:
        raise SkippedError(f"no user namespace can be made here ({error.strerror})") from error
    os.write(tell_ready, b"1")
    os.close(tell_ready)
    if not os.read(go, 1):
        raise BenchError("the ids of the user namespace could not be mapped")
