"""System calls that Python 3.11 does not offer, with the errno as OSError."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
MNT_DETACH = 2
MS_RDONLY = 1
CLONE_NEWNS = 0x20000
MS_REC = 16384
MS_PRIVATE = 1 << 18
FALLOC_FL_KEEP_SIZE = 1

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_SYS_GETDENTS64 = 217  # x86_64
_SYS_RENAMEAT2 = 316

# One handle for the whole process; use_errno keeps the value of each thread apart.
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, path: str = "") -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


def renameat2(src: str, dst: str, flags: int = 0) -> None:
    """rename(2) with RENAME_* flags."""
    result = _libc.syscall(
        _SYS_RENAMEAT2, _AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), ctypes.c_uint(flags)
    )
    _checked(result, src)


def cached_pages(fd: int) -> int:
    """How many pages of the file are in the page cache: mincore(2)."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    pages = bytearray(-(-size // mmap.PAGESIZE))
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as mapping:
        # Private, so that it may be mapped for writing, which ctypes wants; nothing is written.
        start = ctypes.c_char.from_buffer(mapping)
        vector = (ctypes.c_ubyte * len(pages)).from_buffer(pages)
        _checked(_libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), vector))
        del start
    return sum(page & 1 for page in pages)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    args = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype))
    _checked(_libc.mount(*args, ctypes.c_ulong(flags), os.fsencode(data)), target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def unshare_mounts() -> None:
    """Give the calling process its own mount namespace, from which nothing propagates back."""
    _checked(_libc.unshare(ctypes.c_int(CLONE_NEWNS)))
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _checked(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


@dataclass(frozen=True, slots=True)
class Dirent:
    """One record of getdents64(2)."""

    name: str
    ino: int
    offset: int
    d_type: int


def getdents(fd: int, size: int = 32768) -> list[Dirent]:
    """One getdents64(2) call: the next records of an open directory, empty at its end."""
    buffer = ctypes.create_string_buffer(size)
    used = _checked(_libc.syscall(_SYS_GETDENTS64, fd, buffer, ctypes.c_size_t(size)))
    records: list[Dirent] = []
    at = 0
    while at < used:
        ino, offset, length, d_type = struct.unpack_from("<QqHB", buffer, at)
        name = buffer.raw[at + 19 : at + length].split(b"\0", 1)[0]
        records.append(Dirent(os.fsdecode(name), ino, offset, d_type))
        at += length
    return records


def list_directory(path: str, size: int = 32768) -> list[Dirent]:
    """All records of a directory in the order of the file system, ``.`` and ``..`` included."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found: list[Dirent] = []
        while more := getdents(fd, size):
            found += more
        return found
    finally:
        os.close(fd)


def idmapped_clone(path: str, user_namespace: int) -> int:
    """A descriptor of a detached clone of the mount at ``path``, with ids mapped as in ``user_namespace``."""
    raw = os.fsencode(path)
    clone = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    fd = _checked(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, raw, clone), path)
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    try:
        arguments = (ctypes.c_uint(_AT_EMPTY_PATH), attributes, ctypes.c_size_t(len(attributes)))
        _checked(_libc.syscall(_SYS_MOUNT_SETATTR, fd, b"", *arguments), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def move_mount(fd: int, target: str) -> None:
    """Attach a detached mount at ``target``."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    _checked(_libc.syscall(_SYS_MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), flags), target)
