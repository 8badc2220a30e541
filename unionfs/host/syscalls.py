"""System calls that the standard library does not offer, with its conventions: OSError, bytes paths."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final, NamedTuple

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

# linux/openat2.h
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
_CONFINED: Final = RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH

# linux/mount.h
_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOUNT_ATTR_RDONLY: Final = 0x1
_MOUNT_ATTR_NOATIME: Final = 0x10
_MOUNT_ATTR__ATIME: Final = 0x70

# These calls were added after Linux unified its numbers, so they are the same on every architecture.
_NR_OPEN_TREE: Final = 428
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_OPENAT2: Final = 437
_NR_MOUNT_SETATTR: Final = 442

_FICLONE: Final = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_FS_IOC_GETFSUUID: Final = 0x80111500  # linux/fs.h: _IOR(0x15, 0, struct fsuuid2), Linux 6.9

_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h

# linux/stat.h: Linux 5.8
_STATX_MNT_ID: Final = 0x1000
_STATX_MNT_ID_AT: Final = 144  # of stx_mnt_id in struct statx
_STATX_SIZE: Final = 256
_STATX_ATTRIBUTES_AT: Final = 8  # of stx_attributes in struct statx
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_STATX_DONT_SYNC: Final = 0x4000

_MAX_HANDLE_BYTES: Final = 128  # linux/fcntl.h: MAX_HANDLE_SZ

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def check(result: int, what: bytes = b"") -> int:
    """The result of a C call, or the OSError that its errno says; ``what`` is the name it was about."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), os.fsdecode(what) or None)
    return result


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open ``path`` relative to ``dir_fd`` under the rules of ``resolve`` (``RESOLVE_*``); returns a descriptor.

    Raises OSError: ELOOP for a refused symbolic link, EXDEV for a step out of ``dir_fd``, ENOSYS or EPERM where the
    system call is missing or filtered.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, resolve)
    while True:
        fd = _syscall(_NR_OPENAT2, ctypes.c_int(dir_fd), ctypes.c_char_p(path), how, ctypes.c_size_t(24))
        # EAGAIN: a rename somewhere raced with a "..", the kernel asks to try again.
        if fd >= 0 or ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            return check(fd, path)


def open_beneath(dir_fd: int, path: bytes, flags: int) -> int:
    """Open ``path`` below ``dir_fd`` without following any link; returns a descriptor.

    openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS: raises ELOOP at a symbolic link in the path and
    EXDEV if the path would leave the directory.
    """
    return openat2(dir_fd, path, flags, _CONFINED)


def has_openat2() -> bool:
    """Whether the kernel has openat2(2), Linux 5.6, and no filter refuses it."""
    try:
        os.close(openat2(AT_FDCWD, b"/", os.O_PATH, 0))
    except OSError:
        return False
    return True


def clone_mount_read_only(path: str) -> int:
    """A descriptor of ``path`` in a private, detached, read-only and noatime copy of its mount.

    Needs CAP_SYS_ADMIN over the mount namespace; raises OSError(EPERM) without. Mounts below ``path`` are not
    part of the copy, as in the kernel's overlayfs.
    """
    raw = os.fsencode(path)
    fd = check(
        _syscall(
            _NR_OPEN_TREE,
            ctypes.c_int(AT_FDCWD),
            ctypes.c_char_p(raw),
            ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
        ),
        raw,
    )
    try:
        attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOATIME, _MOUNT_ATTR__ATIME, 0, 0)
        check(
            _syscall(
                _NR_MOUNT_SETATTR,
                ctypes.c_int(fd),
                ctypes.c_char_p(b""),
                ctypes.c_uint(AT_EMPTY_PATH),
                attributes,
                ctypes.c_size_t(len(attributes)),
            ),
            raw,
        )
    except OSError:
        os.close(fd)
        raise
    return fd


