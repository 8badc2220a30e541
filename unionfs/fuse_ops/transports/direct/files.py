"""Answers about open files: opening, reading, writing, syncing."""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import struct
import time
from typing import Final

from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.answers import NO_REPLY, Answer, Answers, Handler, Mount
from unionfs.fuse_ops.transports.direct.protocol import Opcode, Open
from unionfs.fuse_ops.transports.direct.request import Request
from unionfs.fuse_ops.tree import backing_calls
from unionfs.fuse_ops.tree.inodes import Inode, OpenFile

log = logging.getLogger(__name__)

_PAGE: Final = mmap.PAGESIZE
_LONG_READ: Final = 32 * 1024  # bytes; a program that reads so much has work to do meanwhile
_SHORT_READ: Final = 128 * 1024  # bytes; one disk access, or what the kernel reads ahead at once


class FileAnswers(Answers):
    """Requests for files that are open, and those that open them."""

    def __init__(self, mount: Mount) -> None:
        super().__init__(mount)
        # What is read, behind the header that goes before it, at the start of a page.
        self._page_buffer = memoryview(mmap.mmap(-1, _PAGE + _SHORT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        table: dict[Opcode, Handler] = {
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
        return table

    def _opened(self, file: OpenFile, flags: int, mode: int | None = None) -> tuple[int, int, int]:
        """Handle, flags and backing id for the answer to an open with a client's ``flags``.

        ``mode`` is the file's, if it is new.
        """
        opened, backing = self._mount.keep_cache, 0
        inode = file.inode
        if self._mount.passthrough is not None:
            opened, backing = self._mount.passthrough.open(file, mode)
            if backing and flags & os.O_ACCMODE == os.O_RDWR and not inode.may_be_mapped:
                inode.may_be_mapped = True
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
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        inode, file = self._tree.create(directory, request.name(p.CREATE_IN.size), mode, flags, request)
        return self._created(request, inode, file, flags)

    def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = p.CREATE_IN.unpack_from(request.body)
        directory = self._inode(request)
        mode = self._masked(directory, mode, umask)
        inode, file = self._tree.create_unnamed(directory, mode, flags, request)
        return self._created(request, inode, file, flags)

    def _created(self, request: Request, inode: Inode, file: OpenFile, flags: int) -> bytes:
        attributes = self._requests.made(inode)
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
            self._connection.beside.leave()
        if size > _SHORT_READ:
            return self._connection.answer_in_thread(request, Opcode.READ, lambda: _contents(request, fd, offset, size))
        data = self._page_buffer[_PAGE : _PAGE + size]
        if self._mount.patience.may_wait():
            start = time.perf_counter()
            count = self._mount.short_reads.read(fd, data, offset)
            self._mount.patience.waited_since(start)
        else:
            cached = self._requests.read_cached(fd, data, offset)
            if cached is None:
                return self._connection.answer_in_thread(
                    request, Opcode.READ, lambda: _contents(request, fd, offset, size)
                )
            count = cached
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
        if not backing_calls.knows_ioctl(command):  # isatty(3), say, which Python asks about each file that it opens
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
