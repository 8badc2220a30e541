"""Decodes each kind of request, has it done, and encodes the answer."""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.requests.job import Job, completed, done_here
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.speedups.placement import ClientAffinity
from unionfs.fuse_ops.speedups.reading_ahead import EarlyPages, FileReadAhead
from unionfs.fuse_ops.speedups.waiting import InlineWaitPolicy, ShortReads
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.connection import Connection
from unionfs.fuse_ops.transports.direct.listing import DirectListing, PackedAttributes, pack
from unionfs.fuse_ops.transports.direct.passthrough import Passthrough
from unionfs.fuse_ops.transports.direct.protocol import Opcode, Open, Request, SetAttr
from unionfs.fuse_ops.tree.attributes import CAPABILITY, DEFAULT_ACL
from unionfs.fuse_ops.tree.inodes import Inode, OpenFile
from unionfs.fuse_ops.tree.protection import knows_ioctl
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host import syscalls

log = logging.getLogger(__name__)

Answer = bytes | Coroutine[Any, Any, bytes]
"""A reply, or what has to be waited for until there is one."""

Handler = Callable[[Request], Answer]

T = TypeVar("T")

NO_REPLY: Final = b""
_TICK_NS: Final = 1_000_000  # what the kernel makes one or two ticks of its clock of
_STATX_BASIC_AND_BTIME: Final = 0xFFF  # linux/stat.h
ENTRY_SIZE: Final = p.ENTRY_REPLY.size + p.ATTR.size
_ATTR_SIZE: Final = p.ATTR_REPLY.size + p.ATTR.size


