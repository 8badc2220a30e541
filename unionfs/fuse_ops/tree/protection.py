"""Immutable and append-only files (``chattr +i`` and ``+a``): who may still do what.

A lower object has the flags on disk. Of an upper one they are in an attribute, as the kernel's overlayfs keeps them
(``overlay.protattr``): on the object itself they would keep us from renaming its directory, or from syncing a copy.
So nothing but these rules holds them. They are those of the kernel's VFS: may_open(), may_delete(), vfs_link(),
notify_change() and xattr_permission().
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host.syscalls import attributes_of
from unionfs.overlay.rules import read_xattr

IMMUTABLE: Final = 0x10  # linux/fs.h: FS_IMMUTABLE_FL, and linux/stat.h: STATX_ATTR_IMMUTABLE
APPEND: Final = 0x20  # FS_APPEND_FL, STATX_ATTR_APPEND

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
