"""What each request of the kernel means for the tree, in terms of no transport.

The tree belongs to the thread that runs trio. Requests that only look something up are plain methods; those that may
take long (copying data, fsync, reading what is not in the page cache) are coroutines that give the slow part to a
worker thread together with the descriptors it needs, so that other requests go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable

import trio

from unionfs.fuse_ops.copy_up.copy_up_job import CopyUpJob
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.speedups.patience import Patience
from unionfs.fuse_ops.tree import backing_calls
from unionfs.fuse_ops.tree.attributes import CAPABILITY, Attributes
from unionfs.fuse_ops.tree.changes import Caller, check_new_name
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.listing import has_gone
from unionfs.fuse_ops.tree.metadata import AttributeChange
from unionfs.fuse_ops.tree.need import ATTRIBUTES, CONTENTS, Need, for_attributes, for_name, for_writing
from unionfs.fuse_ops.tree.open_files import OpenDir, OpenFile
from unionfs.fuse_ops.tree.union_tree import UnionTree
from unionfs.host.syscalls import RENAME_EXCHANGE

_INLINE_COPY_BYTES = 128 * 1024  # copying less than this is cheaper than handing it to a thread and back
_LONG_FREE_BYTES = 4 * 1024 * 1024  # giving back more than this takes a millisecond and more


class UnionRequests:
    """The requests of one mount, with the files and directories that clients have open."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self.tree = tree
        self.options = options
        self.sync = options.fsync and not options.volatile
        self.files: dict[int, OpenFile] = {}
        self.directories: dict[int, OpenDir] = {}
        self.patience: Patience | None = None  # of a transport that knows who sends requests
        self.before_thread: Callable[[], None] = lambda: None  # what a transport has to do before it starts threads
        self._next_handle = 1
        self._copying: dict[Inode, trio.Event] = {}

    # -- inodes -----------------------------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """The inode that the kernel knows as ``ino``; ESTALE for a number that it should not know."""
        try:
            return self.tree.inodes[ino]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def forget(self, ino: int, count: int) -> None:
        """The kernel gives back ``count`` references to ``ino``."""
        try:
            inode = self.tree.inodes[ino]
        except KeyError:
            return
        self.tree.forget(inode, count)

    def remembered(self, inode: Inode) -> Attributes:
        """Attributes for an answer that makes the kernel remember ``inode``, which counts as a reference."""
        attributes = self.tree.attributes(inode)
        inode.lookups += 1
        return attributes

    def made(self, inode: Inode) -> Attributes:
        """As :meth:`remembered`, for the answer to the request that made ``inode``."""
        attributes = self.tree.view.attributes_of_new(inode)
        inode.lookups += 1
        return attributes

    # -- copy-up ----------------------------------------------------------------------------------------------

    def copied_up(self, inode: Inode, need: Need = CONTENTS) -> bool:
        """Copy ``inode`` up here and now if that is needed and takes no longer than handing it to a thread would.

        False when it would: then the caller has to wait for :meth:`copy_up`.
        """
        copy_up = self.tree.copy_up
        if not copy_up.needs(inode, need):
            return True
        if inode in self._copying:
            return False
        copies_data = need.data or not self.options.metacopy
        if inode.kind != stat.S_IFREG or (need.size == 0 and not inode.unsynced) or not copies_data:
            copy_up.ensure(inode, need)
            return True
        st = self.tree.view.real_stat(inode)
        if st.st_size > _INLINE_COPY_BYTES:
            return False
        if self.patience is None:
            if self.sync and not (need.later and not need.data and copy_up.may_sync_later(inode, st)):
                return False
        elif self.sync and not self.patience.may_wait():
            return False
        start = time.perf_counter()
        copy_up.ensure(inode, need, st)
        if self.patience is not None:
            self.patience.waited_since(start)
        return True

    async def copy_up(self, inode: Inode, need: Need = CONTENTS) -> None:
        """Copy ``inode`` up without holding up other requests; one copy at a time for each inode."""
        copy_up = self.tree.copy_up
        while not self.copied_up(inode, need):
            going_on = self._copying.get(inode)
            if going_on is not None:
                await going_on.wait()
                continue
            job = copy_up.begin(inode, need)
            if job is None:
                return
            await self._run_job(inode, job)

    async def settle(self, inode: Inode) -> None:
        """Bring a copy that was to be synced later to the disk, if nobody is about it already."""
        if inode.unsynced and inode not in self._copying:
            self.before_thread()
            await self._run_job(inode, self.tree.copy_up.begin_settling(inode))

    async def _run_job(self, inode: Inode, job: CopyUpJob) -> None:
        copy_up = self.tree.copy_up
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
            self.tree.forget(inode, 1)

    # -- large files ------------------------------------------------------------------------------------------

    def frees_much(self, inode: Inode, size: int) -> bool:
        """Whether truncating to ``size`` bytes gives so much space back that others would have to wait for it."""
        if not inode.upper or inode.metacopy or self.tree.space is not None:
            return False
        return self.tree.view.real_stat(inode).st_blocks * 512 - size > _LONG_FREE_BYTES

    async def free(self, inode: Inode, size: int) -> None:
        """Do in a thread what takes long when an upper file is truncated to ``size`` bytes.

        The caller still has to truncate it, which then has nothing more to free, and to tell of errors.
        """
        path, _ = self.tree.view.proc_path(inode)
        self.before_thread()
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(self._shorten, path, size)

    def _shorten(self, path: bytes, size: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            st = os.fstat(fd)
            os.ftruncate(fd, size)
            if self.tree.kernel_keeps_time:
                os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
        finally:
            os.close(fd)

    # -- changes that may have to copy data first -------------------------------------------------------------

    async def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        await self.copy_up(inode, for_name(unsynced=inode.unsynced))
        self.tree.link(inode, directory, name)

    async def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        check_new_name(new_name)
        moved = [self.tree.lookup(old_dir, old_name)]
        if flags & RENAME_EXCHANGE:
            moved.append(self.tree.lookup(new_dir, new_name))
        for inode in moved:
            if inode.kind != stat.S_IFDIR:  # a directory is copied without what is in it
                await self.copy_up(inode, for_name(unsynced=inode.unsynced))
        self.tree.rename(old_dir, old_name, new_dir, new_name, flags, caller)

    def must_wait_for(self, inode: Inode, change: AttributeChange) -> bool:
        """Whether a change of attributes has to wait for :meth:`make_ready`."""
        if change.kills_privileges or self._changes_nothing(inode, change):
            return False
        if not self.copied_up(inode, for_attributes(change.size)):
            return True
        return change.size is not None and self.frees_much(inode, change.size)

    async def make_ready(self, inode: Inode, change: AttributeChange) -> None:
        """Do what takes long of a change of attributes."""
        await self.copy_up(inode, for_attributes(change.size))
        if change.size is not None and self.frees_much(inode, change.size):
            await self.free(inode, change.size)

    def _changes_nothing(self, inode: Inode, change: AttributeChange) -> bool:
        # The kernel's writeback cache writes a changed ctime back as "this mtime, please": after an unlink of a lower
        # file, say. There is nothing to do, and above all nothing to copy up.
        if not self.tree.kernel_keeps_time:
            return False
        return change.only_mtime and change.mtime_ns == self.tree.attributes(inode).mtime_ns

    def set_attributes_now(self, inode: Inode, change: AttributeChange, caller: Caller) -> Attributes:
        """Change attributes of an inode for which nothing must be waited for."""
        st: os.stat_result | None = None
        if not self._changes_nothing(inode, change):
            st = self.tree.set_attributes(inode, change, caller)
        return self.tree.attributes(inode) if st is None else self.tree.view.present(inode, st)

    async def set_attributes(self, inode: Inode, change: AttributeChange, caller: Caller) -> Attributes:
        if self.must_wait_for(inode, change):
            await self.make_ready(inode, change)
        return self.set_attributes_now(inode, change, caller)

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        if flags and not inode.upper:
            self.tree.check_xattr(inode, name, flags)
        await self.copy_up(inode, ATTRIBUTES)
        self.set_xattr_now(inode, name, value, flags)

    def set_xattr_now(self, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
        """Set an attribute of an inode that has been copied up."""
        inode.bare = False
        self.tree.set_xattr(inode, name, value, flags)

    async def remove_xattr(self, inode: Inode, name: bytes) -> None:
        if self.tree.has_xattr_to_remove(inode, name):  # or ENODATA, before anything is copied up
            await self.copy_up(inode, ATTRIBUTES)
            self.tree.remove_xattr(inode, name)

    # -- files ------------------------------------------------------------------------------------------------

    def add_file(self, file: OpenFile) -> int:
        """The handle by which the kernel will name an open file."""
        handle = self._next_handle
        self._next_handle += 1
        self.files[handle] = file
        return handle

    async def open(self, inode: Inode, flags: int, caller: Caller) -> OpenFile:
        truncate = bool(flags & os.O_TRUNC)
        if truncate or flags & os.O_ACCMODE != os.O_RDONLY:
            await self.copy_up(inode, for_writing(truncate=truncate))
        if truncate and self.frees_much(inode, 0):
            await self.free(inode, 0)
        file = self.tree.open(inode, flags)
        if truncate and caller.uid != 0:
            try:
                self.tree.clear_privileges(inode, caller)
            except OSError:
                self.tree.close_file(file)
                raise
        return file

    @staticmethod
    def read_cached(fd: int, offset: int, buffer: bytearray | memoryview) -> int | None:
        """Fill ``buffer`` from the page cache; None if the disk must be waited for.

        Returns how many bytes there are, fewer than asked for only at the end of the file.
        """
        size = len(buffer)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return None
        if count < size and offset + count < os.fstat(fd).st_size:
            return None
        return count

    async def read(self, handle: int, offset: int, size: int) -> bytes | bytearray:
        """Up to ``size`` bytes, waiting for the disk in a thread."""
        fd = self.files[handle].fd
        data = bytearray(size)
        count = self.read_cached(fd, offset, data)
        if count is None:
            return await trio.to_thread.run_sync(os.pread, fd, size, offset)
        del data[count:]
        return data

    def write(self, handle: int, offset: int, data: bytes | memoryview) -> int:
        """Write all of ``data``; a short count only when the disk, or the limit, is full half-way."""
        file = self.files[handle]
        fd = file.fd
        space = self.tree.space
        try:
            if space is None:
                return self._write_all(fd, offset, data)
            return self._write_all(fd, offset, memoryview(data)[: space.fitting(fd, offset, len(data))])
        finally:
            if space is not None:
                space.written(os.fstat(fd))
            if file.inode.capability is not None:
                os.setxattr(fd, CAPABILITY, file.inode.capability)

    @staticmethod
    def _write_all(fd: int, offset: int, data: bytes | memoryview) -> int:
        written = os.pwrite(fd, data, offset)
        while written < len(data):
            more = os.pwrite(fd, memoryview(data)[written:], offset + written)
            if more == 0:
                break
            written += more
        return written

    async def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2) where space is limited."""
        fd, space = self.files[handle].fd, self.tree.space
        assert space is not None
        with space.growing(fd, space.allocation(fd, mode, offset, length)):
            await trio.to_thread.run_sync(backing_calls.fallocate, fd, mode, offset, length)

    async def copy_range(self, source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
        """copy_file_range(2) where space is limited; copies what there is room for."""
        fd, space = self.files[target].fd, self.tree.space
        assert space is not None
        length = space.fitting(fd, target_offset, length)
        with space.growing(fd, min(length + 2 * space.block_bytes, space.free_bytes)):
            return await trio.to_thread.run_sync(
                os.copy_file_range, self.files[source].fd, fd, length, source_offset, target_offset
            )

    async def fsync(self, handle: int, *, data_only: bool) -> None:
        file = self.files[handle]
        if file.inode.upper:
            await trio.to_thread.run_sync(os.fdatasync if data_only else os.fsync, file.fd)

    def release(self, handle: int) -> None:
        self.tree.close_file(self.files.pop(handle))

    # -- directories ------------------------------------------------------------------------------------------

    def open_directory(self, inode: Inode) -> int:
        """The handle of a directory opened for listing."""
        handle = self._next_handle
        self._next_handle += 1
        inode.lookups += 1  # an open directory is in use, also when the kernel forgets its name
        self.directories[handle] = OpenDir(inode)
        return handle

    def names(self, handle: int, offset: int) -> tuple[Inode, list[bytes]]:
        """The directory and its names as they were when it was rewound last, which offset 0 does."""
        directory = self.directories[handle]
        if directory.names is None or offset == 0:
            directory.names = self.tree.names(directory.inode)
        return directory.inode, directory.names

    def child(self, directory: Inode, name: bytes) -> tuple[Inode, Attributes] | None:
        """An entry of a listing; None if it was removed since."""
        try:
            return self.tree.view.child(directory, name)
        except OSError as error:
            if has_gone(error):
                return None
            raise

    def release_directory(self, handle: int) -> None:
        self.tree.forget(self.directories.pop(handle).inode, 1)

    async def sync_directory(self, handle: int) -> None:
        fd = self.tree.open_upper_directory(self.directories[handle].inode)
        if fd < 0:
            return
        try:
            await trio.to_thread.run_sync(os.fsync, fd)
        finally:
            os.close(fd)
