"""FUSE requests, answered by the tree: the only place that speaks pyfuse3's types.

Handlers run on the trio thread, which owns the tree; whatever may take long (copying data, fsync, reading what is not
in the page cache) is given to a worker thread together with the descriptors it needs. pyfuse3 ends its loop at any
exception but FUSEError, so every handler is wrapped.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from unionfs.fuse_ops.attributes import Attributes
from unionfs.fuse_ops.changes import check_new_name
from unionfs.fuse_ops.copy_up import CopyUpJob
from unionfs.fuse_ops.inodes import Inode
from unionfs.fuse_ops.metadata import AttributeChange
from unionfs.fuse_ops.open_files import OpenDir, OpenFile
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.tree import UnionTree

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_INLINE_COPY_BYTES = 128 * 1024  # copying less than this is cheaper than handing it to a thread and back
_GONE = frozenset({errno.ENOENT, errno.ESTALE})


def _handler(
    function: Callable[Concatenate[UnionOperations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[UnionOperations, P], Coroutine[Any, Any, R]]:
    """Turn whatever goes wrong in a handler into an errno for the program that asked."""

    @functools.wraps(function)
    async def wrapped(self: UnionOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s%r: %s", function.__name__, args, error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s%r failed; the program gets EIO", function.__name__, args)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped


class UnionOperations(pyfuse3.Operations):
    """The file system of one mount. ``tree`` is used from one thread only, the one that runs trio."""

    supports_dot_lookup = False

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        super().__init__()
        self.enable_writeback_cache = options.writeback and not tree.read_only
        self.enable_acl = options.acl and options.xattrs
        self._tree = tree
        self._timeout_s = options.timeout_s
        self._keep_cache = options.timeout_s > 0
        self._xattrs = options.xattrs
        self._sync = options.fsync and not options.volatile
        self._files: dict[int, OpenFile] = {}
        self._directories: dict[int, OpenDir] = {}
        self._next_handle = 1
        self._copying: dict[Inode, trio.Event] = {}

    # -- helpers ----------------------------------------------------------------------------------------------

    def _inode(self, ino: int) -> Inode:
        try:
            return self._tree.inodes[ino]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def _entry(self, inode: Inode, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(attributes.ino)
        entry.st_mode = pyfuse3.ModeT(attributes.mode)
        entry.st_nlink = attributes.nlink
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_rdev = attributes.rdev
        entry.st_size = attributes.size
        entry.st_blocks = attributes.blocks
        entry.st_blksize = attributes.blksize
        entry.st_atime_ns = attributes.atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        entry.attr_timeout = entry.entry_timeout = self._timeout_s
        return entry

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return self._entry(inode, self._tree.attributes(inode))

    def _known(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The answer that makes the kernel remember ``inode``, which counts as a reference."""
        entry = self._attributes(inode)
        inode.lookups += 1
        return entry

    async def _copy_up(self, inode: Inode, *, data: bool = True, size: int | None = None) -> None:
        """Copy ``inode`` up without holding up other requests; one copy at a time for each inode."""
        copy_up = self._tree.copy_up
        while copy_up.needs(inode, data=data):
            going_on = self._copying.get(inode)
            if going_on is not None:
                await going_on.wait()
                continue
            job = copy_up.begin(inode, data=data, size=size)
            if job is None:
                return
            if job.size <= _INLINE_COPY_BYTES and not job.sync:
                try:
                    job.run()
                except BaseException:
                    copy_up.abort(job)
                    raise
                copy_up.finish(job)
            else:
                await self._run_job(inode, job)

    async def _run_job(self, inode: Inode, job: CopyUpJob) -> None:
        copy_up = self._tree.copy_up
        self._copying[inode] = done = trio.Event()
        inode.lookups += 1  # it must not be forgotten while the copy is made
        try:
            await trio.to_thread.run_sync(job.run)
        except BaseException:
            copy_up.abort(job)
            raise
        else:
            copy_up.finish(job)
        finally:
            del self._copying[inode]
            done.set()
            self._tree.forget(inode, 1)

    # -- names ------------------------------------------------------------------------------------------------

    @_handler
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode = self._tree.find(self._inode(parent_inode), name)
        if inode is None:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = pyfuse3.InodeT(0)  # a miss for the kernel to remember
            entry.entry_timeout = self._timeout_s
            return entry
        return self._known(inode)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, count in inode_list:
            try:
                inode = self._tree.inodes[ino]
            except KeyError:
                continue
            try:
                self._tree.forget(inode, count)
            except Exception:
                log.exception("forget of %r failed", inode)

    @_handler
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._known(self._tree.mknod(self._inode(parent_inode), name, mode, rdev, ctx))

    @_handler
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._known(self._tree.mkdir(self._inode(parent_inode), name, mode, ctx))

    @_handler
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._known(self._tree.symlink(self._inode(parent_inode), name, target, ctx))

    @_handler
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._inode(inode)
        await self._copy_up(node, data=False)
        self._tree.link(node, self._inode(new_parent_inode), new_name)
        return self._known(node)

    @_handler
    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        self._tree.unlink(self._inode(parent_inode), name)

    @_handler
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        self._tree.rmdir(self._inode(parent_inode), name)

    @_handler
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        tree = self._tree
        old_dir, new_dir = self._inode(parent_inode_old), self._inode(parent_inode_new)
        check_new_name(name_new)
        moved = [tree.lookup(old_dir, name_old)]
        if flags & pyfuse3.RENAME_EXCHANGE:
            moved.append(tree.lookup(new_dir, name_new))
        for inode in moved:
            if inode.kind != stat.S_IFDIR:  # a directory is copied without what is in it
                await self._copy_up(inode, data=False)
        tree.rename(old_dir, name_old, new_dir, name_new, flags, ctx)

    @_handler
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(self._tree.readlink(self._inode(inode)))

    # -- attributes -------------------------------------------------------------------------------------------

    @_handler
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._inode(inode))

    @_handler
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._inode(inode)
        change = AttributeChange(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if change.only_mtime and change.mtime_ns == self._tree.attributes(node).mtime_ns:
            # The kernel's writeback cache writes a changed ctime back as "this mtime, please": after an unlink of
            # a lower file, say. There is nothing to do, and above all nothing to copy up.
            return self._attributes(node)
        if not change.kills_privileges:
            await self._copy_up(node, data=change.size is not None, size=change.size)
        self._tree.set_attributes(node, change, ctx)
        return self._attributes(node)

    @_handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        st = self._tree.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = st.f_bsize, st.f_frsize
        data.f_blocks, data.f_bfree, data.f_bavail = st.f_blocks, st.f_bfree, st.f_bavail
        data.f_files, data.f_ffree, data.f_favail = st.f_files, st.f_ffree, st.f_favail
        data.f_namemax = st.f_namemax
        return data

    # -- extended attributes ----------------------------------------------------------------------------------

    def _require_xattrs(self) -> None:
        if not self._xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # the kernel stops asking

    @_handler
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        self._require_xattrs()
        return self._tree.get_xattr(self._inode(inode), name)

    @_handler
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        self._require_xattrs()
        return [pyfuse3.XAttrNameT(name) for name in self._tree.list_xattrs(self._inode(inode), ctx)]

    @_handler
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._require_xattrs()
        node = self._inode(inode)
        await self._copy_up(node, data=False)
        self._tree.set_xattr(node, name, value)

    @_handler
    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        self._require_xattrs()
        node = self._inode(inode)
        self._tree.get_xattr(node, name)  # ENODATA before anything is copied up
        await self._copy_up(node, data=False)
        self._tree.remove_xattr(node, name)

    # -- files ------------------------------------------------------------------------------------------------

    def _add_file(self, handle: OpenFile) -> pyfuse3.FileInfo:
        fh = self._next_handle
        self._next_handle += 1
        self._files[fh] = handle
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=self._keep_cache)

    @_handler
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode, handle = self._tree.create(self._inode(parent_inode), name, mode, flags, ctx)
        return self._add_file(handle), self._known(inode)

    @_handler
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._inode(inode)
        truncate = bool(flags & os.O_TRUNC)
        if truncate or flags & os.O_ACCMODE != os.O_RDONLY:
            await self._copy_up(node, size=0 if truncate else None)
        handle = self._tree.open(node, flags)
        if truncate and ctx.uid != 0:
            self._tree.clear_privileges(node)
        return self._add_file(handle)

    @_handler
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        fd = self._files[fh].fd
        buffer = bytearray(size)
        try:
            count = os.preadv(fd, [buffer], off, os.RWF_NOWAIT)
            if count == size or off + count >= os.fstat(fd).st_size:
                del buffer[count:]
                return buffer  # type: ignore[return-value]  # pyfuse3 takes any buffer
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        # Not, or not all, in the page cache: waiting for the disk must not hold up others.
        return await trio.to_thread.run_sync(os.pread, fd, size, off)

    @_handler
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        fd = self._files[fh].fd
        written = os.pwrite(fd, buf, off)
        while written < len(buf):
            more = os.pwrite(fd, memoryview(buf)[written:], off + written)
            if more == 0:
                break
            written += more
        return written

    @_handler
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # nothing is buffered here: the kernel need not say so again

    @_handler
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._tree.close_file(self._files.pop(fh))

    @_handler
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if not self._sync:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # the kernel takes it for done, now and later
        handle = self._files[fh]
        if handle.inode.upper:
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, handle.fd)

    # -- directories ------------------------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        fh = self._next_handle
        self._next_handle += 1
        node = self._inode(inode)
        node.lookups += 1  # an open directory is in use, also when the kernel forgets its name
        self._directories[fh] = OpenDir(node)
        return pyfuse3.FileHandleT(fh)

    @_handler
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories[fh]
        if directory.names is None or start_id == 0:
            directory.names = self._tree.names(directory.inode)
        inode = directory.inode
        if start_id < 1 and not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(b"."), self._attributes(inode), 1):
            return
        if start_id < 2:
            parent = inode.parent or inode
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(b".."), self._attributes(parent), 2):
                return
        names = directory.names
        for position in range(max(start_id - 2, 0), len(names)):
            name = names[position]
            try:
                child = self._tree.find(inode, name)
                if child is None:
                    continue
                entry = self._attributes(child)
            except OSError as error:
                if error.errno in _GONE:
                    continue  # removed since the directory was opened
                raise
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position + 3):
                return
            child.lookups += 1

    @_handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._tree.forget(self._directories.pop(fh).inode, 1)

    @_handler
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if not self._sync:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        self._tree.sync_upper(self._directories[fh].inode)

    @_handler
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # default_permissions: the kernel decides