class ServedMount:
    """What belongs to one mount; its parts change while it is served, and are shared by all answers."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self.tree = tree
        self.options = options
        speedups = options.speedups
        self.connection = Connection(ClientAffinity(usable="placement" in speedups))
        self.requests = UnionRequests(tree, options)
        self.requests.last_closes.outside = self.connection.affinity.outside
        self.packed = PackedAttributes(tree.view)
        self.inline_waits = InlineWaitPolicy(usable="inline" in speedups)
        self.short_reads = ShortReads(self.connection.affinity)
        if "pages" in speedups:
            ahead = FileReadAhead() if "readahead" in speedups else None
            store, read = self.connection.store_pages, self.short_reads.read
            self.requests.observer = EarlyPages(store, read, self.inline_waits, ahead)
        self.passthrough: Passthrough | None = None  # once the kernel has offered it
        self.accepted: Callable[[], None] = lambda: None
        seconds = min(options.timeout_s, 1e18)
        self.valid_s = int(seconds)
        self.valid_ns = int((seconds - self.valid_s) * 1e9)
        self.tick = (0, min(_TICK_NS, self.valid_ns) if self.valid_s == 0 else _TICK_NS)
        self.keep_cache = int(Open.KEEP_CACHE) if options.timeout_s > 0 else 0


class Handlers:
    """Handlers of some kinds of requests, for one mount."""

    def __init__(self, mount: ServedMount) -> None:
        self._mount = mount
        self._connection = mount.connection
        self._tree = mount.tree
        self._options = mount.options
        self._requests = mount.requests
        self._packed = mount.packed
        self._valid_s = mount.valid_s
        self._valid_ns = mount.valid_ns

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        raise NotImplementedError

    def _when_done(self, request: Request, code: Opcode, outcome: T | Job[T], encode: Callable[[T], bytes]) -> Answer:
        """The answer that ``encode`` makes of a request's result. Here it is decided where a job runs.

        Handing a short wait to a thread costs more than the wait, as long as it holds nobody up.
        """
        while isinstance(outcome, Job) and outcome.short and self._mount.inline_waits.may_wait():
            start = time.perf_counter()
            outcome = done_here(outcome)
            self._mount.inline_waits.waited_since(start)
        if not isinstance(outcome, Job):
            return encode(outcome)
        job = outcome
        if job.answers_alone:
            request.may_leave = not job.changes
            return self._connection.answer_in_thread(request, code, lambda: encode(job.run()))
        return self._wait(request, job, encode)

    async def _wait(self, request: Request, job: Job[T], encode: Callable[[T], bytes]) -> bytes:
        # A thread would inherit the place beside the client.
        return encode(await completed(job, self._connection.affinity.leave, request))

    def _empty_when_done(self, request: Request, code: Opcode, outcome: Job[None] | None) -> Answer:
        return self._when_done(request, code, outcome, lambda _: self.empty(request))

    @staticmethod
    def empty(request: Request) -> bytes:
        """It is done, and there is nothing to tell."""
        return p.OUT_HEADER.pack(p.OUT_HEADER.size, 0, request.unique)

    @staticmethod
    def _data(request: Request, data: bytes | bytearray) -> bytes:
        return p.OUT_HEADER.pack(p.OUT_HEADER.size + len(data), 0, request.unique) + data

    def _inode(self, request: Request) -> Inode:
        return self._requests.inode(request.node)

    def _entry(self, request: Request, inode: Inode) -> bytes:
        return self._entry_with(request, inode, self._packed.of(inode))

    def _new_entry(self, request: Request, inode: Inode) -> bytes:
        """The answer to the request that made ``inode``."""
        return self._entry_with(request, inode, self._packed.of_new(inode))

    def _entry_with(self, request: Request, inode: Inode, packed: bytes) -> bytes:
        inode.lookups += 1
        s, ns = self._valid_s, self._valid_ns
        attr_s, attr_ns = self._attributes_valid(inode)
        return p.ENTRY_REPLY.pack(ENTRY_SIZE, 0, request.unique, inode.ino, 0, s, attr_s, ns, attr_ns) + packed

    def _attr_reply(self, request: Request, inode: Inode, packed: bytes) -> bytes:
        return p.ATTR_REPLY.pack(_ATTR_SIZE, 0, request.unique, *self._attributes_valid(inode), 0) + packed

    def _attributes_valid(self, inode: Inode) -> tuple[int, int]:
        """For how long the kernel may answer with attributes of ``inode`` by itself: seconds and nanoseconds.

        For a tick while a program may change them through a mapping of the backing file. The kernel knows of each
        write(2), also of those that it passes through, and asks again. It neither knows nor tells of such a mapping,
        which also outlives the last close. Only who opens a file for reading *and* writing can make one: programs that
        just write files, most of all, pay nothing. When nobody has the file open for writing any more, and a mapping
        counts as that, the attributes are final.

        A database asks for those of its files several times in each transaction, which a tick makes one request.
        That is as fine as the times of files are before Linux 6.13.
        """
        if inode.kernel.may_be_mapped:
            if self._requests.is_written(inode):
                return self._mount.tick
            inode.kernel.may_be_mapped = False
        return self._valid_s, self._valid_ns

    def _masked(self, directory: Inode, mode: int, umask: int) -> int:
        """``mode`` as POSIX has it: a default ACL takes the place of the umask."""
        if umask and self._options.acl and self._options.xattrs:
            if directory.kernel.default_acl is None:
                try:
                    self._tree.get_xattr(directory, DEFAULT_ACL)
                except OSError:
                    directory.kernel.default_acl = False
                else:
                    directory.kernel.default_acl = True
            if directory.kernel.default_acl:
                return mode
        return mode & ~umask


_NO_ATTRIBUTES: Final = bytes(p.ATTR.size)


class NameHandlers(Handlers):
    """Requests that name something in a directory."""

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
        }

    def _lookup(self, request: Request) -> bytes:
        body = request.body
        assert isinstance(body, bytes)
        found = self._packed.child(self._inode(request), body[: body.index(0)])
        if found is None:  # a miss for the kernel to remember
            reply = p.ENTRY_REPLY.pack(ENTRY_SIZE, 0, request.unique, 0, 0, self._valid_s, 0, self._valid_ns, 0)
            return reply + _NO_ATTRIBUTES
        return self._entry_with(request, *found)

    def _forget(self, request: Request) -> bytes:
        self._forget_one(request.node, p.U64.unpack_from(request.body)[0])
        return NO_REPLY

    def _batch_forget(self, request: Request) -> bytes:
        count, _ = p.BATCH_FORGET_IN.unpack_from(request.body)
        end = p.BATCH_FORGET_IN.size + count * p.FORGET_ONE.size
        for node, references in p.FORGET_ONE.iter_unpack(request.body[p.BATCH_FORGET_IN.size : end]):
            self._forget_one(node, references)
        return NO_REPLY

    def _forget_one(self, node: int, references: int) -> None:
        try:
            self._requests.forget(node, references)
        except Exception:
            log.exception("forget of %#x failed", node)  # there is nobody to tell

    def _mknod(self, request: Request) -> bytes:
        mode, device, umask, _ = p.MKNOD_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        name = request.name(p.MKNOD_IN.size)
        return self._new_entry(request, self._tree.mknod(directory, name, mode, p.decode_device(device), request))

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = p.MKDIR_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        return self._new_entry(request, self._tree.mkdir(directory, request.name(p.MKDIR_IN.size), mode, request))

    def _symlink(self, request: Request) -> bytes:
        name = request.name()
        target = request.name(len(name) + 1)
        return self._new_entry(request, self._tree.symlink(self._inode(request), name, target, request))

    def _unlink(self, request: Request) -> Answer:
        outcome = self._requests.unlink(self._inode(request), request.name())
        return self._empty_when_done(request, Opcode.UNLINK, outcome)

    def _rmdir(self, request: Request) -> bytes:
        self._tree.rmdir(self._inode(request), request.name())
        return self.empty(request)

    def _rename(self, request: Request) -> Answer:
        return self._do_rename(request, p.U64.unpack_from(request.body)[0], p.U64.size, 0)

    def _rename2(self, request: Request) -> Answer:
        directory, flags, _ = p.RENAME2_IN.unpack_from(request.body)
        return self._do_rename(request, directory, p.RENAME2_IN.size, flags)

    def _do_rename(self, request: Request, new_node: int, offset: int, flags: int) -> Answer:
        old = request.name(offset)
        new = request.name(offset + len(old) + 1)
        old_dir, new_dir = self._inode(request), self._requests.inode(new_node)
        outcome = self._requests.rename(old_dir, old, new_dir, new, flags, request)
        return self._empty_when_done(request, Opcode.RENAME2, outcome)

    def _link(self, request: Request) -> Answer:
        inode = self._requests.inode(p.U64.unpack_from(request.body)[0])
        outcome = self._requests.link(inode, self._inode(request), request.name(p.U64.size))
        return self._when_done(request, Opcode.LINK, outcome, lambda _: self._entry(request, inode))

    def _readlink(self, request: Request) -> bytes:
        return self._data(request, self._tree.readlink(self._inode(request)))


class AttributeHandlers(Handlers):
    """Requests that read or change what an inode is like."""

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        table: dict[Opcode, Handler] = {
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.STATX: self._statx,
        }
        if self._options.xattrs:
            table |= {
                Opcode.GETXATTR: self._getxattr,
                Opcode.LISTXATTR: self._listxattr,
                Opcode.SETXATTR: self._setxattr,
                Opcode.REMOVEXATTR: self._removexattr,
            }
        return table

    def _getattr(self, request: Request) -> bytes:
        inode = self._inode(request)
        return self._attr_reply(request, inode, self._packed.of(inode))

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
        change.to_now = bool(valid & (SetAttr.ATIME_NOW | SetAttr.MTIME_NOW))
        inode = self._inode(request)
        outcome = self._requests.set_attributes(inode, change, request, kill=bool(valid & SetAttr.KILL_SUIDGID))
        return self._when_done(
            request,
            Opcode.SETATTR,
            outcome,
            lambda attributes: self._attr_reply(request, inode, pack(inode, attributes)),
        )

    def _statx(self, request: Request) -> bytes:
        inode = self._inode(request)
        attributes = self._tree.attributes(inode)
        path, follow = self._tree.view.proc_path(inode)
        flags = 0 if follow else syscalls.AT_SYMLINK_NOFOLLOW
        stx = syscalls.statx(syscalls.AT_FDCWD, path, flags, _STATX_BASIC_AND_BTIME)
        s, ns = self._attributes_valid(inode)
        data = p.statx_with(stx, attributes)
        return p.STATX_REPLY.pack(p.STATX_REPLY.size + len(data), 0, request.unique, s, ns, 0, 0, 0) + data

    def _getxattr(self, request: Request) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(request.body)
        name = request.name(p.GETXATTR_IN.size)
        inode = self._inode(request)
        if inode.kernel.has_no_xattrs and name == CAPABILITY:  # asked before each first write and change of owner
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

    def _setxattr(self, request: Request) -> Answer:
        size, flags, extra, _ = p.SETXATTR_IN.unpack_from(request.body)
        name = request.name(p.SETXATTR_IN.size)
        start = p.SETXATTR_IN.size + len(name) + 1
        value = bytes(request.body[start : start + size])
        inode = self._inode(request)
        drops_setgid = bool(extra & 1)  # FUSE_SETXATTR_ACL_KILL_SGID: the caller is not in the group
        outcome = self._requests.set_xattr(inode, name, value, flags, request, drops_setgid=drops_setgid)
        return self._empty_when_done(request, Opcode.SETXATTR, outcome)

    def _removexattr(self, request: Request) -> Answer:
        outcome = self._requests.remove_xattr(self._inode(request), request.name())
        return self._empty_when_done(request, Opcode.REMOVEXATTR, outcome)


def _time_ns(seconds: int, nanoseconds: int) -> int:
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 1_000_000_000 + nanoseconds


_PAGE: Final = mmap.PAGESIZE
_LONG_READ: Final = 32 * 1024  # bytes; a program that reads so much has work to do meanwhile
_SHORT_READ: Final = 128 * 1024  # bytes; one disk access, or what the kernel reads ahead at once


class FileHandlers(Handlers):
    """Requests for files that are open, and those that open them."""

    def __init__(self, mount: ServedMount) -> None:
        super().__init__(mount)
        # What is read, behind the header that goes before it, at the start of a page.
        self._page_buffer = memoryview(mmap.mmap(-1, _PAGE + _SHORT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        return {
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
            Opcode.FSYNC: self._fsync,
        }

    def _opened(self, file: OpenFile, flags: int, mode: int | None = None) -> tuple[int, int, int]:
        """Handle, flags and backing id for the answer to an open with a client's ``flags``.

        ``mode`` is the file's, if it is new.
        """
        opened, backing = self._mount.keep_cache, 0
        inode = file.inode
        if self._mount.passthrough is not None:
            opened, backing = self._mount.passthrough.open(file, mode)
            if backing and flags & os.O_ACCMODE == os.O_RDWR and not inode.kernel.may_be_mapped:
                inode.kernel.may_be_mapped = True
                if mode is None:
                    self._connection.forget_attributes(inode)
        elif mode is None and self._requests.blocks_will_lie(file):
            self._connection.forget_attributes(inode)
        if file.appends:  # we have to see at which offset each write is
            opened = opened & ~Open.KEEP_CACHE | Open.DIRECT_IO
        cached = self._mount.keep_cache and opened & Open.KEEP_CACHE
        return self._requests.add_file(file, flags, cached=bool(cached)), opened, backing

    def _open(self, request: Request) -> Answer:
        flags, open_flags = p.OPEN_IN.unpack_from(request.body)
        kill = bool(open_flags & p.OPEN_KILL_SUIDGID)
        outcome = self._requests.open(self._inode(request), flags, request, kill=kill)
        return self._when_done(request, Opcode.OPEN, outcome, lambda file: self._open_reply(request, file, flags))

    def _open_reply(self, request: Request, file: OpenFile, flags: int) -> bytes:
        return p.OPEN_REPLY.pack(p.OPEN_REPLY.size, 0, request.unique, *self._opened(file, flags))

    def _create(self, request: Request) -> bytes:
        directory, flags, mode = self._new_file(request)
        name = request.name(p.CREATE_IN.size)
        return self._created(request, *self._tree.create(directory, name, mode, flags, request), flags)

    def _tmpfile(self, request: Request) -> bytes:
        directory, flags, mode = self._new_file(request)
        return self._created(request, *self._tree.create_unnamed(directory, mode, flags, request), flags)

    def _new_file(self, request: Request) -> tuple[Inode, int, int]:
        """Of a request for a new file: the directory, the client's flags, and the mode."""
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(request.body)
        directory = self._inode(request)
        return directory, flags, self._masked(directory, mode, umask)

    def _created(self, request: Request, inode: Inode, file: OpenFile, flags: int) -> bytes:
        attributes = self._requests.new_entry_attributes(inode)
        opened = self._opened(file, flags, attributes.mode)
        s, ns = self._valid_s, self._valid_ns
        attr_s, attr_ns = self._attributes_valid(inode)
        entry = (inode.ino, 0, s, attr_s, ns, attr_ns, *p.attr_fields(attributes))
        return p.CREATE_REPLY.pack(p.CREATE_REPLY.size, 0, request.unique, *entry, *opened)

    def _read(self, request: Request) -> bytes:
        handle, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        fd = self._requests.file_to_read(handle, offset, size).fd
        request.may_leave = True
        if size > _LONG_READ:
            self._connection.affinity.leave()
        if size > _SHORT_READ:
            return self._connection.answer_in_thread(request, Opcode.READ, lambda: _contents(request, fd, offset, size))
        data = self._page_buffer[_PAGE : _PAGE + size]
        if self._mount.inline_waits.may_wait():
            start = time.perf_counter()
            count: int | None = self._mount.short_reads.read(fd, data, offset)
            self._mount.inline_waits.waited_since(start)
        else:
            count = self._requests.read_cached(fd, data, offset)
        if count is None:
            return self._connection.answer_in_thread(request, Opcode.READ, lambda: _contents(request, fd, offset, size))
        self._connection.reply(self._with_header(p.OUT_HEADER, count, 0, request.unique))
        return NO_REPLY

    def _with_header(self, header: struct.Struct, count: int, *fields: int) -> memoryview:
        """The ``count`` bytes that were read into the page buffer, as a message; its length comes before ``fields``."""
        begin = _PAGE - header.size
        header.pack_into(self._page_buffer, begin, header.size + count, *fields)
        return self._page_buffer[begin : _PAGE + count]

    def _write(self, request: Request) -> bytes:
        handle, offset, size, write_flags, _, _, _ = p.WRITE_IN.unpack_from(request.body)
        data = memoryview(request.body)[p.WRITE_IN.size : p.WRITE_IN.size + size]
        written = self._requests.write(handle, offset, data)
        if write_flags & p.WRITE_KILL_SUIDGID:
            self._tree.clear_privileges(self._requests.files[handle].inode, request)
        return p.WRITE_REPLY.pack(p.WRITE_REPLY.size, 0, request.unique, written, 0)

    def _release(self, request: Request) -> bytes:
        handle = p.U64.unpack_from(request.body)[0]
        if self._mount.passthrough is not None:
            self._mount.passthrough.release(self._requests.files[handle])
        self._requests.release(handle)
        return self.empty(request)

    def _fsync(self, request: Request) -> Answer:
        handle, flags, _ = p.FSYNC_IN.unpack_from(request.body)
        outcome = self._requests.fsync(handle, data_only=bool(flags & p.FSYNC_FDATASYNC))
        return self._empty_when_done(request, Opcode.FSYNC, outcome)

    def _fallocate(self, request: Request) -> Answer:
        handle, offset, length, mode, _ = p.FALLOCATE_IN.unpack_from(request.body)
        return self._empty_when_done(request, Opcode.FALLOCATE, self._requests.fallocate(handle, mode, offset, length))

    def _lseek(self, request: Request) -> Answer:
        handle, offset, whence, _ = p.LSEEK_IN.unpack_from(request.body)
        inode = self._requests.files[handle].inode
        passes = self._mount.passthrough is not None and self._mount.passthrough.passes(inode)
        write_back = None if passes else functools.partial(self._connection.write_back, inode, offset)
        outcome = self._requests.seek(handle, offset, whence, write_back)
        return self._when_done(
            request,
            Opcode.LSEEK,
            outcome,
            lambda found: p.LSEEK_REPLY.pack(p.LSEEK_REPLY.size, 0, request.unique, found),
        )

    def _copy_file_range(self, request: Request) -> Answer:
        source, source_offset, _, target, target_offset, length, _ = p.COPY_FILE_RANGE_IN.unpack_from(request.body)
        outcome = self._requests.copy_range(source, source_offset, target, target_offset, length)
        return self._when_done(
            request,
            Opcode.COPY_FILE_RANGE,
            outcome,
            lambda copied: p.WRITE_REPLY.pack(p.WRITE_REPLY.size, 0, request.unique, copied, 0),
        )

    def _ioctl(self, request: Request) -> Answer:
        _, _, command, _, in_size, out_size = p.IOCTL_IN.unpack_from(request.body)
        if not knows_ioctl(command):  # isatty(3), say, which Python asks about each file that it opens
            return p.OUT_HEADER.pack(p.OUT_HEADER.size, -errno.ENOTTY, request.unique)
        data = bytes(request.body[p.IOCTL_IN.size : p.IOCTL_IN.size + in_size])
        outcome = self._requests.control(self._inode(request), command, data, out_size)
        return self._when_done(
            request,
            Opcode.IOCTL,
            outcome,
            lambda answer: p.IOCTL_REPLY.pack(p.IOCTL_REPLY.size + len(answer), 0, request.unique, 0, 0, 0, 0) + answer,
        )


