"""File flags: who may still do what with immutable and append-only files, and the ioctls of lsattr(1) and chattr(1).

A lower object has the flags on disk. Of an upper one they are in an attribute, as the kernel's overlayfs keeps them
(``overlay.protattr``): on the object itself they would keep us from renaming its directory, or from syncing a copy.
So nothing but these rules holds them. They are those of the kernel's VFS: may_open(), may_delete(), vfs_link(),
notify_change() and xattr_permission().
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from typing import Final

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host.syscalls import attributes_of
from unionfs.overlay.rules import read_xattr

IMMUTABLE: Final = 0x10  # linux/fs.h: FS_IMMUTABLE_FL, and linux/stat.h: STATX_ATTR_IMMUTABLE
APPEND: Final = 0x20  # FS_APPEND_FL, STATX_ATTR_APPEND

# linux/fs.h. The kernel translates these on its side of FUSE to its own file attributes.
_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_GETVERSION: Final = 0x80087601
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_KNOWN: Final = frozenset({_GETFLAGS, _SETFLAGS, _GETVERSION, _FSGETXATTR, _FSSETXATTR})
_PROJECT_INHERIT: Final = 0x20000000
_XFLAG_PROJECT_INHERIT: Final = 0x200

_LETTERS: Final = ((APPEND, b"a"), (IMMUTABLE, b"i"))  # in the order in which the kernel writes them


def _eperm(inode: Inode) -> PermissionError:
    return PermissionError(errno.EPERM, os.strerror(errno.EPERM), os.fsdecode(inode.path()))


class Protection:
    """The flags of the objects of one tree. What they forbid raises EPERM."""

    def __init__(self, view: MergedView) -> None:
        self._view = view

    def of(self, inode: Inode) -> int:
        """:data:`IMMUTABLE` and :data:`APPEND`, as far as ``inode`` has them."""
        flags = inode.protection
        if flags is None:
            flags = inode.protection = self._read(inode)
        return flags

    def _read(self, inode: Inode) -> int:
        if inode.kind not in (stat.S_IFREG, stat.S_IFDIR):
            return 0
        if not inode.upper:
            return attributes_of(*self._view.real_at(inode)) & (IMMUTABLE | APPEND)
        path, follow = self._view.proc_path(inode)
        value = read_xattr(path, self._view.xattrs.protattr, follow=follow) or b""
        return sum(flag for flag, letter in _LETTERS if letter in value)

    def set(self, inode: Inode, flags: int) -> None:
        """Give the upper object of ``inode`` these flags, and no others."""
        if flags == self.of(inode):
            return
        path, follow = self._view.proc_path(inode)
        if flags:
            self.record(path, flags, follow=follow)
        else:
            os.removexattr(path, self._view.xattrs.protattr, follow_symlinks=follow)
        inode.protection = flags

    def record(self, target: bytes | int, flags: int, *, follow: bool) -> None:
        """Record ``flags`` on an upper object."""
        value = b"".join(letter for flag, letter in _LETTERS if flags & flag)
        os.setxattr(target, self._view.xattrs.protattr, value, follow_symlinks=follow)

    def require_changeable(self, inode: Inode) -> None:
        """For new attributes and a further name."""
        if self.of(inode):
            raise _eperm(inode)

    def require_touchable(self, inode: Inode) -> None:
        """For the present time as its times."""
        if self.of(inode) & IMMUTABLE:
            raise _eperm(inode)

    def require_writable(self, inode: Inode, flags: int) -> None:
        """For opening it with ``flags``, which let it be written."""
        protection = self.of(inode)
        if protection & IMMUTABLE or (protection and (flags & os.O_TRUNC or not flags & os.O_APPEND)):
            raise _eperm(inode)

    def require_allocatable(self, inode: Inode, mode: int) -> None:
        """For fallocate(2) with ``mode``."""
        protection = self.of(inode)
        if protection & IMMUTABLE or (protection and mode & ~_KEEP_SIZE):
            raise _eperm(inode)

    def require_new_name(self, directory: Inode) -> None:
        """For a new name in ``directory``."""
        if self.of(directory) & IMMUTABLE:
            raise _eperm(directory)

    def require_removable(self, directory: Inode, inode: Inode) -> None:
        """For taking the name of ``inode`` out of ``directory``."""
        if self.of(directory):
            raise _eperm(directory)
        if self.of(inode):
            raise _eperm(inode)


_KEEP_SIZE: Final = 1  # linux/falloc.h


def knows_ioctl(command: int) -> bool:
    """Whether :func:`inode_ioctl` does it."""
    return command in _KNOWN


def changes_inode(command: int) -> bool:
    """Whether an ioctl that :func:`inode_ioctl` knows changes the file."""
    return command in (_SETFLAGS, _FSSETXATTR)


def inode_ioctl(path: bytes, command: int, data: bytes, out_size: int, protection: int) -> tuple[bytes, int]:
    """The ioctls behind lsattr(1) and chattr(1); ENOTTY for others.

    The flags "immutable" and "append-only" are not on disk: ``protection`` says which there are, and the result, beside
    the output, which there are to be. Raises EPERM for another project: the quota that it stands for is the host's.
    """
    if command not in _KNOWN:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    shift = 0 if command in (_GETFLAGS, _SETFLAGS) else 1  # how the flags of struct fsxattr are shifted
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not changes_inode(command):
            buffer = bytearray(max(len(data), out_size))
            buffer[: len(data)] = data
            fcntl.ioctl(fd, command, buffer)
            if command != _GETVERSION:
                buffer[0] |= protection >> shift
            return bytes(buffer[:out_size]), protection
        wanted = bytearray(data)
        mask = (IMMUTABLE | APPEND) >> shift
        protection = (wanted[0] & mask) << shift
        wanted[0] &= ~mask & 0xFF
        now = bytearray(len(data))
        fcntl.ioctl(fd, _FSGETXATTR if shift else _GETFLAGS, now)
        inherits = int.from_bytes(wanted[:4], sys.byteorder) ^ int.from_bytes(now[:4], sys.byteorder)
        # struct fsxattr: flags, extent size, extents, project.
        if inherits & (_XFLAG_PROJECT_INHERIT if shift else _PROJECT_INHERIT) or wanted[12:16] != now[12:16]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if wanted != now:
            fcntl.ioctl(fd, command, wanted)
        return b"", protection
    finally:
        os.close(fd)
