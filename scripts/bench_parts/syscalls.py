"""System calls of the benchmark that Python 3.11 does not offer, with the errno as OSError."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
from typing import Final

MNT_DETACH: Final = 2
MS_REC: Final = 1 << 14
MS_PRIVATE: Final = 1 << 18
CLONE_NEWNS: Final = 0x20000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWUSER: Final = 0x10000000
_PR_SET_PDEATHSIG: Final = 1
_CPUCLOCK_SCHED: Final = 2
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_TOPDIR_FL: Final = 0x00020000

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, path: str = "") -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    names = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype))
    _checked(_libc.mount(*names, ctypes.c_ulong(flags), os.fsencode(data)), target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def unmount_below(directory: str) -> None:
    """Detach every mount in a directory, and on it."""
    inside = os.path.realpath(directory)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split(" ")[4] for line in table]
    for point in reversed(points):
        if point == inside or point.startswith(f"{inside}/"):
            umount2(point, MNT_DETACH)


def spread_subdirectories(directory: str) -> None:
    """Have each new directory in ``directory`` placed somewhere else on the disk, where the file system can.

    ext4 and ext2 put what is made in a directory near it, except below the root and below those with this attribute
    (``chattr +T``; ioctl_iflags(2)).
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)), sys.byteorder)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, (flags | _FS_TOPDIR_FL).to_bytes(8, sys.byteorder))
    except OSError:
        pass  # another file system
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(ctypes.c_int(flags)))


def own_processes_again() -> None:
    """Take back ``unshare(CLONE_NEWPID)`` for the processes, and threads, that are started from now on."""
    fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(CLONE_NEWPID)))
    finally:
        os.close(fd)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0))


def cpu_ns(pid: int) -> int:
    """User and system time that all threads of a process have used, those that ended too; 0 when it is gone.

    The same as utime + stime in /proc/PID/stat, to the nanosecond instead of the clock tick.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return 0
