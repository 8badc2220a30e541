"""What each request of the kernel means for the tree, in terms of no transport.

Here alone it is decided what is copied up, whose privileges go, what is slow, and what is synced. A method returns the
result of its request or, where others would have to wait for it, a :class:`Job`: work for a thread, together with the
descriptors that it needs, and what follows it. The tree belongs to one thread, in which these methods are called.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Any, TypeVar

from unionfs.fuse_ops.copy_up.copy_up import (
    ATTRIBUTES,
    CONTENTS,
    NO_CONTENTS,
    CopyUpJob,
    CopyUpScope,
    scope_for_attributes,
    scope_for_name,
)
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.requests.job import SHORT_WAIT_S, Copying, Job
from unionfs.fuse_ops.requests.threads import LastCloses
from unionfs.fuse_ops.tree.attributes import CAPABILITY, Attributes
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, OpenDir, OpenFile, as_directory, as_file
from unionfs.fuse_ops.tree.protection import changes_inode
from unionfs.fuse_ops.union.changes import Caller
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.locks import has_writers
from unionfs.host.syscalls import fallocate


class Observer:
    """Is told what happens to files, before the answer goes out. This one does nothing: a mount without speed-ups.

    An answer never depends on an observer.
    """

    @property
    def busy(self) -> bool:
        """Whether something is read in the background just now, for which a processor is wanted."""
        return False

    def opened(self, file: OpenFile, flags: int) -> None:
        """A client opened ``file`` with ``flags``; what it reads goes through the kernel's page cache."""

    def reads(self, file: OpenFile, offset: int, size: int) -> None:
        """The kernel asks for ``size`` bytes of ``file``, which it does not have in its page cache."""

    def listed(self, directory: Inode, names: list[bytes]) -> None:
        """All ``names`` of ``directory`` were told, in this order."""


_INLINE_COPY_BYTES = 128 * 1024  # copying less than this is cheaper than handing it to a thread and back
_LONG_FREE_BYTES = 4 * 1024 * 1024  # giving back more than this takes a millisecond and more
_COPY_RANGE_BYTES = 1 << 27  # at once; a program goes on where a copy ended, unless it was killed meanwhile
_GONE = frozenset({errno.ENOENT, errno.ESTALE})
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_SHORT_SYNC_BYTES = 1024 * 1024  # by which a file grew: no more than it has to write, unless it is overwritten

T = TypeVar("T")


