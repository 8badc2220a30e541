"""What /proc says of a process: whether it is being killed, and what it may do."""

from __future__ import annotations

import os
from typing import Final

CAP_SYS_ADMIN: Final = 21  # linux/capability.h
CAP_SYS_NICE: Final = 23

_INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # linux/nsfs.h: USER_NS_INIT_INO
_SIGKILL: Final = 1 << 8  # in a mask of signals


def is_being_killed(pid: int) -> bool:
    """Whether the thread ``pid`` has been killed and only waits for a system call to end, or has ended.

    The kernel gives each thread of a process that a signal ends a SIGKILL of its own. False for a thread that this
    process cannot see, as 0 stands for one of another PID namespace.
    """
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"SigPnd:"):
                    return bool(int(line.split()[1], 16) & _SIGKILL)
    except OSError:  # it has ended, or /proc does not show the processes of others (hidepid), or is not that of ours
        return not _exists(pid)
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def has_capability(number: int, process: int | str = "self") -> bool:
    """Whether a process has a capability that counts for the machine, and not only in a user namespace.

    False for one that this process cannot see.
    """
    try:
        with open(f"/proc/{process}/status", "rb") as status:
            effective = next(int(line.split()[1], 16) for line in status if line.startswith(b"CapEff:"))
        if not effective >> number & 1:
            return False
        return os.stat(f"/proc/{process}/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    except (OSError, StopIteration, ValueError):
        return False
