"""The merged tree as one object: what a file system server, or a test, does with a union.

Plain synchronous Python that knows nothing of FUSE. One thread owns it. Methods raise :class:`OSError` with the errno
that a program should see. The parts are small classes of their own: reading (:mod:`merged_view`), copy-up, changes of
names, renames, and attributes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from unionfs.fuse_ops.copy_up.copy_up import CopyUp
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.speedups.late_sync.unsynced import Unsynced
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache
from unionfs.fuse_ops.stack.lower_stack import LowerStack
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.tree.changes import NamespaceChanges
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.metadata import MetadataChanges
from unionfs.fuse_ops.tree.need import for_writing
from unionfs.fuse_ops.tree.open_files import OpenFile, backing_flags
from unionfs.fuse_ops.tree.renames import Renames
from unionfs.host.syscalls import syncfs
from unionfs.overlay.format import OverlayXattrs

if TYPE_CHECKING:
    from unionfs.fuse_ops.quota.space_limit import SpaceLimit


log = logging.getLogger(__name__)


class TreeParts(NamedTuple):
    """What changes a tree."""

    copy_up: CopyUp
    changes: NamespaceChanges
    renames: Renames
    metadata: MetadataChanges


class UnionTree:
    """A union of read-only layers under an optional writable one.

    Made by :func:`unionfs.fuse_ops.session.assembly.open_tree`.
    """

    space: SpaceLimit | None = None  # what limits the upper directory, for requests that only have a descriptor

    def __init__(
        self,
        lower: LowerStack,
        upper: UpperDir | None,
        cache: DescriptorCache,
        options: MountOptions,
        xattrs: OverlayXattrs,
    ) -> None:
        self._lower = lower
        self._upper = upper
        self._cache = cache
        self._lock_fd = -1
        self.options = options
        self.opens_late = False
        self.warnings: list[str] = []
        self.view = MergedView(lower, upper, cache, options, xattrs)
        self.copy_up, changes, renames, metadata = self._make_parts()

        self.root = self.view.root
        self.inodes = self.view.inodes
        # The parts are the interface; these names make them one.
        self.lookup = self.view.lookup
        self.find = self.view.find
        self.attributes = self.view.attributes
        self.readlink = self.view.readlink
        self.create = changes.create
        self.create_unnamed = changes.create_unnamed
        self.mkdir = changes.mkdir
        self.mknod = changes.mknod
        self.symlink = changes.symlink
        self.link = changes.link
        self.unlink = changes.unlink
        self.rmdir = changes.rmdir
        self.rename = renames.rename
        self.set_attributes = metadata.set_attributes
        self.clear_privileges = metadata.clear_privileges
        self.get_xattr = metadata.get_xattr
        self.list_xattrs = metadata.list_xattrs
        self.set_xattr = metadata.set_xattr
        self.check_xattr = metadata.check_xattr
        self.has_xattr_to_remove = metadata.has_xattr_to_remove
        self.remove_xattr = metadata.remove_xattr

    def _make_parts(self) -> TreeParts:
        copy_up = CopyUp(self.view)
        changes = NamespaceChanges(self.view, copy_up)
        return TreeParts(copy_up, changes, Renames(self.view, copy_up, changes), MetadataChanges(self.view, copy_up))

    def use_writeback_cache(self, used: bool) -> None:
        """Say whether the kernel keeps modification times by itself, as it does with its writeback cache."""
        self.view.kernel_keeps_time = used

    @property
    def kernel_keeps_time(self) -> bool:
        """Whether it does so."""
        return self.view.kernel_keeps_time

    @property
    def read_only(self) -> bool:
        return self._upper is None

    def names(self, directory: Inode) -> list[bytes]:
        """The names in a directory, each once, without ``.`` and ``..``."""
        return self.view.names(directory)

    def open(self, inode: Inode, flags: int) -> OpenFile:
        """Open a regular file with a client's ``flags``; copies it up if they allow writing.

        With O_TRUNC no data is copied. Raises EIO for a metacopy whose data is missing. Where :attr:`opens_late` says
        so, a lower file is opened when it is read first: only for a server that may open every file of every layer,
        since a program expects to be refused now.
        """
        if inode.kind != stat.S_IFREG:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        truncate = bool(flags & os.O_TRUNC)
        if writable or truncate:
            self.copy_up.ensure(inode, for_writing(truncate=truncate))
        if self.opens_late and not inode.upper and not inode.metacopy:
            return OpenFile(inode, -1, writable=False, open_late=self._open_to_read)
        wanted = backing_flags(flags)
        if truncate:
            wanted |= os.O_TRUNC
            inode.capability = None
        return OpenFile(inode, self._open_real(inode, wanted), writable=writable)

    def _open_to_read(self, inode: Inode) -> int:
        return self._open_real(inode, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _open_real(self, inode: Inode, flags: int) -> int:
        if not inode.upper or inode.metacopy:
            layer, data_path = self.view.data_source(inode)
            return layer.open(data_path, flags)
        path, follow = self.view.proc_path(inode)
        if follow:
            flags &= ~os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except PermissionError:
            # An unprivileged server may be allowed to write a file, but not to read it.
            if flags & os.O_ACCMODE != os.O_RDWR:
                raise
            return os.open(path, (flags & ~os.O_ACCMODE) | os.O_WRONLY)

    def close_file(self, handle: OpenFile) -> None:
        """End the use of an open file."""
        handle.close()
        if handle.inode.handles is None:
            handle.inode.capability = None
        self.inodes.drop_if_unneeded(handle.inode)

    def forget(self, inode: Inode, count: int) -> None:
        """The kernel gives ``count`` references back."""
        inode.lookups -= count
        if inode.lookups <= 0:
            inode.lookups = 0
            self.inodes.drop_if_unneeded(inode)

    def statfs(self) -> os.statvfs_result:
        """Size and use of the file system that new data goes to."""
        layer = self._upper.layer if self._upper is not None else self._lower.layers[0]
        return os.statvfs(b"/proc/self/fd/%d" % layer.fd)

    def open_upper_directory(self, inode: Inode) -> int:
        """A descriptor of the upper directory of ``inode``, for fsync(2); the caller closes it. -1 without one."""
        if not inode.upper or inode.orphan:
            return -1
        path, _ = self.view.proc_path(inode)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def statistics(self) -> dict[str, int]:
        """Counters for a person who asks a running server how it is."""
        handles = sum(len(inode.handles or ()) for inode in self.inodes)
        return {"inodes": len(self.inodes), "open_files": handles, "cached_directories": len(self._cache)}

    def hold_lock(self, fd: int) -> None:
        """Keep the descriptor whose lock says that the work directory is ours; negative when it is not."""
        self._lock_fd = fd
        if fd >= 0 and self._syncs and self.space is None and not self.options.metacopy and self._may_always_mark:
            self.copy_up.unsynced = Unsynced(fd)

    @property
    def _syncs(self) -> bool:
        return self.options.fsync and not self.options.volatile

    @property
    def _may_always_mark(self) -> bool:
        # Whoever may not write to a file may not remove a user.* attribute from it either.
        return not self.view.xattrs.user or os.geteuid() == 0

    def close(self) -> None:
        """Release all descriptors and leave nothing of ours in the work directory."""
        for inode in self.inodes:
            for handle in list(inode.handles or ()):
                handle.close()
            if inode.orphan_fd >= 0:
                os.close(inode.orphan_fd)
                inode.orphan_fd = -1
            if inode.hold is not None and self._upper is not None:
                self._upper.discard(inode.hold)
                inode.hold = None
        self.inodes.last_close.wait()
        if self._upper is not None and self._syncs:
            self._sync_all(self._upper.layer.readable_fd)
        self._cache.close()
        if self._upper is not None:
            self._upper.close()
        self._lower.ahead.close()
        for layer in (*self._lower.layers, *self._lower.data_layers):
            layer.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _sync_all(self, fd: int) -> None:
        """Sync the file system of the upper directory ``fd``, as the kernel's overlayfs does when it is unmounted."""
        unsynced = self.copy_up.unsynced
        try:
            if unsynced is None:
                syncfs(fd)
            else:
                unsynced.end(lambda: syncfs(fd), self.copy_up.remove_mark)
        except OSError as error:
            log.warning("cannot sync %s: %s; the next mount looks after it", self.options.upperdir, error.strerror)
