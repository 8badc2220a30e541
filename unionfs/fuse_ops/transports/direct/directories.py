"""Answers about open directories."""

from __future__ import annotations

import errno
import os

from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.answers import Answer, Answers, Handler, Mount
from unionfs.fuse_ops.transports.direct.listing import DirectListing
from unionfs.fuse_ops.transports.direct.protocol import Opcode
from unionfs.fuse_ops.transports.direct.request import Request


class DirectoryAnswers(Answers):
    """Requests that list directories."""

    def __init__(self, mount: Mount) -> None:
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

    def _readdir(self, request: Request) -> bytes:
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        return self._listing.answer(request.unique, self._inode(request), offset, size, plus=False)

    def _readdirplus(self, request: Request) -> bytes:
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(request.body)
        return self._listing.answer(request.unique, self._inode(request), offset, size, plus=True)

    def _fsyncdir(self, request: Request) -> Answer:
        _, flags, _ = p.FSYNC_IN.unpack_from(request.body)
        outcome = self._requests.sync_directory(self._inode(request), data_only=bool(flags & p.FSYNC_FDATASYNC))
        return self._empty_when_done(request, Opcode.FSYNCDIR, outcome)
