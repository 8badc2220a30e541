"""What /proc says of another process."""

from __future__ import annotations

from typing import Final

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
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return False
