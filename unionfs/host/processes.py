"""Processes by number and start time: a number alone may belong to another process by now."""

from __future__ import annotations

import errno
import os
import select


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
