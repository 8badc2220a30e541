"""What ``ps`` shows for this process: the command line that the mount was asked for with."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from unionfs.host.syscalls import program_break, set_memory_map, set_thread_name

_MM_MAP: Final = struct.Struct("=11QQII")  # struct prctl_mm_map of linux/prctl.h
_KEEP_EXE: Final = 0xFFFF_FFFF


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
