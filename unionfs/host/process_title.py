"""What ``ps`` shows for this process: the command line that the mount was asked for with."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h
_PR_SET_NAME: Final = 15
_PR_SET_MM: Final = 35
_PR_SET_MM_MAP: Final = 14
_MM_MAP: Final = struct.Struct("=11QQII")  # struct prctl_mm_map
_KEEP_EXE: Final = 0xFFFF_FFFF


def set_title(name: str, argv: Sequence[str], environment: Mapping[bytes, bytes]) -> bool:
    """Let /proc/PID/comm, cmdline and environ show these.

    The arguments are put into memory of their own, and the kernel is told where they are (prctl(2), PR_SET_MM_MAP).
    Returns False when it does not do that, which takes CONFIG_CHECKPOINT_RESTORE; they stay as they were then.
    """
    _libc.prctl(_PR_SET_NAME, os.fsencode(name)[:15], 0, 0, 0)
    arguments = b"".join(os.fsencode(word) + b"\0" for word in argv)
    variables = b"".join(b"%s=%s\0" % variable for variable in environment.items())
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the first of them is number 3 of proc(5)
    except OSError:
        return False
    start_code, end_code, start_stack = (int(fields[i - 3]) for i in (26, 27, 28))
    start_data, end_data, start_brk = (int(fields[i - 3]) for i in (45, 46, 47))
    _libc.sbrk.restype = ctypes.c_void_p
    brk = _libc.sbrk(0)
    # Private, because the kernel shows nothing but anonymous memory.
    memory = mmap.mmap(-1, len(arguments) + len(variables) + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(arguments + variables)
    view = (ctypes.c_char * 1).from_buffer(memory)
    start = ctypes.addressof(view)
    middle, end = start + len(arguments), start + len(arguments) + len(variables)
    numbers = (start_code, end_code, start_data, end_data, start_brk, brk, start_stack, start, middle, middle, end)
    packed = _MM_MAP.pack(*numbers, 0, 0, _KEEP_EXE)
    if _libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, packed, ctypes.c_ulong(len(packed)), 0) != 0:
        return False
    _shown[:] = [memory]
    return True


_shown: list[mmap.mmap] = []
"""What the kernel reads from, so it stays."""
