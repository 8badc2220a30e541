"""Answers about names: finding, making, moving, removing and forgetting what a directory holds."""

from __future__ import annotations

import logging
from typing import Final

from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.answers import ENTRY_SIZE, NO_REPLY, Answer, Answers, Handler
from unionfs.fuse_ops.transports.direct.protocol import Opcode
from unionfs.fuse_ops.transports.direct.request import Request

log = logging.getLogger(__name__)

_NO_ATTRIBUTES: Final = bytes(p.ATTR.size)


class NameAnswers(Answers):
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