class UnionRequests:
    """The requests of one mount, with the files and directories that clients have open."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self.tree = tree
        self.options = options
        self.sync = options.fsync and not options.volatile
        self.observer = Observer()
        self.files: dict[int, OpenFile] = {}
        self.directories: dict[int, OpenDir] = {}
        self._next_handle = 1
        self._copying: dict[Inode, Copying] = {}
        self.last_closes = LastCloses()
        tree.inodes.close_last, tree.inodes.end_closing = self.last_closes.close, self.last_closes.wait

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

    def entry_attributes(self, inode: Inode) -> Attributes:
        """Attributes for an answer that makes the kernel remember ``inode``, which counts as a reference."""
        attributes = self.tree.attributes(inode)
        inode.lookups += 1
        return attributes

    def new_entry_attributes(self, inode: Inode) -> Attributes:
        """As :meth:`entry_attributes`, for the answer to the request that made ``inode``."""
        attributes = self.tree.view.attributes_of_new(inode)
        inode.lookups += 1
        return attributes

    # -- copy-up ----------------------------------------------------------------------------------------------

    def _when_copied_up(self, inode: Inode, scope: CopyUpScope, then: Callable[[], T | Job[T]]) -> T | Job[T]:
        """Copy ``inode`` up as far as ``scope`` says, and do ``then``; a job where others would wait for the copy.

        There is one copy at a time of each inode.
        """
        copy_up = self.tree.copy_up
        if not copy_up.requires(inode, scope):
            return then()
        going_on = self._copying.get(inode)
        if going_on is not None:
            return Job(_nothing, lambda _: self._when_copied_up(inode, scope, then), after=going_on)
        copies_data = scope.data or not self.options.metacopy
        if (
            not isinstance(inode, FileInode)
            or inode.kind != stat.S_IFREG
            or (scope.size == 0 and not inode.unsynced)
            or not copies_data
        ):
            copy_up.ensure(inode, scope)
            return then()
        st = self.tree.view.real_stat(inode)
        small = st.st_size <= _INLINE_COPY_BYTES
        synced_later = scope.later and not scope.data and copy_up.may_sync_later(inode, st)
        if small and not inode.unsynced and (not self.sync or synced_later):
            copy_up.ensure(inode, scope, st)
            return then()
        job = copy_up.begin(inode, scope, st)
        if job is None:
            return then()
        return self._copy_job(inode, job, lambda: self._when_copied_up(inode, scope, then), short=small)

    def sync_copy(self, inode: FileInode) -> Job[None] | None:
        """Bring a copy that was to be synced later to the disk, if nobody is about it already."""
        if not inode.unsynced or inode in self._copying:
            return None
        return self._copy_job(inode, self.tree.copy_up.begin_sync(inode), lambda: None)

    def _copy_job(
        self, inode: FileInode, job: CopyUpJob, then: Callable[[], T | Job[T]], *, short: bool = False
    ) -> Job[T]:
        self._copying[inode] = copying = Copying()
        job.is_wanted = copying.is_wanted
        inode.lookups += 1  # it must not be forgotten while the copy is made

        def end() -> None:
            del self._copying[inode]
            copying.done.set()
            self.tree.forget(inode, 1)

        def finish(_: object) -> Any:
            try:
                self.tree.copy_up.finish(job)
            finally:
                end()

        def failed() -> None:
            try:
                self.tree.copy_up.abort(job)
            finally:
                end()

        return Job(job.run, finish, failed=failed, then=then, short=short, copying=copying, changes=False)

    # -- large files ------------------------------------------------------------------------------------------

    def _when_freed(self, inode: Inode, size: int, then: Callable[[], T | Job[T]]) -> T | Job[T]:
        """Do ``then``, which truncates to ``size`` bytes, when a thread has done what takes long of that.

        ``then`` still has to truncate the file, which has nothing more to free by then, and to tell of errors.
        """
        if not isinstance(inode, FileInode) or not inode.upper or inode.metacopy or self.tree.space is not None:
            return then()
        if self.tree.view.real_stat(inode).st_blocks * 512 - size <= _LONG_FREE_BYTES:
            return then()
        path, _ = self.tree.view.proc_path(inode)
        return Job(lambda: self._shorten(path, size), lambda _: then())

    def _shorten(self, path: bytes, size: int) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                st = os.fstat(fd)
                os.ftruncate(fd, size)
                if self.tree.kernel_keeps_time:
                    os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            finally:
                os.close(fd)

    # -- names ------------------------------------------------------------------------------------------------

    def link(self, inode: Inode, directory: Inode, name: bytes) -> Job[None] | None:
        """Give ``inode`` the further name ``name`` in ``directory``."""
        scope = scope_for_name(unsynced=as_file(inode).unsynced)
        self.tree.protection.require_changeable(inode)
        return self._when_copied_up(inode, scope, lambda: self.tree.link(inode, directory, name))

    def rename(
        self, old_dir: Inode, old_name: bytes, new_dir: Inode, new_name: bytes, flags: int, caller: Caller
    ) -> Job[None] | None:
        """Move a name, or exchange two; ``flags`` are those of renameat2(2)."""
        move = self.tree.begin_rename(old_dir, old_name, new_dir, new_name, flags)
        for inode in move.moved:
            if isinstance(inode, FileInode):  # a directory is copied without what is in it
                scope = scope_for_name(unsynced=inode.unsynced)
                if self.tree.copy_up.requires(inode, scope):
                    # Others may have changed the names by then.
                    return self._when_copied_up(
                        inode, scope, lambda: self.rename(old_dir, old_name, new_dir, new_name, flags, caller)
                    )
        self.tree.finish_rename(move, caller)
        return self._searched_links()

    def unlink(self, directory: Inode, name: bytes) -> Job[None] | None:
        """Remove a name that is not a directory's."""
        self.tree.unlink(directory, name)
        return self._searched_links()

    def _searched_links(self) -> Job[None] | None:
        """Look for further names of a file of which the last known one was removed, where there may be such."""
        links = self.tree.hard_links
        search = links.begin_search()
        if search is None:
            return None
        return Job(search, links.finish_search, failed=lambda: links.finish_search(None))

    # -- attributes -------------------------------------------------------------------------------------------

    def set_attributes(
        self, inode: Inode, change: AttributeChange, caller: Caller, *, kill: bool = False
    ) -> Attributes | Job[Attributes]:
        """Change attributes; with ``kill`` the file loses what a write takes from it. Returns what they are then."""

        def then() -> Attributes:
            return self._set_attributes(inode, change, caller, kill=kill)

        if change.kills_privileges or self._changes_nothing(inode, change):
            return then()
        self.tree.check_change(inode, change)
        size = change.size
        if size is None:
            if inode.upper:
                return then()
            return self._when_copied_up(inode, scope_for_attributes(None), then)
        return self._when_copied_up(inode, scope_for_attributes(size), lambda: self._when_freed(inode, size, then))

    def _changes_nothing(self, inode: Inode, change: AttributeChange) -> bool:
        # The kernel's writeback cache writes a changed ctime back as "this mtime, please": after an unlink of a lower
        # file, say. There is nothing to do, and above all nothing to copy up.
        if not self.tree.kernel_keeps_time:
            return False
        return change.only_mtime and change.mtime_ns == self.tree.attributes(inode).mtime_ns

    def _set_attributes(self, inode: Inode, change: AttributeChange, caller: Caller, *, kill: bool) -> Attributes:
        st: os.stat_result | None = None
        if not self._changes_nothing(inode, change):
            st = self.tree.set_attributes(inode, change, caller)
        if kill and change.uid is None and change.gid is None:  # a change of owner clears them anyhow
            self.tree.clear_privileges(inode, caller)
            st = None
        return self.tree.attributes(inode) if st is None else self.tree.view.present(inode, st)

    def set_xattr(
        self, inode: Inode, name: bytes, value: bytes, flags: int, caller: Caller, *, drops_setgid: bool = False
    ) -> Job[None] | None:
        """Set an extended attribute; ``drops_setgid`` if it is an ACL and ``caller`` is not in the file's group."""
        self.tree.protection.require_changeable(inode)
        if flags and not inode.upper:
            self.tree.check_xattr(inode, name, flags)

        def then() -> None:
            inode.kernel.has_no_xattrs = False
            self.tree.set_xattr(inode, name, value, flags)
            if drops_setgid:
                mode = stat.S_IMODE(self.tree.attributes(inode).mode)
                if mode & stat.S_ISGID:
                    self.tree.set_attributes(inode, AttributeChange(mode=mode & ~stat.S_ISGID), caller)

        return self._when_copied_up(inode, ATTRIBUTES, then)

    def remove_xattr(self, inode: Inode, name: bytes) -> Job[None] | None:
        """Remove an extended attribute; raises ENODATA, before anything is copied up, where there is none."""
        if not inode.upper and not self.tree.has_xattr_to_remove(inode, name):
            return None
        return self._when_copied_up(inode, ATTRIBUTES, lambda: self.tree.remove_xattr(inode, name))

    def control(self, inode: Inode, command: int, data: bytes, out_size: int) -> bytes | Job[bytes]:
        """An ioctl(2) of those that :func:`knows_ioctl` knows; returns its output."""

        def then() -> bytes:
            return self.tree.control(inode, command, data, out_size)

        return self._when_copied_up(inode, ATTRIBUTES, then) if changes_inode(command) else then()

    # -- files ------------------------------------------------------------------------------------------------

    def add_file(self, file: OpenFile, flags: int, *, cached: bool) -> int:
        """The handle by which the kernel will name a file that a client opened with ``flags``.

        ``cached`` if the kernel may keep its contents.
        """
        handle = self._next_handle
        self._next_handle += 1
        self.files[handle] = file
        if cached:
            self.observer.opened(file, flags)
        return handle

    def open(self, inode: Inode, flags: int, caller: Caller, *, kill: bool = False) -> OpenFile | Job[OpenFile]:
        """Open a file; with ``kill``, the kernel wants it to lose what a write takes from it."""
        if flags & (os.O_TRUNC | os.O_ACCMODE) == os.O_RDONLY:
            return self.tree.open(inode, flags)
        truncate = bool(flags & os.O_TRUNC)
        self.tree.protection.require_writable(inode, flags)

        def then() -> OpenFile:
            file = self.tree.open(inode, flags)
            # Without HANDLE_KILLPRIV_V2 the kernel leaves it to us what a truncation takes from the file.
            if kill or (truncate and caller.uid != 0):
                try:
                    self.tree.clear_privileges(inode, caller)
                except OSError:
                    self.tree.close_file(file)
                    raise
            return file

        if not truncate:
            return self._when_copied_up(inode, CONTENTS, then)
        if inode in self._copying or (isinstance(inode, FileInode) and inode.unsynced):
            return self._when_copied_up(inode, NO_CONTENTS, lambda: self._when_freed(inode, 0, then))
        return self._when_freed(inode, 0, then)

    @staticmethod
    def is_open_for_writing(inode: Inode) -> bool:
        """Whether a program has ``inode`` open for writing, as far as we are told."""
        return isinstance(inode, FileInode) and any(file.writable for file in inode.handles or ())

    def is_written(self, inode: Inode) -> bool:
        """Whether somebody can write to the upper file ``inode``, if only through a mapping."""
        if self.is_open_for_writing(inode):
            return True
        path, follow = self.tree.view.proc_path(inode)
        return has_writers(path, follow=follow)

    def blocks_will_lie(self, file: OpenFile) -> bool:
        """Whether the kernel may know ``file``, just opened, as one without a block, and go on with that.

        It shows the size that a file has in its cache, and the blocks that it was told: tar(1) takes a file without
        a block for one without data (:meth:`MergedView.present` says otherwise, if it is asked).
        """
        return self.tree.kernel_keeps_time and file.writable and not os.fstat(file.fd).st_blocks

    @staticmethod
    def read_cached(fd: int, buffer: bytearray | memoryview, offset: int) -> int | None:
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

    def file_to_read(self, handle: int, offset: int, size: int) -> OpenFile:
        """The file behind ``handle``, of which the kernel asks for ``size`` bytes."""
        file = self.files[handle]
        self.observer.reads(file, offset, size)
        return file

    def read(self, handle: int, offset: int, size: int) -> bytes | bytearray | Job[bytes | bytearray]:
        """Up to ``size`` bytes, in any kind of buffer; a job where the disk must be waited for."""
        fd = self.file_to_read(handle, offset, size).fd
        data = bytearray(size)
        count = self.read_cached(fd, data, offset)
        if count is None:
            return Job(lambda: os.pread(fd, size, offset), changes=False)
        del data[count:]
        return data

    def write(self, handle: int, offset: int, data: bytes | memoryview) -> int:
        """Write all of ``data``; a short count only when the disk, or the limit, is full half-way."""
        file = self.files[handle]
        fd = file.fd
        if file.appends and offset < os.fstat(fd).st_size:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        space = self.tree.space
        try:
            if space is not None:
                data = memoryview(data)[: space.fitting(fd, offset, len(data))]
            return self._write_all(fd, offset, data)
        finally:
            # Whatever becomes of this, the answer is that of the write.
            with contextlib.suppress(OSError):
                if space is not None:
                    space.written(os.fstat(fd))
            with contextlib.suppress(OSError):
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

    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> Job[None] | None:
        """fallocate(2)."""
        fd, space = self.files[handle].fd, self.tree.space
        self.tree.protection.require_allocatable(self.files[handle].inode, mode)
        grown = 0 if space is None else space.allocation(fd, mode, offset, length)
        return self._growing(fd, grown, lambda: fallocate(fd, mode, offset, length))

    def copy_range(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> int | Job[int]:
        """copy_file_range(2), of as much as there is room for; returns how many bytes were copied."""
        source_fd, fd, space = self.files[source].fd, self.files[target].fd, self.tree.space
        length = min(length, _COPY_RANGE_BYTES)
        grown = 0
        if space is not None:
            length = space.fitting(fd, target_offset, length)
            grown = min(length + 2 * space.block_bytes, space.free_bytes)
        return self._growing(fd, grown, lambda: os.copy_file_range(source_fd, fd, length, source_offset, target_offset))

    def _growing(self, fd: int, size_bytes: int, run: Callable[[], T]) -> Job[T]:
        """A job that makes the file ``fd`` grow by at most ``size_bytes``, which nobody else gets meanwhile."""
        space = self.tree.space
        if space is None:
            return Job(run)
        ino = os.fstat(fd).st_ino
        space.expect(ino, size_bytes)

        def end() -> None:
            space.arrived(ino, size_bytes)
            with contextlib.suppress(OSError):  # whatever the request was, it has been done
                space.written(os.fstat(fd))

        def finish(result: T) -> T:
            end()
            return result

        return Job(run, finish, failed=end)

    def seek(
        self, handle: int, offset: int, whence: int, write_back: Callable[[], None] | None = None
    ) -> int | Job[int]:
        """Where the next data or the next hole is, ``whence`` being SEEK_DATA or SEEK_HOLE.

        The kernel asks without having written what it has in its cache, which may be all that the file has.
        ``write_back`` makes it do so; None where it caches nothing of this file.
        """
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file = self.files[handle]
        fd = file.fd
        if write_back is None or not self.is_open_for_writing(file.inode):
            return os.lseek(fd, offset, whence)
        first = write_back

        def run() -> int:
            first()
            return os.lseek(fd, offset, whence)

        return Job(run, changes=False)

    def fsync(self, handle: int, *, data_only: bool) -> Job[None] | None:
        """Bring a file to the disk. ENOSYS where the options say not to: the kernel then takes it for done."""
        self._check_sync()
        file = self.files[handle]
        if not file.inode.upper:
            return None
        fd, sync = file.fd, os.fdatasync if data_only else os.fsync
        # Not fstat(2): it shows a time, so the next write has to give the file a later one (multigrain timestamps,
        # Linux 6.13), and the next sync has to write the inode for that.
        size = os.lseek(fd, 0, os.SEEK_END)
        grown = size - file.synced_size

        def run() -> None:
            start = time.perf_counter()
            sync(fd)
            # A database, say, which is large and has little to write each time.
            file.synced_size = size if time.perf_counter() - start <= SHORT_WAIT_S else 0

        return Job(run, short=grown <= _SHORT_SYNC_BYTES, changes=False)

    def _check_sync(self) -> None:
        if not self.sync:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def release(self, handle: int) -> None:
        self.tree.close_file(self.files.pop(handle))

    # -- directories ------------------------------------------------------------------------------------------

    def open_directory(self, inode: Inode) -> int:
        """The handle of a directory opened for listing."""
        directory = as_directory(inode)
        handle = self._next_handle
        self._next_handle += 1
        inode.lookups += 1  # an open directory is in use, also when the kernel forgets its name
        self.directories[handle] = OpenDir(directory)
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

    def sync_directory(self, inode: Inode, *, data_only: bool) -> Job[None] | None:
        """Bring a directory to the disk; with ``data_only`` without its times. ENOSYS as for :meth:`fsync`."""
        self._check_sync()
        self.tree.place_found_links()
        fd = self.tree.open_upper_directory(inode)
        if fd < 0:
            return None
        sync = os.fdatasync if data_only else os.fsync

        def run() -> None:
            try:
                sync(fd)
            finally:
                os.close(fd)

        return Job(run, short=True, changes=False)


def _nothing() -> None:
    pass


def has_gone(error: OSError) -> bool:
    """Whether a listed name that could not be looked up was removed since, and is to be left out."""
    return error.errno in _GONE


def is_listed_bare(error: OSError) -> bool:
    """Whether a name that could not be looked up is still one of its directory's: the fault is its own.

    So one damaged or forbidden entry, say with an invalid redirect, does not hide those beside it.
    """
    return error.errno not in _GONE and error.errno not in _NO_ROOM
