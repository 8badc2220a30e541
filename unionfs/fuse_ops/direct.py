"""The transport that reads /dev/fuse itself: what pyfuse3 cannot express, with less time per request.

One task reads requests and answers most of them on the spot; those that wait for the disk are answered by a thread,
and those that go on with the tree after that become tasks of their own. After a request the reader looks again for a
moment before it goes to sleep: programs send their requests one after the other, and waking up takes longer than
answering.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import select
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import trio

from unionfs.fuse_ops import backing_calls, early_pages, mounting
from unionfs.fuse_ops import protocol as p
from unionfs.fuse_ops.attributes import ACL_NAMES
from unionfs.fuse_ops.beside_client import LOOK_EVERY, SLOW_ANSWER_S, BesideClient
from unionfs.fuse_ops.direct_listing import DirectListing
from unionfs.fuse_ops.direct_request import Request
from unionfs.fuse_ops.file_ahead import FileReadAhead
from unionfs.fuse_ops.inodes import Inode
from unionfs.fuse_ops.metadata import AttributeChange
from unionfs.fuse_ops.open_files import OpenFile
from unionfs.fuse_ops.options import MountOptions, default_fuse_words
from unionfs.fuse_ops.packed_attributes import PackedAttributes, pack
from unionfs.fuse_ops.passthrough import Passthrough
from unionfs.fuse_ops.patience import Patience
from unionfs.fuse_ops.protocol import Init, Opcode, Open, SetAttr
from unionfs.fuse_ops.requests import UnionRequests
from unionfs.fuse_ops.syscalls import RENAME_EXCHANGE
from unionfs.fuse_ops.tree import UnionTree
from unionfs.fuse_ops.waiting_calls import WaitingCalls

log = logging.getLogger(__name__)

_MAX_WRITE: Final = 1 << 20  # bytes; the kernel's limit is 256 pages
_BUFFER_SIZE: Final = _MAX_WRITE + 4096
_LOOK_AGAIN_S: Final = 50e-6  # how long to look for the next request before sleeping
_TURN_S: Final = 2e-3  # how long to serve before other tasks get their turn
_LONG_TURN_S: Final = 10e-3  # the same when there are none that wait for it
_STAY_MS: Final = 2  # how long to stay there when it sends nothing
_LONG_READ: Final = 32 * 1024  # bytes; a program that reads so much has work to do meanwhile
_SHORT_READ: Final = 128 * 1024  # bytes; one disk access, or what the kernel reads ahead at once
_SHORT_SYNC: Final = 1024 * 1024  # bytes of a file: it cannot have much to write that nobody has waited for yet
_TIMEOUT_MAX: Final = 2**63 - 1
_CAPABILITY: Final = b"security.capability"
_NO_REPLY: Final = b""
_ENTRY_SIZE: Final = p.ENTRY_REPLY.size + p.ATTR.size
_ATTR_SIZE: Final = p.ATTR_REPLY.size + p.ATTR.size
_NO_ATTRIBUTES: Final = bytes(p.ATTR.size)
# Requests that no program waits for: the kernel sends them by itself.
_NOBODYS: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.INTERRUPT})
# Those that may have to read from the disk.
_READS: Final = frozenset(
    {Opcode.LOOKUP, Opcode.OPEN, Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS, Opcode.READLINK}
)

Answer = bytes | Coroutine[Any, Any, bytes]


class DirectTransport:
    """Serves a tree on a /dev/fuse of its own."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self._tree = tree
        self._ahead = tree.view.lower.ahead
        self._packed = PackedAttributes(tree.view)
        self._options = options
        self.requests = UnionRequests(tree, options)
        self._fd = -1
        self._passthrough: Passthrough | None = None
        self._accepted: Callable[[], None] = lambda: None
        self._tell = log.isEnabledFor(logging.DEBUG)
        self._waiting = 0  # requests that are tasks of their own
        self._calls = WaitingCalls()
        self._beside = BesideClient()
        self._ready = select.poll()
        self.patience = self.requests.patience = Patience()
        seconds = min(options.timeout_s, 1e18)
        self._valid_s = int(seconds)
        self._valid_ns = int((seconds - self._valid_s) * 1e9)
        self._keep_cache = int(Open.KEEP_CACHE) if options.timeout_s > 0 else 0
        self._files_ahead = FileReadAhead()
        self._listing = DirectListing(tree, self._packed, self._valid_s, self._valid_ns, self._files_ahead)
        self._handlers: dict[int, Callable[[Request], Answer]] = defaultdict(lambda: self._unknown)
        for code, handler in self._table().items():
            self._handlers[code] = handler

    def _table(self) -> dict[Opcode, Callable[[Request], Answer]]:
        table: dict[Opcode, Callable[[Request], Answer]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.STATX: self._statx,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.RELEASE: self._release,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
            Opcode.IOCTL: self._ioctl,
            Opcode.STATFS: self._statfs,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._empty,
            Opcode.INIT: self._init,
            Opcode.INTERRUPT: lambda request: _NO_REPLY,  # what is going on ends by itself, soon
            Opcode.DESTROY: self._empty,
        }
        # What has no handler is answered with ENOSYS, after which the kernel does not ask again: FLUSH (nothing is
        # buffered here), ACCESS (default_permissions), and these where the options say so.
        if self.requests.sync:
            table |= {Opcode.FSYNC: self._fsync, Opcode.FSYNCDIR: self._fsyncdir}
        if self._options.xattrs:
            table |= {
                Opcode.GETXATTR: self._getxattr,
                Opcode.LISTXATTR: self._listxattr,
                Opcode.SETXATTR: self._setxattr,
                Opcode.REMOVEXATTR: self._removexattr,
            }
        return table

    @property
    def name(self) -> str:
        return "direct" if self._passthrough is None else "direct, passthrough"

    def mount(self, target: str) -> None:
        """Mount on ``target``, or take over the /dev/fuse of a mount made by mount.fuse3."""
        handed_over = re.fullmatch(r"/dev/fd/(\d+)", target)
        if handed_over:
            self._fd = int(handed_over.group(1))
            os.set_inheritable(self._fd, False)
        else:
            self._fd = mounting.mount(target, self._options.fuse_words or default_fuse_words(), self._options.source)
        os.set_blocking(self._fd, False)

    # -- the loop ---------------------------------------------------------------------------------------------

    async def serve(self, accepted: Callable[[], None]) -> None:
        """Answer requests until the mount is gone; ``accepted`` is called once the kernel has accepted the session."""
        self._accepted = accepted
        self._ready.register(self._fd, select.POLLIN)
        # Memory of which only the pages count that requests have filled: most mounts never see a large write.
        buffer = memoryview(mmap.mmap(-1, _BUFFER_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        try:
            async with trio.open_nursery() as nursery:
                while await self._turn(buffer, nursery):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        finally:
            self._beside.close()
            # Descriptors that a thread reads from or answers to must not be closed yet. Where there is none, none is
            # made for it: a supervisor's copy, which rehearses this, has to stay a process of one thread.
            if self._calls.has_threads:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._calls.close)

    async def _turn(self, view: memoryview, nursery: trio.Nursery) -> bool:
        """Serve for a while; false when the mount is gone."""
        fd = self._fd
        now = time.perf_counter
        beside = self._beside
        ready = self._ready
        until = now() + _LONG_TURN_S
        last = 0.0
        while True:
            try:
                size = os.readv(fd, [view])
            except BlockingIOError:
                if beside.active:
                    if not self._waiting and ready.poll(_STAY_MS):
                        beside.slept()
                        continue
                    beside.leave()
                # Others may be waiting for this thread; if not, the next request is probably on its way.
                if self._waiting or now() - last > _LOOK_AGAIN_S:
                    await trio.lowlevel.wait_readable(fd)
                    beside.slept()
                    until = now() + _LONG_TURN_S
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return False
                if error.errno in (errno.EINTR, errno.ENOENT):  # a request that was taken back
                    continue
                raise
            begun = now()
            self.dispatch(view[:size], nursery)
            last = now()
            if last - begun > SLOW_ANSWER_S and p.IN_HEADER.unpack_from(view)[1] in _READS:
                beside.answered_slowly()
            if last > until or (self._waiting and last > until - _LONG_TURN_S + _TURN_S):
                return True

    def dispatch(self, message: memoryview, nursery: trio.Nursery) -> None:
        """Answer the request in ``message``, now or in a task of ``nursery``."""
        _, code, unique, node, uid, gid, pid, _, _ = p.IN_HEADER.unpack_from(message)
        body: bytes | memoryview = message[p.IN_HEADER.size :]
        if code != Opcode.WRITE:
            body = bytes(body)  # the buffer is used again
        if code not in _NOBODYS:
            before = self.patience.request_from(pid)
            if not before % LOOK_EVERY:
                if self._ahead.active:  # the disk is busy, and so are others
                    before = 0
                self._beside.consider(pid, before)
        request = Request(unique, node, uid, gid, pid, body)
        if self._tell:
            log.debug("%s of %#x by process %d: %r", _name(code), node, pid, bytes(body[:80]))
        try:
            answer = self._handlers[code](request)
            if not isinstance(answer, bytes):
                self._beside.leave()  # it goes on in threads, which would inherit the place
                self._waiting += 1
                nursery.start_soon(self._wait_for, request, code, answer)
                return
        except Exception as error:
            answer = self._failure(request, code, error)
        self._reply(answer)

    async def _wait_for(self, request: Request, code: int, answer: Coroutine[Any, Any, bytes]) -> None:
        try:
            reply = await answer
        except Exception as error:
            reply = self._failure(request, code, error)
        finally:
            self._waiting -= 1
        self._reply(reply)

    def _answer_in_thread(self, request: Request, code: int, call: Callable[[], bytes]) -> bytes:
        """Let a thread answer with what ``call`` returns, which waits for the disk and knows nothing of the tree."""

        def answer() -> None:
            try:
                reply = call()
            except Exception as error:
                reply = self._failure(request, code, error)
            self._reply(reply)

        self._beside.leave()
        self._calls.start(answer)
        return _NO_REPLY

    def _failure(self, request: Request, code: int, error: Exception) -> bytes:
        number = errno.EIO
        if isinstance(error, OSError) and error.errno:
            number = error.errno
            if self._tell:
                log.debug("%s of %#x: %s", _name(code), request.node, error)
        else:
            log.error("%s of %#x failed; the program gets EIO", _name(code), request.node, exc_info=error)
        return p.OUT_HEADER.pack(p.OUT_HEADER.size, -number, request.unique)

    def _reply(self, answer: bytes) -> None:
        if not answer:
            return
        try:
            os.write(self._fd, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the program was killed, or the mount is gone
                log.warning("the kernel does not take an answer: %s", error)

    # -- answers ----------------------------------------------------------------------------------------------

    def _unknown(self, request: Request) -> bytes:
        return p.OUT_HEADER.pack(p.OUT_HEADER.size, -errno.ENOSYS, request.unique)

    def _empty(self, request: Request) -> bytes:
        return p.OUT_HEADER.pack(p.OUT_HEADER.size, 0, request.unique)

    @staticmethod
    def _data(request: Request, data: bytes | bytearray) -> bytes:
        return p.OUT_HEADER.pack(p.OUT_HEADER.size + len(data), 0, request.unique) + data

    def _entry(self, request: Request, inode: Inode) -> bytes:
        return self._entry_with(request, inode, self._packed.of(inode))

    def _entry_with(self, request: Request, inode: Inode, packed: bytes) -> bytes:
        inode.lookups += 1
        s, ns = self._valid_s, self._valid_ns
        return p.ENTRY_REPLY.pack(_ENTRY_SIZE, 0, request.unique, inode.ino, 0, s, s, ns, ns) + packed

    def _attr_reply(self, request: Request, packed: bytes) -> bytes:
        return p.ATTR_REPLY.pack(_ATTR_SIZE, 0, request.unique, self._valid_s, self._valid_ns, 0) + packed

    # -- session ----------------------------------------------------------------------------------------------

    def _init(self, request: Request) -> bytes:
        major, minor, readahead, flags, flags2 = p.INIT_IN.unpack_from(request.body)
        if major != p.MAJOR or minor < 36:
            raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}")
        offered = flags | flags2 << 32
        options = self._options
        wanted = (
            Init.ASYNC_READ
            | Init.ATOMIC_O_TRUNC
            | Init.BIG_WRITES
            | Init.DONT_MASK
            | Init.IOCTL_DIR
            | Init.DO_READDIRPLUS
            | Init.ASYNC_DIO
            | Init.PARALLEL_DIROPS
            | Init.MAX_PAGES
            | Init.CACHE_SYMLINKS
            | Init.EXPLICIT_INVAL_DATA
            | Init.SETXATTR_EXT
            | Init.INIT_EXT
        )
        if options.acl and options.xattrs:
            wanted |= Init.POSIX_ACL
        if "default_permissions" in (options.fuse_words or default_fuse_words()):
            wanted |= Init.ALLOW_IDMAP  # the kernel takes it only where it checks permissions by itself
        # Either the kernel writes to upper files by itself, or it caches what is written: it does not do both.
        privileged = backing_calls.may_pass_through()
        # What is passed through needs its descriptor at once, and without an upper directory everything may be.
        self._tree.opens_late = privileged and not self._tree.read_only
        if options.passthrough and offered & Init.PASSTHROUGH and privileged:
            wanted |= Init.PASSTHROUGH | Init.HANDLE_KILLPRIV_V2
            self._passthrough = Passthrough(self._fd, read_only=self._tree.read_only)
        elif options.writeback and not self._tree.read_only:
            wanted |= Init.WRITEBACK_CACHE
        self._tree.use_writeback_cache(bool(wanted & Init.WRITEBACK_CACHE))
        agreed = int(wanted) & offered
        reply = p.INIT_REPLY.pack(
            p.INIT_REPLY.size,
            0,
            request.unique,
            p.MAJOR,
            min(minor, p.MINOR),
            readahead,
            agreed & 0xFFFF_FFFF,
            64,  # requests that the kernel sends ahead, such as readahead
            48,
            _MAX_WRITE,
            1,  # ns: granularity of times
            _MAX_WRITE // 4096,
            0,
            agreed >> 32,
            1 if self._passthrough is not None else 0,  # how deep a stack of file systems may be on top of it
            0,
            *(0,) * 11,
        )
        self._accepted()
        return reply

    def _statfs(self, request: Request) -> bytes:
        st = self._tree.statfs()
        return p.STATFS_REPLY.pack(
            p.STATFS_REPLY.size,
            0,
            request.unique,
            st.f_blocks,
            st.f_bfree,
            st.f_bavail,
            st.f_files,
            st.f_ffree,
            st.f_bsize,
            st.f_namemax,
            st.f_frsize,
            0,
            *(0,) * 6,
        )

    # -- names ------------------------------------------------------------------------------------------------

    def _inode(self, request: Request) -> Inode:
        return self.requests.inode(request.node)

    def _lookup(self, request: Request) -> bytes:
        body = request.body
        assert isinstance(body, bytes)
        found = self._packed.child(self._inode(request), body[: body.index(0)])
        if found is None:  # a miss for the kernel to remember
            reply = p.ENTRY_REPLY.pack(_ENTRY_SIZE, 0, request.unique, 0, 0, self._valid_s, 0, self._valid_ns, 0)
            return reply + _NO_ATTRIBUTES
        return self._entry_with(request, *found)

    def _forget(self, request: Request) -> bytes:
        self._forget_one(request.node, p.U64.unpack_from(request.body)[0])
        return _NO_REPLY

    def _batch_forget(self, request: Request) -> bytes:
        count, _ = p.BATCH_FORGET_IN.unpack_from(request.body)
        end = p.BATCH_FORGET_IN.size + count * p.FORGET_ONE.size
        for node, references in p.FORGET_ONE.iter_unpack(request.body[p.BATCH_FORGET_IN.size : end]):
            self._forget_one(node, references)
        return _NO_REPLY

    def _forget_one(self, node: int, references: int) -> None:
        try:
            self.requests.forget(node, references)
        except Exception:
            log.exception("forget of %#x failed", node)  # there is nobody to tell

    def _mknod(self, request: Request) -> bytes:
        mode, device, umask, _ = p.MKNOD_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        name = request.name(p.MKNOD_IN.size)
        return self._entry(request, self._tree.mknod(directory, name, mode, p.decode_device(device), request))

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = p.MKDIR_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        return self._entry(request, self._tree.mkdir(directory, request.name(p.MKDIR_IN.size), mode, request))

    def _masked(self, directory: Inode, mode: int, umask: int) -> int:
        """``mode`` as POSIX has it: a default ACL takes the place of the umask."""
        if umask and self._options.acl and self._options.xattrs:
            try:
                self._tree.get_xattr(directory, ACL_NAMES[1])
            except OSError:
                pass
            else:
                return mode
        return mode & ~umask

    def _symlink(self, request: Request) -> bytes:
        name = request.name()
        target = request.name(len(name) + 1)
        return self._entry(request, self._tree.symlink(self._inode(request), name, target, request))

    def _unlink(self, request: Request) -> bytes:
        self._tree.unlink(self._inode(request), request.name())
        return self._empty(request)

    def _rmdir(self, request: Request) -> bytes:
        self._tree.rmdir(self._inode(request), request.name())
        return self._empty(request)

    def _rename(self, request: Request) -> Answer:
        return self._do_rename(request, p.U64.unpack_from(request.body)[0], p.U64.size, 0)

    def _rename2(self, request: Request) -> Answer:
        directory, flags, _ = p.RENAME2_IN.unpack_from(request.body)
        return self._do_rename(request, directory, p.RENAME2_IN.size, flags)

    def _do_rename(self, request: Request, new_node: int, offset: int, flags: int) -> Answer:
        old = request.name(offset)
        new = request.name(offset + len(old) + 1)
        old_dir, new_dir = self._inode(request), self.requests.inode(new_node)
        moved = self._tree.lookup(old_dir, old)
        if moved.upper and not flags & RENAME_EXCHANGE:
            self._tree.rename(old_dir, old, new_dir, new, flags, request)
            return self._empty(request)
        return self._copy_and_rename(request, old_dir, old, new_dir, new, flags)

    async def _copy_and_rename(
        self, request: Request, old_dir: Inode, old: bytes, new_dir: Inode, new: bytes, flags: int
    ) -> bytes:
        await self.requests.rename(old_dir, old, new_dir, new, flags, request)
        return self._empty(request)

    def _link(self, request: Request) -> Answer:
        inode = self.requests.inode(p.U64.unpack_from(request.body)[0])
        if not inode.upper:
            return self._copy_and_link(request, inode)
        self._tree.link(inode, self._inode(request), request.name(p.U64.size))
        return self._entry(request, inode)

    async def _copy_and_link(self, request: Request, inode: Inode) -> bytes:
        await self.requests.link(inode, self._inode(request), request.name(p.U64.size))
        return self._entry(request, inode)

    def _readlink(self, request: Request) -> bytes:
        return self._data(request, self._tree.readlink(self._inode(request)))

    # -- attributes -------------------------------------------------------------------------------------------

    def _getattr(self, request: Request) -> bytes:
        return self._attr_reply(request, self._packed.of(self._inode(request)))

    def _setattr(self, request: Request) -> Answer:
        (valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = p.SETATTR_IN.unpack_from(
            request.body
        )
        now = time.time_ns() if valid & (SetAttr.ATIME_NOW | SetAttr.MTIME_NOW) else 0
        change = AttributeChange()
        if valid & SetAttr.MODE:
            change.mode = mode
        if valid & SetAttr.UID:
            change.uid = uid
        if valid & SetAttr.GID:
            change.gid = gid
        if valid & SetAttr.SIZE:
            change.size = size
        if valid & SetAttr.ATIME:
            change.atime_ns = now if valid & SetAttr.ATIME_NOW else _time_ns(atime, atime_ns)
        if valid & SetAttr.MTIME:
            change.mtime_ns = now if valid & SetAttr.MTIME_NOW else _time_ns(mtime, mtime_ns)
        inode = self._inode(request)
        kill = bool(valid & SetAttr.KILL_SUIDGID)
        if self.requests.needs_copy_up_for(inode, change):
            return self._copy_and_set(request, inode, change, kill=kill)
        return self._set_attributes(request, inode, change, kill=kill)

    async def _copy_and_set(self, request: Request, inode: Inode, change: AttributeChange, *, kill: bool) -> bytes:
        await self.requests.copy_up(inode, data=change.size is not None, size=change.size)
        return self._set_attributes(request, inode, change, kill=kill)

    def _set_attributes(self, request: Request, inode: Inode, change: AttributeChange, *, kill: bool) -> bytes:
        attributes = self.requests.set_attributes_now(inode, change, request)
        if kill and change.uid is None and change.gid is None:  # a change of owner clears them anyhow
            self._tree.clear_privileges(inode, request)
            attributes = self._tree.attributes(inode)
        return self._attr_reply(request, pack(inode, attributes))

    def _statx(self, request: Request) -> bytes:
        inode = self._inode(request)
        attributes = self._tree.attributes(inode)
        path, follow = self._tree.view.proc_path(inode)
        stx = backing_calls.statx(path, follow=follow)
        s, ns = self._valid_s, self._valid_ns
        data = backing_calls.statx_with(stx, attributes)
        return p.STATX_REPLY.pack(p.STATX_REPLY.size + len(data), 0, request.unique, s, ns, 0, 0, 0) + data

    # -- extended attributes ----------------------------------------------------------------------------------

    def _getxattr(self, request: Request) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(request.body)
        name = request.name(p.GETXATTR_IN.size)
        inode = self._inode(request)
        if inode.bare and name == _CAPABILITY:  # asked before each first write and change of owner
            return p.OUT_HEADER.pack(p.OUT_HEADER.size, -errno.ENODATA, request.unique)
        value = self._tree.get_xattr(inode, name)
        return self._sized(request, value, size)

    def _listxattr(self, request: Request) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(request.body)
        names = self._tree.list_xattrs(self._inode(request), request)
        return self._sized(request, b"".join(name + b"\0" for name in names), size)

    def _sized(self, request: Request, value: bytes, size: int) -> bytes:
        if size == 0:
            return p.XATTR_SIZE_REPLY.pack(p.XATTR_SIZE_REPLY.size, 0, request.unique, len(value), 0)
        if len(value) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        return self._data(request, value)

    async def _setxattr(self, request: Request) -> bytes:
        size, flags, extra, _ = p.SETXATTR_IN.unpack_from(request.body)
        name = request.name(p.SETXATTR_IN.size)
        start = p.SETXATTR_IN.size + len(name) + 1
        inode = self._inode(request)
        await self.requests.set_xattr(inode, name, bytes(request.body[start : start + size]), flags)
        if extra & 1:  # FUSE_SETXATTR_ACL_KILL_SGID: the caller is not in the group
            mode = stat.S_IMODE(self._tree.attributes(inode).mode)
            if mode & stat.S_ISGID:
                self._tree.set_attributes(inode, AttributeChange(mode=mode & ~stat.S_ISGID), request)
        return self._empty(request)

    async def _removexattr(self, request: Request) -> bytes:
        await self.requests.remove_xattr(self._inode(request), request.name())
        return self._empty(request)

    # -- files ------------------------------------------------------------------------------------------------

    def _opened(self, file: OpenFile) -> tuple[int, int, int]:
        """Handle, flags and backing id for the answer to an open."""
        flags, backing = self._keep_cache, 0
        if self._passthrough is not None:
            flags, backing = self._passthrough.open(file)
        return self.requests.add_file(file), flags, backing

    def _open(self, request: Request) -> Answer:
        flags, open_flags = p.OPEN_IN.unpack_from(request.body)
        inode = self._inode(request)
        truncate = bool(flags & os.O_TRUNC)
        reads_only = not truncate and flags & os.O_ACCMODE == os.O_RDONLY
        if reads_only or self.requests.copied_up(inode, size=0 if truncate else None):
            # Without HANDLE_KILLPRIV_V2 the kernel leaves it to us what a truncation takes from the file.
            kill = bool(open_flags & p.OPEN_KILL_SUIDGID) or (truncate and request.uid != 0)
            file = self._tree.open(inode, flags)
            if not reads_only:
                return self._open_reply(request, file, kill=kill)
            handle, opened, backing = self._opened(file)
            if self._keep_cache and opened & Open.KEEP_CACHE:
                self._give_pages(file, flags)
            return p.OPEN_REPLY.pack(p.OPEN_REPLY.size, 0, request.unique, handle, opened, backing)
        return self._copy_and_open(request, inode, flags, kill=bool(open_flags & p.OPEN_KILL_SUIDGID))

    async def _copy_and_open(self, request: Request, inode: Inode, flags: int, *, kill: bool) -> bytes:
        return self._open_reply(request, await self.requests.open(inode, flags, request), kill=kill)

    def _open_reply(self, request: Request, file: OpenFile, *, kill: bool) -> bytes:
        if kill:
            try:
                self._tree.clear_privileges(file.inode, request)
            except OSError:
                self._tree.close_file(file)
                raise
        return p.OPEN_REPLY.pack(p.OPEN_REPLY.size, 0, request.unique, *self._opened(file))

    def _give_pages(self, file: OpenFile, flags: int) -> None:
        """Put a small file into the kernel's page cache, if reading it now holds nobody up."""
        if file.inode.filled or not self.patience.may_wait():
            return
        start = time.perf_counter()
        try:
            size = early_pages.size_to_give(file, flags)
            if size:
                self._files_ahead.opened(file.inode)
                begin = time.perf_counter()
                data = os.pread(file.fd, size, 0)
                self._files_ahead.took(time.perf_counter() - begin)
                length = p.NOTIFY_STORE.size + len(data)
                header = p.NOTIFY_STORE.pack(length, p.NOTIFY_STORE_CODE, 0, file.inode.ino, 0, len(data), 0)
                os.writev(self._fd, [header, data])
                file.inode.filled = True
        except OSError as error:  # whoever reads gets the error, if it is still there
            log.debug("nothing of %#x is given to the kernel: %s", file.inode.ino, error)
        self.patience.waited_since(start)

    def _create(self, request: Request) -> bytes:
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        inode, file = self._tree.create(directory, request.name(p.CREATE_IN.size), mode, flags, request)
        return self._created(request, inode, file)

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        inode, file = self._tree.create_unnamed(directory, mode, flags, request)
        return self._created(request, inode, file)

    def _created(self, request: Request, inode: Inode, file: OpenFile) -> bytes:
        attributes = self.requests.remembered(inode)
        s, ns = self._valid_s, self._valid_ns
        entry = (inode.ino, 0, s, s, ns, ns, *p.attr_fields(attributes))
        return p.CREATE_REPLY.pack(p.CREATE_REPLY.size, 0, request.unique, *entry, *self._opened(file))

    def _read(self, request: Request) -> bytes:
        handle, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        file = self.requests.files[handle]
        fd = file.fd
        if size > _LONG_READ:
            self._beside.leave()
        if offset == 0:
            early_pages.was_read(file.inode)
        if size <= _SHORT_READ and self.patience.may_wait():
            start = time.perf_counter()
            data = os.pread(fd, size, offset)
            self.patience.waited_since(start)
            return self._data(request, data)
        cached = self.requests.read_cached(fd, offset, size)
        if cached is not None:
            return self._data(request, cached)
        return self._answer_in_thread(request, Opcode.READ, lambda: self._data(request, os.pread(fd, size, offset)))

    def _write(self, request: Request) -> bytes:
        handle, offset, size, write_flags, _, _, _ = p.WRITE_IN.unpack_from(request.body)
        data = memoryview(request.body)[p.WRITE_IN.size : p.WRITE_IN.size + size]
        written = self.requests.write(handle, offset, data)
        if write_flags & p.WRITE_KILL_SUIDGID:
            self._tree.clear_privileges(self.requests.files[handle].inode, request)
        return p.WRITE_REPLY.pack(p.WRITE_REPLY.size, 0, request.unique, written, 0)

    def _release(self, request: Request) -> bytes:
        handle = p.U64.unpack_from(request.body)[0]
        if self._passthrough is not None:
            self._passthrough.release(self.requests.files[handle])
        self.requests.release(handle)
        return self._empty(request)

    def _fsync(self, request: Request) -> bytes:
        handle, flags, _ = p.FSYNC_IN.unpack_from(request.body)
        file = self.requests.files[handle]
        if not file.inode.upper:
            return self._empty(request)
        fd, sync = file.fd, os.fdatasync if flags & p.FSYNC_FDATASYNC else os.fsync

        def call() -> bytes:
            sync(fd)
            return self._empty(request)

        if self.patience.may_wait() and os.fstat(fd).st_size <= _SHORT_SYNC:
            start = time.perf_counter()
            answer = call()
            self.patience.waited_since(start)
            return answer
        return self._answer_in_thread(request, Opcode.FSYNC, call)

    def _fallocate(self, request: Request) -> Answer:
        handle, offset, length, mode, _ = p.FALLOCATE_IN.unpack_from(request.body)
        if self._tree.space is not None:
            return self._allocate_limited(request, handle, mode, offset, length)
        fd = self.requests.files[handle].fd

        def call() -> bytes:
            backing_calls.fallocate(fd, mode, offset, length)
            return self._empty(request)

        return self._answer_in_thread(request, Opcode.FALLOCATE, call)

    async def _allocate_limited(self, request: Request, handle: int, mode: int, offset: int, length: int) -> bytes:
        await self.requests.fallocate(handle, mode, offset, length)
        return self._empty(request)

    def _lseek(self, request: Request) -> bytes:
        handle, offset, whence, _ = p.LSEEK_IN.unpack_from(request.body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        found = os.lseek(self.requests.files[handle].fd, offset, whence)
        return p.LSEEK_REPLY.pack(p.LSEEK_REPLY.size, 0, request.unique, found)

    def _copy_file_range(self, request: Request) -> Answer:
        source, source_offset, _, target, target_offset, length, _ = p.COPY_FILE_RANGE_IN.unpack_from(request.body)
        if self._tree.space is not None:
            return self._copy_limited(request, source, source_offset, target, target_offset, min(length, 1 << 30))
        source_fd, target_fd = self.requests.files[source].fd, self.requests.files[target].fd

        def call() -> bytes:
            copied = os.copy_file_range(source_fd, target_fd, min(length, 1 << 30), source_offset, target_offset)
            return p.WRITE_REPLY.pack(p.WRITE_REPLY.size, 0, request.unique, copied, 0)

        return self._answer_in_thread(request, Opcode.COPY_FILE_RANGE, call)

    async def _copy_limited(
        self, request: Request, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> bytes:
        copied = await self.requests.copy_range(source, source_offset, target, target_offset, length)
        return p.WRITE_REPLY.pack(p.WRITE_REPLY.size, 0, request.unique, copied, 0)

    async def _ioctl(self, request: Request) -> bytes:
        _, _, command, _, in_size, out_size = p.IOCTL_IN.unpack_from(request.body)
        data = bytes(request.body[p.IOCTL_IN.size : p.IOCTL_IN.size + in_size])
        inode = self._inode(request)
        if backing_calls.changes_inode(command):
            await self.requests.copy_up(inode, data=False)
        path, _ = self._tree.view.proc_path(inode)
        answer = backing_calls.inode_ioctl(path, command, data, out_size)
        header = p.IOCTL_REPLY.pack(p.IOCTL_REPLY.size + len(answer), 0, request.unique, 0, 0, 0, 0)
        return header + answer

    # -- directories ------------------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> bytes:
        if self._keep_cache:
            # Nothing has to be kept for an open directory, so the kernel need not tell of it. After this it does not
            # ask again, and keeps the listings of all directories.
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return p.OPEN_REPLY.pack(p.OPEN_REPLY.size, 0, request.unique, 0, 0, 0)

    def _readdir(self, request: Request) -> bytes:
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        return self._listing.answer(request.unique, self._inode(request), offset, size, plus=False)

    def _readdirplus(self, request: Request) -> bytes:
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        return self._listing.answer(request.unique, self._inode(request), offset, size, plus=True)

    def _fsyncdir(self, request: Request) -> bytes:
        fd = self._tree.open_upper_directory(self._inode(request))
        if fd < 0:
            return self._empty(request)

        def call() -> bytes:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            return self._empty(request)

        return self._answer_in_thread(request, Opcode.FSYNCDIR, call)

    def close(self) -> None:
        """Give the connection up; what still waits for an answer gets ENOTCONN."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _name(code: int) -> str:
    try:
        return Opcode(code).name
    except ValueError:
        return f"request {code}"


def _time_ns(seconds: int, nanoseconds: int) -> int:
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 1_000_000_000 + nanoseconds
