"""Which lower object a copy is from: the attribute from which the kernel and later mounts take its inode number."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.fuse_ops.tree.accounts import Accounts
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host import syscalls
from unionfs.overlay.copying import At, at_path
from unionfs.overlay.format import encode_origin
from unionfs.overlay.rules import entry_path, has_xattr

_NO_HANDLES: Final = frozenset({errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM, errno.EINVAL})


def origin_of(layer: LayerDir, source: At) -> bytes:
    """The value of the attribute for a copy of ``source``, which is in ``layer``."""
    try:
        handle = syscalls.file_handle(*source)
    except OSError as error:
        if error.errno not in _NO_HANDLES:
            raise
        return b""
    return encode_origin(handle, layer.filesystem_uuid)


class Origins:
    """Records on the copies of one tree where they are from."""

    def __init__(self, view: MergedView, accounts: Accounts) -> None:
        self._view = view
        self._accounts = accounts

    def record(self, inode: Inode, st: os.stat_result, source: tuple[LayerDir, At], target: At) -> None:
        """Record that ``target`` is the copy of ``source``, the lower object of ``inode`` that has ``st``."""
        # Of several names the kernel, too, sets no origin: after a remount they are different files.
        if isinstance(inode, FileInode) and (inode.parent is None or inode.may_have_other_names(st)):
            return
        value = origin_of(*source)
        try:
            os.setxattr(at_path(*target), self._view.xattrs.origin, value, follow_symlinks=not target[1])
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            inode.has_origin = False  # user.* attributes exist on files and directories only
        else:
            inode.has_origin = True

    def record_later(self, path: bytes, value: bytes) -> None:
        """Record ``value`` on a copy that was made by a mount which did not come to it, unless it has one."""
        with contextlib.suppress(OSError):  # only costs the stability of its inode number
            os.setxattr(path, self._view.xattrs.origin, value, os.XATTR_CREATE)

    def arrived(self, directory: DirInode, name: bytes) -> None:
        """``name``, which has an origin, has come into an upper directory: mark that as impure.

        The kernel looks the numbers of what is in such a directory up when it is listed.
        """
        if directory.origin_names is not None:
            directory.origin_names.add(name)
        if directory.impure:
            return
        directory.impure = True
        with contextlib.suppress(OSError):  # only costs the stability of inode numbers
            path = b"/proc/self/fd/%d" % self._view.upper_dir_fd(directory)
            self._view.unnoticed(directory, lambda: os.setxattr(path, self._view.xattrs.impure, b"y"))
        self._accounts.changed(directory)  # an attribute can take a block

    def left(self, directory: DirInode, name: bytes) -> None:
        """``name``, which has an origin, is no longer in an upper directory: without any other it is not impure.

        The kernel finds that out at the next listing. Of merged directories neither says it: they are looked into
        anyhow.
        """
        if not directory.impure or directory.lowers or directory.orphan:
            return
        # An impure directory only takes longer to list. A server without privilege may search it but not read, say.
        with contextlib.suppress(OSError):
            dir_fd = self._view.upper_dir_fd(directory)
            if directory.origin_names is None:
                directory.origin_names = self._names_with_origin(directory, dir_fd)
            directory.origin_names.discard(name)
            if not directory.origin_names:
                directory.impure, directory.origin_names = False, None
                os.removexattr(b"/proc/self/fd/%d" % dir_fd, self._view.xattrs.impure)

    def _names_with_origin(self, directory: DirInode, dir_fd: int) -> set[bytes]:
        children = directory.children or {}
        found = set()
        for name in map(os.fsencode, os.listdir(b"/proc/self/fd/%d" % dir_fd)):
            child = children.get(name)
            if has_xattr(entry_path(dir_fd, name), self._view.xattrs.origin) if child is None else child.has_origin:
                found.add(name)
        return found
