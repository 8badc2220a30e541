"""Runs the benchmark in mount and process namespaces of its own, so that it cannot leave anything behind.

The inner process is the first one of its process namespace: when it ends, in whatever way, the kernel ends every
server started in it, and with the last process go the mounts. The outer one removes the files.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from bench_parts.errors import BenchError
from bench_parts.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    MS_PRIVATE,
    MS_REC,
    die_with_parent,
    mount,
    own_processes_again,
    unshare,
)

_ADVICE = "in a container, start it with the right to mount (docker: --privileged)"
# What engines write to although they are told other directories: ours alone, and gone at the end.
_WRITTEN = {
    "dockerd": ("/run/docker",),
    "podman": ("/run/containers", "/run/libpod", "/var/lib/containers", "/dev/shm"),
}
_ASK_AGAIN_S = 15  # longer than it takes to clean up
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_isolated(main: Callable[[], int], *, debug: bool = False) -> int:
    """Run ``main`` in a process of its own namespaces, and return what it returned.

    What ``main`` raises is told in one line, or with ``debug`` as a traceback. A signal that would end this process
    becomes a KeyboardInterrupt in ``main``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        unshare(CLONE_NEWPID)  # of the processes that this one starts
    except OSError as error:
        raise BenchError(f"cannot make namespaces ({error.strerror}); {_ADVICE}") from error
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    pid = os.fork()
    if pid == 0:
        _inner(main, debug)
    own_processes_again()

    def forward(number: int, frame: FrameType | None) -> None:
        try:
            os.kill(pid, signal.SIGINT)
        except ProcessLookupError:
            return
        signal.alarm(_ASK_AGAIN_S)  # the exception may be lost, as in a destructor

    for number in (*_ENDING, signal.SIGALRM):
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    for number in _ENDING:
        signal.signal(number, signal.default_int_handler)
    return os.waitstatus_to_exitcode(status)


def _inner(main: Callable[[], int], debug: bool) -> None:
    status = 1
    try:
        _enter()
        status = main()
    except KeyboardInterrupt:
        status = 130
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            what = f"{type(error).__name__}: {error}"
            print(f"bench: {what}; this was not foreseen, see it whole with --debug", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _enter() -> None:
    """Become the first process of the new process namespace, with mounts that nobody else sees."""
    try:
        die_with_parent()
        os.setsid()  # ^C goes to the outer process alone, which hands it on once
        unshare(CLONE_NEWNS)
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        mount("proc", "/proc", "proc")
        # The registry of mounts names processes by number, and ours are others in here.
        os.makedirs("/run/unionfs", exist_ok=True)
        mount("tmpfs", "/run/unionfs", "tmpfs")
        for program, paths in _WRITTEN.items():
            for path in paths if shutil.which(program) else ():
                os.makedirs(path, exist_ok=True)
                mount("tmpfs", path, "tmpfs")
    except OSError as error:
        raise BenchError(f"cannot mount here ({error}); {_ADVICE}") from error
    for number in _ENDING:
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
