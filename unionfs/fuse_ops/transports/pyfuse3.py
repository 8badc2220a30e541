"""The transport that works with every kernel: the only place that speaks pyfuse3's types.

pyfuse3 ends its loop at any exception but FUSEError, so every handler is wrapped. What libfuse prints becomes one line.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from unionfs.errors import MountError
from unionfs.fuse_ops.options import MountOptions, default_fuse_options
from unionfs.fuse_ops.requests.job import Job, Waiter, completed
from unionfs.fuse_ops.requests.union_requests import UnionRequests, is_listed_bare
from unionfs.fuse_ops.speedups.late_sync import LateSync
from unionfs.fuse_ops.speedups.reading_ahead import EarlyPages
from unionfs.fuse_ops.transports.mounting import explained
from unionfs.fuse_ops.tree.attributes import Attributes
from unionfs.fuse_ops.tree.inodes import UNKNOWN_INO, Inode, OpenFile
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.mounts import SUBTYPE

_LOOK_AGAIN_S: Final = 50e-6
_TURN_S: Final = 2e-3  # how long to serve before trio's other tasks get their turn


class QuickLock:
    """A lock of trio's tasks that is free to take while it is free: no turn of the scheduler."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False
        self._waiting.unpark()


class PatientWait:
    """trio's ``wait_readable`` for the one descriptor that requests come from."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._fd = -1
        self._last_request = 0.0
        self._turn_began = 0.0

    async def wait_readable(self, fd: int) -> None:
        """Return when ``fd`` can be read; raises trio.ClosedResourceError when it is closed."""
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        now = time.perf_counter
        if now() - self._turn_began < _TURN_S:
            until = now() + _LOOK_AGAIN_S
            while True:
                if self._poll.poll(0):
                    return
                if now() > until:
                    break
        await trio.lowlevel.wait_readable(fd)
        self._turn_began = now()


def wait_awake() -> None:
    """Put a wait that looks again before it sleeps in the place of what pyfuse3 takes from trio.

    Programs send their requests one after the other. A server that sleeps between two of them is woken for each, which
    takes longer than most answers; one that looks again for some tens of microseconds finds the next request there. An
    idle mount sleeps as before. pyfuse3 looks trio up under a name in its own module, so that ``pyfuse3.asyncio`` can
    put something else in its place.
    """
    lowlevel = SimpleNamespace(
        wait_readable=PatientWait().wait_readable,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
        notify_closing=trio.lowlevel.notify_closing,
    )
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=QuickLock,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        from_thread=trio.from_thread,
        lowlevel=lowlevel,
    )


log = logging.getLogger(__name__)

_NOW_NS: Final = 100_000_000

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


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


async def _result(outcome: T | Job[T], ctx: pyfuse3.RequestContext) -> T:
    """The result of a request, which ends with EINTR when the program that sent it is killed while a file is copied."""
    return await completed(outcome, waiter=Waiter(ctx.pid))


class UnionOperations(pyfuse3.Operations):
    """The file system of one mount on pyfuse3."""

    supports_dot_lookup = False

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        super().__init__()
        self.enable_writeback_cache = options.writeback and not tree.read_only
        self.enable_acl = options.acl and options.xattrs
        self.requests = self._requests = UnionRequests(tree, options)
        if "pages" in options.speedups:
            self.requests.observer = EarlyPages(_store_pages, self._requests.read_cached)
        self._tree = tree
        self._timeout_s = options.timeout_s
        self._keep_cache = options.timeout_s > 0
        self._xattrs = options.xattrs

    # -- answers ----------------------------------------------------------------------------------------------

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
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

    def _remembered(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return self._entry(self._requests.entry_attributes(inode))

    def _made(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return self._entry(self._requests.new_entry_attributes(inode))

    def _file_info(self, file: OpenFile, flags: int) -> pyfuse3.FileInfo:
        handle = pyfuse3.FileHandleT(self._requests.add_file(file, flags, cached=self._keep_cache))
        # Of an append-only file we have to see at which offset each write is.
        return pyfuse3.FileInfo(fh=handle, direct_io=file.appends, keep_cache=self._keep_cache and not file.appends)

    # -- names ------------------------------------------------------------------------------------------------

    @_handler
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode = self._tree.find(self._requests.inode(parent_inode), name)
        if inode is None:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = pyfuse3.InodeT(0)  # a miss for the kernel to remember
            entry.entry_timeout = self._timeout_s
            return entry
        return self._remembered(inode)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for ino, count in inode_list:
            try:
                self._requests.forget(ino, count)
            except Exception:
                log.exception("forget of %d failed", ino)

    @_handler
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._made(self._tree.mknod(self._requests.inode(parent_inode), name, mode, rdev, ctx))

    @_handler
    async def mkdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._made(self._tree.mkdir(self._requests.inode(parent_inode), name, mode, ctx))

    @_handler
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return self._made(self._tree.symlink(self._requests.inode(parent_inode), name, target, ctx))

    @_handler
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._requests.inode(inode)
        await _result(self._requests.link(node, self._requests.inode(new_parent_inode), new_name), ctx)
        return self._remembered(node)

    @_handler
    async def unlink(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await _result(self._requests.unlink(self._requests.inode(parent_inode), name), ctx)

    @_handler
    async def rmdir(self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext) -> None:
        self._tree.rmdir(self._requests.inode(parent_inode), name)

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
        old_dir, new_dir = self._requests.inode(parent_inode_old), self._requests.inode(parent_inode_new)
        await _result(self._requests.rename(old_dir, name_old, new_dir, name_new, flags, ctx), ctx)

    @_handler
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(self._tree.readlink(self._requests.inode(inode)))

    # -- attributes -------------------------------------------------------------------------------------------

    @_handler
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._tree.attributes(self._requests.inode(inode)))

    @_handler
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = AttributeChange(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            # libfuse puts the time in the place of "now".
            to_now=fields.update_atime and abs(time.time_ns() - attr.st_atime_ns) < _NOW_NS,
        )
        return self._entry(await _result(self._requests.set_attributes(self._requests.inode(inode), change, ctx), ctx))

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
        return self._tree.get_xattr(self._requests.inode(inode), name)

    @_handler
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        self._require_xattrs()
        return [pyfuse3.XAttrNameT(name) for name in self._tree.list_xattrs(self._requests.inode(inode), ctx)]

    @_handler
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._require_xattrs()
        await _result(self._requests.set_xattr(self._requests.inode(inode), name, value, 0, ctx), ctx)

    @_handler
    async def removexattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> None:
        self._require_xattrs()
        await _result(self._requests.remove_xattr(self._requests.inode(inode), name), ctx)

    # -- files ------------------------------------------------------------------------------------------------

    @_handler
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode, file = self._tree.create(self._requests.inode(parent_inode), name, mode, flags, ctx)
        return self._file_info(file, flags), self._made(inode)

    @_handler
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        file = await _result(self._requests.open(self._requests.inode(inode), flags, ctx), ctx)
        info = self._file_info(file, flags)
        if self._requests.blocks_will_lie(file):
            pyfuse3.invalidate_inode(inode, attr_only=True)
        return info

    @_handler
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        outcome: Any = self._requests.read(fh, off, size)  # any buffer will do for pyfuse3
        return cast("bytes", await completed(outcome))

    @_handler
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        return self._requests.write(fh, off, buf)

    @_handler
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # nothing is buffered here: the kernel need not say so again

    @_handler
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._requests.release(fh)

    @_handler
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await completed(self._requests.fsync(fh, data_only=datasync))

    # -- directories ------------------------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(self._requests.open_directory(self._requests.inode(inode)))

    @_handler
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory, names = self._requests.names(fh, start_id)
        dots = ((b".", directory), (b"..", directory.parent or directory))
        for position, (dot, inode) in enumerate(dots):
            if start_id <= position:
                entry = self._entry(self._tree.attributes(inode))
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(dot), entry, position + 1):
                    return
        for position in range(max(start_id - 2, 0), len(names)):
            name = pyfuse3.FileNameT(names[position])
            try:
                child = self._requests.child(directory, names[position])
            except OSError as error:
                if not is_listed_bare(error):
                    raise
                # pyfuse3 cannot say "without attributes", but with these no file could be: the kernel takes the name
                # alone. It forgets the number, which no inode has.
                bare = pyfuse3.EntryAttributes()
                bare.st_ino, bare.st_mode = pyfuse3.InodeT(UNKNOWN_INO), pyfuse3.ModeT(0)
                if not pyfuse3.readdir_reply(token, name, bare, position + 3):
                    return
                continue
            if child is None:
                continue
            inode, attributes = child
            if not pyfuse3.readdir_reply(token, name, self._entry(attributes), position + 3):
                return
            inode.lookups += 1

    @_handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._requests.release_directory(fh)

    @_handler
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        inode = self._requests.directories[fh].inode
        await completed(self._requests.sync_directory(inode, data_only=datasync))

    @_handler
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # default_permissions: the kernel decides


def _store_pages(inode: Inode, contents: memoryview) -> None:
    pyfuse3.notify_store(pyfuse3.InodeT(inode.ino), 0, bytes(contents))


class Pyfuse3Transport:
    """Serves ``operations`` through pyfuse3; there can be only one in a process. ``late_sync`` runs beside it."""

    name = "pyfuse3"
    _serving: ClassVar[Pyfuse3Transport | None] = None

    def __init__(
        self, operations: pyfuse3.Operations, options: MountOptions, late_sync: LateSync | None = None
    ) -> None:
        self._operations = operations
        self._late_sync = late_sync
        self._options = options

    def mount(self, target: str) -> None:
        """Mount on ``target``; raises MountError with what libfuse said."""
        if Pyfuse3Transport._serving is not None:
            raise MountError(
                f"cannot mount on {target}: pyfuse3 serves one mount in a process; "
                "use transport=direct, or another process"
            )
        options = self._options
        words = {
            *(options.fuse_options or default_fuse_options()),
            f"fsname={_libfuse_value(options.source)}",
            f"subtype={SUBTYPE}",
        }
        if options.debug:
            words.add("debug")
        said: list[str] = []
        try:
            with _captured_stderr(said):
                pyfuse3.init(self._operations, target, words)
        except RuntimeError:
            raise MountError(f"cannot mount on {target}: {explained(' '.join(said))}") from None
        Pyfuse3Transport._serving = self
        if said:
            print("\n".join(said), file=sys.stderr)

    async def serve(self, accepted: Callable[[], None], gone: Callable[[], None]) -> None:
        """See :meth:`Transport.serve`."""
        initialize = self._operations.init

        def init() -> None:
            initialize()
            accepted()

        self._operations.init = init  # type: ignore[method-assign]
        if "polling" in self._options.speedups:
            wait_awake()
        if self._late_sync is None:
            await pyfuse3.main()
            gone()
        else:
            await self._late_sync.run_beside(lambda _: pyfuse3.main(), gone)

    def close(self) -> None:
        """Close /dev/fuse, leaving the mount to the session."""
        if Pyfuse3Transport._serving is self:
            Pyfuse3Transport._serving = None
            pyfuse3.close(unmount=False)


def _libfuse_value(text: str) -> str:
    """``text`` for libfuse's option parser; pyfuse3 hands on ASCII only, and this name is just for the eye."""
    return re.sub(r"[\\,]", r"\\\g<0>", text.encode("ascii", "replace").decode())


@contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what libfuse and fusermount3 print: they do so by themselves, and in several lines."""
    sys.stderr.flush()
    saved = os.dup(2)
    with os.fdopen(os.memfd_create("libfuse"), "r+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += [line.strip() for line in file if line.strip()]
