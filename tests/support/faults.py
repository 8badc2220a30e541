"""Has one of the system calls of the file system fail, in this process: the n-th, whatever it is.

Compiled code looks the functions of :mod:`os` up when it calls them, as Python does, so both are reached.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from unionfs.host import syscalls

_OS = [
    *("access", "chmod", "chown", "copy_file_range", "dup", "fdatasync", "fstat", "fstatvfs", "fsync"),
    *("ftruncate", "getxattr", "link", "listdir", "listxattr", "lseek", "lstat", "mkdir", "mknod", "open", "pread"),
    *("preadv", "pwrite", "readlink", "removexattr", "rename", "rmdir", "scandir", "setxattr", "stat", "statvfs"),
    *("symlink", "truncate", "unlink", "utime"),
]
_LSTAT = os.lstat
_LIBC = ["fallocate", "name_to_handle_at", "open_by_handle_at", "renameat2", "statx", "syncfs"]
# What is on the disk is not looked at by these tests, and the disk is slow.
_SYNCING = frozenset({"fsync", "fdatasync", "syncfs"})
# Not close(2), after which the descriptor is closed whatever it says, and not dup2(2), which only fails without one.

# Not rename(2), in whose place there was a name before.
_TAKES_ROOM = frozenset({"copy_file_range", "fallocate", "link", "mkdir", "mknod", "pwrite", "setxattr", "symlink"})


@dataclass
class Faults:
    """Which call is to fail, with what, and the calls there were."""

    fail_at: int = -1
    code: int = 0
    lasting: bool = False  # whether what is of the same kind fails from then on: the disk stays full
    calls: list[str] = field(default_factory=list)
    failed: str | None = None
    armed: bool = False

    @contextmanager
    def injected(self, fail_at: int, code: int, *, lasting: bool = False) -> Iterator[None]:
        """In the block, the call number ``fail_at`` fails with the errno ``code``."""
        self.fail_at, self.code, self.lasting = fail_at, code, lasting
        self.calls, self.failed, self.armed = [], None, True
        try:
            yield
        finally:
            self.armed = False

    def fails(self, name: str, args: tuple[Any, ...], dir_fd: int | None = None) -> bool:
        """Whether this call, which is counted, is to fail."""
        number = len(self.calls)
        self.calls.append(name)
        if number == self.fail_at:
            self.failed = f"{number}: {name}{args}"
            return True
        return self.lasting and self.failed is not None and self._same_kind(name, args, dir_fd)

    def _same_kind(self, name: str, args: tuple[Any, ...], dir_fd: int | None) -> bool:
        opens = name in ("open", "scandir", "dup", "openat2", "open_by_handle_at")
        if self.code == errno.EMFILE:
            return opens
        if self.code in (errno.ENOSPC, errno.EDQUOT):
            creates = name == "open" and bool(args[1] & (os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY))
            return (creates and not _exists(args[0], dir_fd)) or name in _TAKES_ROOM
        return False


def _exists(name: bytes, dir_fd: int | None) -> bool:
    try:
        return name != b"." and bool(_LSTAT(name, dir_fd=dir_fd))
    except OSError:
        return False


def _python_call(faults: Faults, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if faults.armed and faults.fails(name, args, kwargs.get("dir_fd")):
            raise OSError(faults.code, os.strerror(faults.code))
        return None if name in _SYNCING else real(*args, **kwargs)

    return call


def _c_call(faults: Faults, name: str, real: Callable[..., int]) -> Callable[..., int]:
    def call(*args: Any) -> int:
        if faults.armed and faults.fails(name, args):
            ctypes.set_errno(faults.code)
            return -1
        return 0 if name in _SYNCING else real(*args)

    return call


def install(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Put the counting of system calls in; they fail only in :meth:`Faults.injected`."""
    faults = Faults()
    for name in _OS:
        monkeypatch.setattr(os, name, _python_call(faults, name, getattr(os, name)))
    monkeypatch.setattr(fcntl, "ioctl", _python_call(faults, "ioctl", fcntl.ioctl))
    for name in _LIBC:
        monkeypatch.setattr(syscalls._libc, name, _c_call(faults, name, getattr(syscalls._libc, name)))
    # Giving a mount back takes longer than a request.
    monkeypatch.setattr(syscalls, "clone_mount_read_only", _refuse)
    monkeypatch.setattr(syscalls, "_syscall", _c_call(faults, "openat2", syscalls._syscall))
    return faults


def _refuse(path: str) -> int:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
