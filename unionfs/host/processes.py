"""Processes by number and start time: a number alone may belong to another process by now. What they inherit."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
from typing import Final

SHED_LIMITS: Final = (
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_CPU,
    resource.RLIMIT_NPROC,
)
"""Limits that a server would hit on behalf of others. Not the size of a core file, nor of the stack."""

_OPEN_FILES: Final = 1 << 20  # fs.nr_open of most systems


def process_start(pid: int) -> int | None:
    """The start time of ``pid`` in clock ticks since boot, or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may contain anything, so count from its end.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])


def open_process(pid: int, started: int) -> int | None:
    """A descriptor that tells the end of the process, whoever its parent is; None when it has ended.

    Args:
        pid: its number.
        started: what :func:`process_start` said of it.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    if process_start(pid) != started:
        os.close(pidfd)  # the number was given to another process meanwhile
        return None
    return pidfd


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Whether the process ends within a time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def shed_limits() -> None:
    """Give up the caller's limits, as far as this process may: it works for others from now on."""
    for which in SHED_LIMITS:
        _raise_limit(which, resource.RLIM_INFINITY)
    _raise_limit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def _raise_limit(which: int, wanted: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard == resource.RLIM_INFINITY or (hard >= wanted and wanted != resource.RLIM_INFINITY):
        wanted = hard
    for limit in (wanted, hard):
        try:
            resource.setrlimit(which, (limit, limit))
        except (OSError, ValueError):
            continue  # without CAP_SYS_RESOURCE the hard limit stays
        return


def file_size_limit() -> int | None:
    """How large a file may become that this process writes, in bytes; None for no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def reset_signals() -> None:
    """Let no signal be blocked, and the end of a child be told, whatever the caller had arranged."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def too_many_files(error: OSError) -> str:
    """What is to be done about EMFILE or ENFILE, for a person."""
    if error.errno == errno.ENFILE:
        return "too many files are open on this machine; raise fs.file-max (sysctl), or end programs"
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files: a process of this user may have {limit}; raise that limit (ulimit -Hn), or stack less"
