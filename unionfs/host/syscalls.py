"""System calls that the standard library does not offer, with its conventions: OSError with the path, descriptors.

The C library is loaded here and nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Any, Final, NamedTuple

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100

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

# sched.h
CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000

# sys/mount.h
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_MM: Final = 35
_PR_SET_MM_MAP: Final = 14

_FICLONE: Final = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_FS_IOC_GETFSUUID: Final = 0x80111500  # linux/fs.h: _IOR(0x15, 0, struct fsuuid2), Linux 6.9

_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h

# linux/stat.h: Linux 5.8
_STATX_MNT_ID: Final = 0x1000
_STATX_MNT_ID_AT: Final = 144  # of stx_mnt_id in struct statx
_STATX_SIZE: Final = 256
_STATX_ATTRIBUTES_AT: Final = 8  # of stx_attributes in struct statx
_AT_STATX_DONT_SYNC: Final = 0x4000

_MAX_HANDLE_BYTES: Final = 128  # linux/fcntl.h: MAX_HANDLE_SZ

# struct statfs begins with f_type, a long on every Linux architecture that has Python; the rest differs.
_STATFS_BYTES: Final = 256

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_libc.sbrk.restype = ctypes.c_void_p
# ctypes finds a function at its first use, under a lock of the dynamic linker's. A forked process of many threads,
# such as the one that unmounts, may find that lock held for ever.
_ = (_libc.umount2, _libc.syncfs)


def check(result: int, what: bytes = b"") -> int:
    """The result of a C call, or the OSError that its errno says; ``what`` is the name it was about."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), os.fsdecode(what) or None)
    return result


def system_call(number: int, *arguments: Any, about: bytes = b"") -> int:
    """syscall(2), for what the C library has no function of; ``about`` is the name for the error.

    Args:
        number: of the call.
        arguments: what ctypes can pass; a number of more than 32 bits as ``ctypes.c_size_t``.
        about: what the error names.

    Raises:
        OSError: what the kernel says.
    """
    return check(_libc.syscall(ctypes.c_long(number), *arguments), about)


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


def mount(source: str, target: str, fs_type: bytes, flags: int, data: bytes) -> None:
    """mount(2); ``data`` is the text of the file system's own options, and ``flags`` the ``MS_`` of sys/mount.h."""
    at = os.fsencode(target)
    check(_libc.mount(os.fsencode(source), at, fs_type, ctypes.c_ulong(flags), data), at)


def umount2(target: str, flags: int) -> None:
    """umount2(2) with ``MNT_DETACH`` and ``UMOUNT_NOFOLLOW``."""
    at = os.fsencode(target)
    check(_libc.umount2(at, ctypes.c_int(flags)), at)


def unshare(flags: int) -> None:
    """unshare(2): give this thread what it shared with others until now (``CLONE_``)."""
    check(_libc.unshare(ctypes.c_int(flags)))


def setns(fd: int, kind: int) -> None:
    """setns(2): move this thread into the namespace of ``fd``, which is one of ``kind`` (``CLONE_NEW``)."""
    check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)))


def end_with_parent(signal_number: int) -> None:
    """Have this process sent ``signal_number``, 0 for none, when the thread that forked it ends (PR_SET_PDEATHSIG)."""
    check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), *[ctypes.c_ulong(0)] * 3))


def set_thread_name(name: bytes) -> None:
    """What /proc/PID/comm shows of this thread; the kernel keeps 15 bytes."""
    check(_libc.prctl(_PR_SET_NAME, name[:15], *[ctypes.c_ulong(0)] * 3))


def set_memory_map(prctl_mm_map: bytes) -> None:
    """Tell the kernel where the parts of this process' memory are (PR_SET_MM_MAP): a struct prctl_mm_map.

    Raises:
        OSError: a kernel without CONFIG_CHECKPOINT_RESTORE, or numbers that cannot be.
    """
    size = ctypes.c_ulong(len(prctl_mm_map))
    check(_libc.prctl(_PR_SET_MM, ctypes.c_ulong(_PR_SET_MM_MAP), prctl_mm_map, size, ctypes.c_ulong(0)))


def program_break() -> int:
    """Where the heap of this process ends (sbrk(2))."""
    return int(_libc.sbrk(ctypes.c_long(0)))


def fs_type(path: str) -> int:
    """``f_type`` of statfs(2): the type of the file system that ``path`` is on, see :mod:`unionfs.host.fs_magic`."""
    raw, buffer = os.fsencode(path), ctypes.create_string_buffer(_STATFS_BYTES)
    check(_libc.statfs(raw, buffer), raw)
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def quotactl(command: int, device: str, number: int, data: bytes) -> bytes:
    """quotactl(2) for the id ``number`` on a block device; returns ``data`` as the kernel left it."""
    raw, buffer = os.fsencode(device), ctypes.create_string_buffer(data, len(data))
    check(_libc.quotactl(ctypes.c_int(command), raw, ctypes.c_int(number), buffer), raw)
    return buffer.raw


def directory_entries(fd: int, size: int) -> bytes:
    """What one getdents64(2) says: structs linux_dirent64, ``size`` bytes at most; empty at the end."""
    buffer = ctypes.create_string_buffer(size)
    filled = check(_libc.getdents64(ctypes.c_int(fd), buffer, ctypes.c_size_t(size)))
    return buffer.raw[:filled]  # not in one expression: .raw is a copy of what is there when it is asked for


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with all its modes; may take long."""
    check(_libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length)))


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


def statx(dir_fd: int, path: bytes, flags: int, mask: int) -> bytes:
    """statx(2): the struct statx of ``path``, with what ``mask`` asks for (``STATX_``); ``flags`` are ``AT_``."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    check(_libc.statx(ctypes.c_int(dir_fd), path, ctypes.c_int(flags), ctypes.c_uint(mask), buffer), path)
    return buffer.raw


def attributes_of(dir_fd: int, name: bytes) -> int:
    """The ``STATX_ATTR_`` flags of an object (immutable, append-only and others), which is not followed if a link."""
    raw = statx(dir_fd, name, AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC, 0)
    return int(struct.unpack_from("=Q", raw, _STATX_ATTRIBUTES_AT)[0])


def mount_id(fd: int) -> int:
    """The id, as in mountinfo, of the mount that ``fd`` was opened through; -1 where the kernel does not say."""
    raw = statx(fd, b"", AT_EMPTY_PATH, _STATX_MNT_ID)
    (mask,) = struct.unpack_from("=I", raw)
    (number,) = struct.unpack_from("=Q", raw, _STATX_MNT_ID_AT)
    return int(number) if mask & _STATX_MNT_ID else -1
