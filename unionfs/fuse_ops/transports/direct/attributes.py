"""Answers about attributes and extended attributes."""

from __future__ import annotations

import errno
import os
import time

from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.answers import Answer, Answers, Handler
from unionfs.fuse_ops.transports.direct.packed_attributes import pack
from unionfs.fuse_ops.transports.direct.protocol import Opcode, SetAttr
from unionfs.fuse_ops.transports.direct.request import Request
from unionfs.fuse_ops.tree import backing_calls
from unionfs.fuse_ops.tree.attributes import CAPABILITY
from unionfs.fuse_ops.tree.metadata import AttributeChange


class AttributeAnswers(Answers):
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
        kill = bool(valid & SetAttr.KILL_SUIDGID)
        outcome = self._requests.set_attributes(inode, change, request, kill=kill)
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
        stx = backing_calls.statx(path, follow=follow)
        s, ns = self._attributes_valid(inode)
        data = backing_calls.statx_with(stx, attributes)
        return p.STATX_REPLY.pack(p.STATX_REPLY.size + len(data), 0, request.unique, s, ns, 0, 0, 0) + data

    def _getxattr(self, request: Request) -> bytes:
        size, _ = p.GETXATTR_IN.unpack_from(request.body)
        name = request.name(p.GETXATTR_IN.size)
        inode = self._inode(request)
        if inode.bare and name == CAPABILITY:  # asked before each first write and change of owner
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
