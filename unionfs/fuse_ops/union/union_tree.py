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
from collections.abc import Callable

from unionfs.fuse_ops.copy_up.copy_up import NO_CONTENTS, CopyUp
from unionfs.fuse_ops.copy_up.hard_links import HardLinks
from unionfs.fuse_ops.copy_up.unsynced import Unsynced
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.quota import Accounts, SpaceLimit
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache
from unionfs.fuse_ops.stack.lower_stack import LowerStack
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.stack.workdir import Claim
from unionfs.fuse_ops.tree.attributes import Attributes
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, OpenFile, as_directory, backing_flags
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.protection import Protection
from unionfs.fuse_ops.union.changes import Caller, NamespaceChanges
from unionfs.fuse_ops.union.metadata import AttributeChange, MetadataChanges
from unionfs.fuse_ops.union.renames import Move, Renames
from unionfs.host.syscalls import syncfs
from unionfs.overlay.format import OverlayXattrs

log = logging.getLogger(__name__)


class UnionTree:
    """A union of read-only layers under an optional writable one.

    Made by :func:`unionfs.fuse_ops.session.assembly.open_tree`.
    """

    def __init__(
        self,
        lower: LowerStack,
        upper: UpperDir | None,
        cache: DescriptorCache,
        options: MountOptions,
        xattrs: OverlayXattrs,
        make_accounts: Callable[[MergedView], Accounts] = lambda view: Accounts(),
    ) -> None:
        self._lower = lower
        self._upper = upper
        self._cache = cache
        self._claim: Claim | None = None
        self.options = options
        self.opens_lazily = False
        self.warnings: list[str] = []
        self.view = MergedView(lower, upper, cache, options, xattrs)
        self.root = self.view.root
        self.inodes = self.view.inodes
        self._accounts = make_accounts(self.view)
        self.hard_links = HardLinks(self.view, self._accounts)
        self.protection = Protection(self.view)
        self.copy_up = CopyUp(self.view, self.protection, self.hard_links, self._accounts)
        self._changes = NamespaceChanges(self.view, self.copy_up, self.hard_links, self._accounts)
        self._renames = Renames(self.view, self.copy_up, self._changes, self.hard_links, self._accounts)
        self._metadata = MetadataChanges(self.view, self.copy_up, self._accounts)

    @property
    def space(self) -> SpaceLimit | None:
        """What limits the upper directory, for requests that only have a descriptor; None: nothing."""
        return self._accounts.space

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

    # -- looking --------------------------------------------------------------------------------------------------

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        """The object called ``name`` in ``directory``; FileNotFoundError if the merged tree has none."""
        return self.view.lookup(directory, name)

    def find(self, directory: Inode, name: bytes) -> Inode | None:
        """As :meth:`lookup`, None instead of an exception."""
        return self.view.find(directory, name)

    def attributes(self, inode: Inode) -> Attributes:
        """What stat(2) shows of ``inode``."""
        return self.view.attributes(inode)

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        return self.view.readlink(inode)

    def names(self, directory: Inode) -> list[bytes]:
        """The names in a directory, each once, without ``.`` and ``..``."""
        return self.view.names(directory)

    # -- names ----------------------------------------------------------------------------------------------------

    def create(self, directory: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, OpenFile]:
        """Make a regular file and open it with the client's ``flags``; EEXIST if the name is taken."""
        return self._changes.create(as_directory(directory), name, mode, flags, caller)

    def create_unnamed(self, directory: Inode, mode: int, flags: int, caller: Caller) -> tuple[Inode, OpenFile]:
        """Make a file without a name in ``directory``, which :meth:`link` can give one later (O_TMPFILE)."""
        return self._changes.create_unnamed(as_directory(directory), mode, flags, caller)

    def mkdir(self, directory: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        """Make a directory."""
        return self._changes.mkdir(as_directory(directory), name, mode, caller)

    def mknod(self, directory: Inode, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        """Make a device, fifo, socket or regular file; a device 0:0 is a whiteout of an overlay stacked on this one."""
        return self._changes.mknod(as_directory(directory), name, mode, rdev, caller)

    def symlink(self, directory: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        """Make a symbolic link."""
        return self._changes.symlink(as_directory(directory), name, target, caller)

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        """Give ``inode`` a further name."""
        if not isinstance(inode, FileInode):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), os.fsdecode(inode.path()))
        self._changes.link(inode, as_directory(directory), name)

    def unlink(self, directory: Inode, name: bytes) -> None:
        """Remove a name that is not a directory's."""
        self._changes.unlink(as_directory(directory), name)

    def rmdir(self, directory: Inode, name: bytes) -> None:
        """Remove an empty directory."""
        self._changes.rmdir(as_directory(directory), name)

    def rename(
        self,
        old_dir: Inode,
        old_name: bytes,
        new_dir: Inode,
        new_name: bytes,
        flags: int = 0,
        caller: Caller | None = None,
    ) -> None:
        """renameat2(2) with its ``flags``; raises EXDEV for a directory of a lower layer when redirects are off."""
        self.finish_rename(self.begin_rename(old_dir, old_name, new_dir, new_name, flags), caller)

    def begin_rename(self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes, flags: int) -> Move:
        """The first half of :meth:`rename`: what is moved. It raises what forbids that, and changes nothing."""
        return self._renames.begin(as_directory(old_dir), old_name, as_directory(new_dir), new_name, flags)

    def finish_rename(self, move: Move, caller: Caller | None) -> None:
        """The second half, as long as nothing else has been changed since the first."""
        self._renames.finish(move, caller)

    # -- attributes -----------------------------------------------------------------------------------------------

    def set_attributes(self, inode: Inode, change: AttributeChange, caller: Caller) -> os.stat_result | None:
        """Apply ``change``; returns lstat of the real object afterwards, if that had to be asked for."""
        return self._metadata.set_attributes(inode, change, caller)

    def check_change(self, inode: Inode, change: AttributeChange) -> None:
        """Raise EPERM where the flags of ``inode`` forbid ``change``."""
        self._metadata.check_change(inode, change)

    def control(self, inode: Inode, command: int, data: bytes, out_size: int) -> bytes:
        """An ioctl(2) of those that :func:`knows_ioctl` knows; returns its output."""
        return self._metadata.control(inode, command, data, out_size)

    def clear_privileges(self, inode: Inode, caller: Caller) -> None:
        """Take setuid, setgid and file capabilities away, because ``caller`` changed the contents or the owner."""
        self._metadata.clear_privileges(inode, caller)

    def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """The value of the attribute that a program calls ``name``; ENODATA without one."""
        return self._metadata.get_xattr(inode, name)

    def list_xattrs(self, inode: Inode, caller: Caller) -> list[bytes]:
        """The names of the attributes that ``caller`` may see."""
        return self._metadata.list_xattrs(inode, caller)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; ``flags`` are os.XATTR_CREATE and os.XATTR_REPLACE."""
        self._metadata.set_xattr(inode, name, value, flags)

    def check_xattr(self, inode: Inode, name: bytes, flags: int) -> None:
        """Raise what setting the attribute with ``flags`` would, so that nothing is copied up for it."""
        self._metadata.check_xattr(inode, name, flags)

    def has_xattr_to_remove(self, inode: Inode, name: bytes) -> bool:
        """Whether there is something to remove; ENODATA if not, except for ACLs of upper files."""
        return self._metadata.has_xattr_to_remove(inode, name)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove an attribute; ENODATA, and no copy-up, if there is none."""
        self._metadata.remove_xattr(inode, name)

    # -- files ----------------------------------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int) -> OpenFile:
        """Open a regular file with a client's ``flags``; copies it up if they allow writing.

        With O_TRUNC no data is copied. Raises EIO for a metacopy whose data is missing. Where :attr:`opens_lazily` says
        so, a lower file is opened when it is read first: only for a server that may open every file of every layer,
        since a program expects to be refused now.
        """
        if not isinstance(inode, FileInode) or inode.kind != stat.S_IFREG:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        truncate = bool(flags & os.O_TRUNC)
        if writable or truncate:
            self.protection.require_writable(inode, flags)
        fd = -1
        if truncate and not inode.unsynced and self.copy_up.requires(inode, NO_CONTENTS):
            fd = self.copy_up.make_empty(inode)
        elif writable or truncate:
            self.copy_up.ensure(inode)
        if self.opens_lazily and not inode.upper and not inode.metacopy:
            return OpenFile(inode, -1, writable=False, open_lazily=self._open_to_read)
        wanted = backing_flags(flags)
        if truncate:
            wanted |= os.O_TRUNC
            inode.capability = None
        file = OpenFile(inode, self._open_real(inode, wanted) if fd < 0 else fd, writable=writable)
        file.appends = writable and self.protection.of(inode) != 0
        if truncate or inode.orphan:
            self._accounts.changed(inode, truncated=truncate)
        return file

    def _open_to_read(self, inode: FileInode) -> int:
        return self._open_real(inode, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _open_real(self, inode: FileInode, flags: int) -> int:
        if not inode.upper or inode.metacopy:
            return self.view.open_data(inode, flags)
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
        self._accounts.closed(handle.inode)

    def forget(self, inode: Inode, count: int) -> None:
        """The kernel gives ``count`` references back."""
        inode.lookups -= count
        if inode.lookups <= 0:
            inode.lookups = 0
            self.inodes.drop_if_unneeded(inode)

    def place_found_links(self) -> None:
        """Make links in the upper of the names of copied-up files that were found since: who reads the upper sees them.

        What fails is tried again the next time, and at the end.
        """
        found, self.view.found_links = self.view.found_links, set()
        for inode in found:
            if inode.staged_link is None:
                continue
            try:
                self.copy_up.place_names(inode)
            except OSError as error:
                log.debug("%s is unchanged under further names for now: %s", os.fsdecode(inode.path()), error.strerror)
                self.view.found_links.add(inode)

    def statfs(self) -> os.statvfs_result:
        """Size and use of the file system that new data goes to."""
        layer = self._upper.layer if self._upper is not None else self._lower.layers[0]
        return self._accounts.statvfs(os.statvfs(b"/proc/self/fd/%d" % layer.fd))

    def open_upper_directory(self, inode: Inode) -> int:
        """A descriptor of the upper directory of ``inode``, for fsync(2); the caller closes it. -1 without one."""
        if not inode.upper or inode.orphan:
            return -1
        path, _ = self.view.proc_path(inode)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def statistics(self) -> dict[str, int]:
        """Counters for a person who asks a running server how it is."""
        handles = sum(len(inode.handles or ()) for inode in self.inodes if isinstance(inode, FileInode))
        counters = {"inodes": len(self.inodes), "open_files": handles, "cached_directories": len(self._cache)}
        return {**counters, **self._accounts.statistics()}

    def hold_claim(self, claim: Claim | None) -> None:
        """Keep what says that the upper and the work directory are ours; None when they are not."""
        self._claim = claim
        if "late-sync" not in self.options.speedups or claim is None or not self._syncs or self.space is not None:
            return
        if not self.options.metacopy and self._may_always_mark:
            self.copy_up.unsynced = Unsynced(claim.workdir_fd)

    @property
    def _syncs(self) -> bool:
        return self.options.fsync and not self.options.volatile

    @property
    def _may_always_mark(self) -> bool:
        # Whoever may not write to a file may not remove a user.* attribute from it either.
        return not self.view.xattrs.user or os.geteuid() == 0

    def end_soon(self) -> None:
        """The mount is gone, and nothing is left but what has been begun and :meth:`close`."""
        if self._claim is not None:
            self._claim.end_soon()

    def close(self) -> None:
        """Release all descriptors and leave nothing of ours in the work directory."""
        for inode in self.inodes:
            if isinstance(inode, FileInode):
                self._close_inode(inode)
            if inode.orphan_fd >= 0:
                os.close(inode.orphan_fd)
                inode.orphan_fd = -1
        self.inodes.end_closing()
        if self._upper is not None and self._syncs:
            self._sync_all(self._upper.layer.readable_fd)
        self._cache.close()
        if self._upper is not None:
            self._upper.close()
        self._lower.observer.close()
        for layer in (*self._lower.layers, *self._lower.data_layers):
            layer.close()
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _close_inode(self, inode: FileInode) -> None:
        for handle in list(inode.handles or ()):
            handle.close()
        if inode.staged_link is not None and self._upper is not None:
            try:
                self.copy_up.place_names(inode)
            except OSError as error:
                log.warning("%s is unchanged under further names: %s", os.fsdecode(inode.path()), error.strerror)
            self._upper.discard(inode.staged_link)
            inode.staged_link = None

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
