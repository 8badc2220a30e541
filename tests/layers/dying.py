"""Runs a function in a process that is killed at its N-th change to the disk, or looked at before each of them.

The system calls that change files are intercepted (seccomp(2) with ptrace(2)), whoever makes them and on whichever
thread; the process dies before the N-th of them happens. Calls on what lies outside of the given directory do not
count. Linux on x86-64 and arm64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

_NUMBERS = {
    # name: (x86-64, arm64), None where the call does not exist there
    "write": (1, 64),
    "pwrite64": (18, 68),
    "writev": (20, 66),
    "pwritev": (296, 70),
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "link": (86, None),
    "linkat": (265, 37),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "utimensat": (280, 88),
    "copy_file_range": (326, 285),
    "sendfile": (40, 71),
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
}
_ARM = platform.machine() == "aarch64"
_NAMES = {numbers[_ARM]: name for name, numbers in _NUMBERS.items() if numbers[_ARM] is not None}
# Their first argument is a file that is open already, which may be a pipe or a log.
_ON_DESCRIPTOR = frozenset({"write", "pwrite64", "writev", "pwritev", "ftruncate", "fallocate", "fchmod", "fchown"})

_PTRACE_TRACEME, _PTRACE_CONT, _PTRACE_SETOPTIONS, _PTRACE_GET_SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_OPTIONS = 0x80 | 0x8 | 0x2 | 0x4 | 0x100000  # seccomp stops; clone, fork and vfork; all die with us
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_SECCOMP_SET_MODE_FILTER, _RET_TRACE, _RET_ALLOW = 1, 0x7FF00000, 0x7FFF0000
_SYS_SECCOMP = 277 if _ARM else 317

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long


Operation = Callable[[Callable[[], None]], None]
"""What is run. It is given another function to call when its changes begin to count."""


def run_and_kill(function: Operation, root: str, at: int) -> tuple[bool, str]:
    """Run ``function`` in a child process, and kill it before its change number ``at`` below ``root`` (from 1).

    File system servers that it started die with it, as when the machine does.

    Returns:
        Whether it was killed, or came to its end first; and the system call it was killed at.

    Raises:
        AssertionError: the function failed by itself.
    """
    killed = ""

    def watch(count: int, name: str) -> bool:
        nonlocal killed
        if count == at:
            killed = name
        return count == at

    run_and_watch(function, root, watch)
    return bool(killed), killed


def run_and_watch(function: Operation, root: str, watch: Callable[[int, str], bool]) -> None:
    """Run ``function`` in a child process that stops before each change below ``root`` until ``watch`` has returned.

    Args:
        function: see :data:`Operation`.
        root: a directory.
        watch: given the number of the change, from 1, and the system call; true to kill the process.

    Raises:
        AssertionError: the function failed by itself.
    """
    child = os.fork()
    if child == 0:
        _be_traced(function)
    _, status = os.waitpid(child, _WALL)
    assert os.WIFSTOPPED(status)
    _ptrace(_PTRACE_SETOPTIONS, child, _OPTIONS)
    _ptrace(_PTRACE_CONT, child, 0)
    count = 0
    killed = False
    exit_status: int | None = None
    seen = {child}
    while True:
        try:
            pid, status = os.waitpid(-1, _WALL)
        except ChildProcessError:
            break
        seen.add(pid)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            seen.discard(pid)
            if pid == child:
                exit_status = status
        if killed or exit_status is not None:
            _kill(seen)
        if pid not in seen or killed:
            continue
        deliver = 0
        if status >> 8 == signal.SIGTRAP | _EVENT_SECCOMP << 8:
            name = _change(pid, root)
            count += bool(name)
            if name and watch(count, name):
                killed = True
                _kill(seen)
                continue
        elif status >> 16 == 0 and os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
        _ptrace(_PTRACE_CONT, pid, deliver, missing_ok=True)
    if not killed:
        assert exit_status == 0, f"the operation itself failed (status {exit_status})"


def _kill(pids: set[int]) -> None:
    # All at once: a process that waits for a file system's answer dies only with the server.
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _be_traced(function: Operation) -> None:
    """In the child: does not return."""
    try:
        _ptrace(_PTRACE_TRACEME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        function(_intercept)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _intercept() -> None:
    load = struct.pack("HBBI", 0x20, 0, 0, 0)  # the call's number
    tests = [struct.pack("HBBI", 0x15, len(_NAMES) - i, 0, number) for i, number in enumerate(_NAMES)]
    allow = struct.pack("HBBI", 0x06, 0, 0, _RET_ALLOW)
    trace = struct.pack("HBBI", 0x06, 0, 0, _RET_TRACE)
    program = b"".join([load, *tests, allow, trace])
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if _libc.syscall(_SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, 0, header):
        raise OSError(ctypes.get_errno(), "seccomp")


def _change(pid: int, root: str) -> str:
    """The name of the call that a stopped thread is about to make, if it changes something; otherwise empty."""
    info = ctypes.create_string_buffer(96)
    if _libc.ptrace(_PTRACE_GET_SYSCALL_INFO, pid, ctypes.c_void_p(96), info) < 0:
        return ""
    number, *arguments = struct.unpack_from("7Q", info.raw, 24)
    name = _NAMES[number]
    if name in ("open", "openat", "openat2"):
        if name == "openat2":
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                memory.seek(arguments[2])
                flags = struct.unpack("Q", memory.read(8))[0]
        else:
            flags = arguments[1] if name == "open" else arguments[2]
        if not flags & (os.O_CREAT | os.O_TRUNC):
            return ""
    elif name in _ON_DESCRIPTOR:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{ctypes.c_int(arguments[0] & 0xFFFFFFFF).value}")
        except OSError:
            return ""
        if not target.startswith(root):
            return ""
    return name


def _ptrace(request: int, pid: int, data: int, missing_ok: bool = False) -> None:
    if _libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(0), ctypes.c_void_p(data)) < 0:
        number = ctypes.get_errno()
        if not (missing_ok and number == 3):  # ESRCH: it died meanwhile
            raise OSError(number, os.strerror(number))
