"""Copying one file from a lower layer to the upper one: its data with its holes, and everything else about it.

These functions know descriptors and paths only, so a worker thread can run the slow ones.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from unionfs.host import inode_flags, syscalls
from unionfs.overlay.format import FUSE_OVERLAYFS_OPAQUE, OverlayXattrs

At = tuple[int, bytes]
"""An object as the ``*at`` calls name it: by a directory descriptor and a name, or by its own and an empty one."""

_CHUNK = 2 * 1024 * 1024  # bytes per copy_file_range: small enough for the disk to write one while the next is read
_READ_CHUNK = 1024 * 1024  # bytes per read where the kernel cannot copy between the two file systems

# Errors by which a file system says that it cannot copy or clone between these two files, rather than that the copy
# went wrong.
_CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EPERM})
# Those that are about the file systems, not the files.
_NEVER = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})

# linux/fs.h
_COPIED_FLAGS = 0x08 | 0x80  # FS_SYNC_FL, FS_NOATIME_FL

# Pairs of devices between which no file can share blocks.
_no_reflinks: set[tuple[int, int]] = set()


def always() -> bool:
    """Somebody waits for the copy until it is made."""
    return True


def copy_data(
    source_fd: int,
    target_fd: int,
    size: int,
    *,
    sync: bool = False,
    overwrite: bool = False,
    is_wanted: Callable[[], bool] = always,
) -> None:
    """Give the empty file ``target_fd`` the first ``size`` bytes of ``source_fd``, sharing blocks or keeping holes.

    With ``sync`` all of it is on disk when this returns; the disk begins to write while the rest is still copied.
    With ``overwrite`` the target may be a file with data, and gets zeros for the holes of the source.
    Raises InterruptedError when ``is_wanted``, asked again and again, says no.

    Tries, cheapest first: a reflink of the whole file; copy_file_range(2) of the ranges that hold data;
    read(2) and write(2) of the same.
    """
    if size > 0:
        _copy(source_fd, target_fd, size, write_soon=sync, overwrite=overwrite, is_wanted=is_wanted)
        if sync:
            os.fsync(target_fd)


def _copy(
    source_fd: int, target_fd: int, size: int, *, write_soon: bool, overwrite: bool, is_wanted: Callable[[], bool]
) -> None:
    st = os.fstat(source_fd)
    if size == st.st_size and _reflinked(source_fd, st.st_dev, target_fd):
        return
    if overwrite or (size == st.st_size and st.st_blocks * 512 >= size <= _READ_CHUNK):  # no holes to look for
        write_soon = write_soon and overwrite
        if _copy_range(source_fd, target_fd, 0, size, write_soon=write_soon, is_wanted=is_wanted) < size:
            os.ftruncate(target_fd, size)
        return
    with suppress(OSError):  # doubles what the kernel reads ahead
        os.posix_fadvise(source_fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    offset = 0
    while offset < size:
        try:
            start = os.lseek(source_fd, offset, os.SEEK_DATA)
            end = min(os.lseek(source_fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole until the end
                break
            if error.errno != errno.EINVAL:
                raise
            start, end = offset, size  # a file system that does not tell holes
        if start >= size:
            break
        _copy_range(source_fd, target_fd, start, end, write_soon=write_soon, is_wanted=is_wanted)
        offset = end
    os.ftruncate(target_fd, size)


def _reflinked(source_fd: int, source_device: int, target_fd: int) -> bool:
    devices = source_device, os.fstat(target_fd).st_dev
    if devices in _no_reflinks:
        return False
    try:
        syscalls.reflink(source_fd, target_fd)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        if error.errno in _NEVER:  # the others can be about these two files
            _no_reflinks.add(devices)
        return False
    return True


def _copy_range(
    source_fd: int, target_fd: int, offset: int, end: int, *, write_soon: bool, is_wanted: Callable[[], bool]
) -> int:
    """Copy up to ``end``; returns how far the source reached."""
    while offset < end:
        _check(is_wanted)
        try:
            copied = os.copy_file_range(source_fd, target_fd, min(end - offset, _CHUNK), offset, offset)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break
        if copied == 0:
            # Some file systems (procfs-like, older FUSE) answer 0 for files that do have data.
            break
        if write_soon:
            syscalls.start_writing(target_fd, offset, copied)
        offset += copied
    while offset < end:
        _check(is_wanted)
        data = os.pread(source_fd, min(end - offset, _READ_CHUNK), offset)
        if not data:
            return offset  # the source is shorter than it was: the caller's ftruncate makes the rest a hole
        view = memoryview(data)
        while view:
            written = os.pwrite(target_fd, view, offset)
            view = view[written:]
            offset += written
    return offset


def _check(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))


def at_path(fd: int, name: bytes) -> bytes | int:
    """``name`` in the directory ``fd`` for calls without an ``at`` variant; without a name, ``fd`` itself.

    A descriptor is cheaper where there is one: the kernel takes longer to follow a link in /proc than to do the rest.
    """
    return b"/proc/self/fd/%d/%s" % (fd, name) if name else fd


def copy_xattrs(source: bytes | int, target: bytes | int, names: OverlayXattrs | None = None) -> None:
    """Copy all extended attributes between two objects, but overlayfs' own, if ``names`` says which these are.

    Either is a descriptor, or a path whose last component is not followed. ACLs and file capabilities are extended
    attributes too. What the target's file system does not support is left out, except for attributes that decide
    about access: those raise.
    """
    read_fd, write_fd = isinstance(source, int), isinstance(target, int)  # where there is no link not to follow
    try:
        listed = os.listxattr(source, follow_symlinks=read_fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        raise
    for text in listed:
        name = os.fsencode(text)
        if names is not None and (names.is_private(name) or name == FUSE_OVERLAYFS_OPAQUE):
            continue
        try:
            value = os.getxattr(source, name, follow_symlinks=read_fd)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                continue
            raise
        try:
            os.setxattr(target, name, value, follow_symlinks=write_fd)
        except OSError as error:
            decides_access = name.startswith((b"security.capability", b"system.posix_acl_"))
            if error.errno == errno.EOPNOTSUPP and not decides_access:
                continue
            if error.errno == errno.EPERM and name.startswith((b"trusted.", b"security.")):
                continue  # in a user namespace these cannot be set, nor could they have any effect
            raise


def copy_flags(source: At, target: At) -> None:
    """Give a file or directory the flags of ``chattr +S`` and ``+A`` that ``source`` has, as the kernel does.

    Where the file system has none, or the server may not read them, the copy goes without.
    """
    with suppress(OSError):
        flags = _change_flags(source, 0) & _COPIED_FLAGS
        if flags:
            _change_flags(target, flags)


def _change_flags(what: At, added: int) -> int:
    """Give an object further flags; returns those that it had."""
    dir_fd, name = what
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd) if name else dir_fd
    try:
        flags = inode_flags.get_flags(fd)
        if added:
            inode_flags.set_flags(fd, flags | added)
        return flags
    finally:
        if name:
            os.close(fd)


# An empty name means, in what follows, the open file or directory ``dir_fd`` itself.


def copy_attributes(dir_fd: int, name: bytes, st: os.stat_result) -> None:
    """Give the object ``name`` owner and mode of ``st``; times come last, see :func:`copy_times`."""
    copy_owner(dir_fd, name, st)
    copy_mode(dir_fd, name, st)


def copy_owner(dir_fd: int, name: bytes, st: os.stat_result) -> None:
    """Give the object ``name`` the owner of ``st``. It comes first: the kernel then clears setuid and capabilities."""
    what, at, follow = _arguments(dir_fd, name)
    now = os.stat(what, dir_fd=at, follow_symlinks=follow)
    if now.st_uid != st.st_uid or now.st_gid != st.st_gid:
        os.chown(what, st.st_uid, st.st_gid, dir_fd=at, follow_symlinks=follow)


def copy_mode(dir_fd: int, name: bytes, st: os.stat_result) -> None:
    """Give the object ``name`` the mode of ``st``, which may forbid its owner to set further attributes."""
    if not stat.S_ISLNK(st.st_mode):
        what, at, _ = _arguments(dir_fd, name)
        os.chmod(what, stat.S_IMODE(st.st_mode), dir_fd=at)


def copy_times(dir_fd: int, name: bytes, st: os.stat_result) -> None:
    """Give the object ``name`` the access and modification time of ``st``, to the nanosecond."""
    what, at, follow = _arguments(dir_fd, name)
    os.utime(what, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=at, follow_symlinks=follow)


def _arguments(dir_fd: int, name: bytes) -> tuple[bytes | int, int | None, bool]:
    """What functions of :mod:`os` take as path, ``dir_fd`` and ``follow_symlinks``."""
    return (name, dir_fd, False) if name else (dir_fd, None, True)