def mount_detached(fs_type: bytes) -> int:
    """A readable descriptor of the root of a file system of the kernel's own (``fusectl``), mounted for us alone.

    Needs CAP_SYS_ADMIN over its user namespace; raises OSError(EPERM) without. It ends with the descriptor.
    """
    context = check(_syscall(_NR_FSOPEN, ctypes.c_char_p(fs_type), ctypes.c_uint(_FSOPEN_CLOEXEC)), fs_type)
    try:
        command = ctypes.c_uint(_FSCONFIG_CMD_CREATE)
        check(_syscall(_NR_FSCONFIG, ctypes.c_int(context), command, None, None, ctypes.c_int(0)), fs_type)
        mount = check(
            _syscall(_NR_FSMOUNT, ctypes.c_int(context), ctypes.c_uint(_FSMOUNT_CLOEXEC), ctypes.c_uint(0)), fs_type
        )
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def renameat2(old_dir_fd: int, old: bytes, new_dir_fd: int, new: bytes, flags: int) -> None:
    """rename(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    check(
        _libc.renameat2(
            ctypes.c_int(old_dir_fd),
            ctypes.c_char_p(old),
            ctypes.c_int(new_dir_fd),
            ctypes.c_char_p(new),
            ctypes.c_uint(flags),
        ),
        old,
    )


def in_user_namespace() -> bool:
    """Whether this process lives in a user namespace other than the host's first."""
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return file.read().split() != [b"0", b"0", b"4294967295"]
    except OSError:
        return False


class FileHandle(NamedTuple):
    """What name_to_handle_at(2) says of a file: stable while the file system keeps the inode."""

    type: int
    data: bytes


def file_handle(dir_fd: int, name: bytes) -> FileHandle:
    """The handle of ``name`` in ``dir_fd`` (``b""`` for the descriptor itself); EOPNOTSUPP where there is none."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", _MAX_HANDLE_BYTES, 0), 8 + _MAX_HANDLE_BYTES)
    mount_id = ctypes.c_int()
    check(
        _libc.name_to_handle_at(
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(name),
            buffer,
            ctypes.byref(mount_id),
            ctypes.c_int(0 if name else AT_EMPTY_PATH),
        ),
        name,
    )
    size, kind = struct.unpack_from("Ii", buffer.raw)
    return FileHandle(kind, buffer.raw[8 : 8 + size])


def open_handle(mount_fd: int, handle: FileHandle) -> int:
    """An O_PATH descriptor of the file behind ``handle``; needs CAP_DAC_READ_SEARCH; ESTALE if it is gone."""
    raw = struct.pack("Ii", len(handle.data), handle.type) + handle.data
    return check(_libc.open_by_handle_at(ctypes.c_int(mount_fd), raw, ctypes.c_int(os.O_PATH | os.O_CLOEXEC)))


def filesystem_uuid(fd: int) -> bytes:
    """The 16 bytes by which the file system of ``fd`` (not O_PATH) knows itself; zeros where it has none."""
    buffer = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    except OSError:
        return bytes(16)
    return bytes(buffer[1:17]) if buffer[0] == 16 else bytes(16)


def reflink(source_fd: int, target_fd: int) -> None:
    """Make the file ``target_fd`` share all blocks of ``source_fd``; EOPNOTSUPP, EXDEV or EINVAL where it cannot."""
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def start_writing(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin to write this range back, without waiting for it; it need not."""
    _libc.sync_file_range(
        ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
    )


def syncfs(fd: int) -> None:
    """Write back everything of the file system that ``fd`` (not O_PATH) is on."""
    check(_libc.syncfs(ctypes.c_int(fd)))


def attributes_of(dir_fd: int, name: bytes) -> int:
    """The ``STATX_ATTR_`` flags of an object (immutable, append-only and others), which is not followed if a link."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC
    check(_libc.statx(ctypes.c_int(dir_fd), name, ctypes.c_int(flags), ctypes.c_uint(0), buffer), name)
    return int(struct.unpack_from("=Q", buffer, _STATX_ATTRIBUTES_AT)[0])


def mount_id(fd: int) -> int:
    """The id, as in mountinfo, of the mount that ``fd`` was opened through; -1 where the kernel does not say."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    check(_libc.statx(ctypes.c_int(fd), b"", ctypes.c_int(AT_EMPTY_PATH), ctypes.c_uint(_STATX_MNT_ID), buffer))
    (mask,) = struct.unpack_from("=I", buffer)
    (number,) = struct.unpack_from("=Q", buffer, _STATX_MNT_ID_AT)
    return int(number) if mask & _STATX_MNT_ID else -1
