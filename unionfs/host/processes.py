"""Processes by number and start time, as a number alone may belong to another process by now; what they may do and
inherit, and what ``ps`` shows for this one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from unionfs.host.syscalls import program_break, set_memory_map, set_thread_name

CAP_SYS_ADMIN: Final = 21  # linux/capability.h
CAP_SYS_NICE: Final = 23

_INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # linux/nsfs.h: USER_NS_INIT_INO
_SIGKILL: Final = 1 << 8  # in a mask of signals

SHED_LIMITS: Final = (
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_CPU,
    resource.RLIMIT_NPROC,
)
"""Limits that a server would hit on behalf of others. Not the size of a core file, nor of the stack."""

_OPEN_FILES: Final = 1 << 20  # fs.nr_open of most systems

_MM_MAP: Final = struct.Struct("=11QQII")  # struct prctl_mm_map of linux/prctl.h
_KEEP_EXE: Final = 0xFFFF_FFFF


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


def set_title(name: str, argv: Sequence[str], environment: Mapping[bytes, bytes]) -> bool:
    """Let /proc/PID/comm, cmdline and environ show these.

    The arguments are put into memory of their own, and the kernel is told where they are (prctl(2), PR_SET_MM_MAP).
    Returns False when it does not do that, which takes CONFIG_CHECKPOINT_RESTORE; they stay as they were then.
    """
    set_thread_name(os.fsencode(name))
    arguments = b"".join(os.fsencode(word) + b"\0" for word in argv)
    variables = b"".join(b"%s=%s\0" % variable for variable in environment.items())
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the first of them is number 3 of proc(5)
    except OSError:
        return False
    start_code, end_code, start_stack = (int(fields[i - 3]) for i in (26, 27, 28))
    start_data, end_data, start_brk = (int(fields[i - 3]) for i in (45, 46, 47))
    # Private, because the kernel shows nothing but anonymous memory.
    memory = mmap.mmap(-1, len(arguments) + len(variables) + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(arguments + variables)
    view = (ctypes.c_char * 1).from_buffer(memory)
    start = ctypes.addressof(view)
    middle, end = start + len(arguments), start + len(arguments) + len(variables)
    numbers = (
        start_code,
        end_code,
        start_data,
        end_data,
        start_brk,
        program_break(),
        start_stack,
        start,
        middle,
        middle,
        end,
    )
    packed = _MM_MAP.pack(*numbers, 0, 0, _KEEP_EXE)
    try:
        set_memory_map(packed)
    except OSError:
        return False
    _shown[:] = [memory]
    return True


_shown: list[mmap.mmap] = []
"""What the kernel reads from, so it stays."""