def _contents(request: Request, fd: int, offset: int, size: int) -> memoryview:
    answer = memoryview(bytearray(p.OUT_HEADER.size + size))
    length = p.OUT_HEADER.size + os.preadv(fd, [answer[p.OUT_HEADER.size :]], offset)
    p.OUT_HEADER.pack_into(answer, 0, length, 0, request.unique)
    return answer[:length]


class DirectoryHandlers(Handlers):
    """Requests that list directories."""

    def __init__(self, mount: ServedMount) -> None:
        super().__init__(mount)
        valid = mount.valid_s, mount.valid_ns
        self._listing = DirectListing(mount.tree, mount.packed, *valid, mount.requests, tick=mount.tick)

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        table: dict[Opcode, Handler] = {
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self.empty,
        }
        if self._requests.sync:
            table[Opcode.FSYNCDIR] = self._fsyncdir
        return table

    def _opendir(self, request: Request) -> bytes:
        if self._mount.keep_cache:
            # Nothing has to be kept for an open directory, so the kernel need not tell of it. After this it does not
            # ask again, and keeps the listings of all directories.
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return p.OPEN_REPLY.pack(p.OPEN_REPLY.size, 0, request.unique, 0, 0, 0)

    def _readdir(self, request: Request, *, plus: bool = False) -> bytes:
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        return self._listing.answer(request.unique, self._inode(request), offset, size, plus=plus)

    def _readdirplus(self, request: Request) -> bytes:
        return self._readdir(request, plus=True)

    def _fsyncdir(self, request: Request) -> Answer:
        _, flags, _ = p.FSYNC_IN.unpack_from(request.body)
        outcome = self._requests.sync_directory(self._inode(request), data_only=bool(flags & p.FSYNC_FDATASYNC))
        return self._empty_when_done(request, Opcode.FSYNCDIR, outcome)
