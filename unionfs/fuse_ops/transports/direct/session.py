"""Answers that belong to the whole mount: what the kernel and we agree on, and how full it is."""

from __future__ import annotations

import errno
from typing import Final

import trio

from unionfs.fuse_ops.options import default_fuse_words
from unionfs.fuse_ops.requests.job import LOOK_S
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.answers import NO_REPLY, Answer, Answers, Handler
from unionfs.fuse_ops.transports.direct.passthrough import Passthrough
from unionfs.fuse_ops.transports.direct.protocol import Init, Opcode
from unionfs.fuse_ops.transports.direct.request import Request
from unionfs.fuse_ops.tree import backing_calls

MAX_WRITE: Final = 1 << 20
"""Bytes that a request writes at most; the kernel's limit is 256 pages."""


class SessionAnswers(Answers):
    """Requests that are about no inode."""

    def table(self) -> dict[Opcode, Handler]:
        """What is answered here."""
        return {
            Opcode.INIT: self._init,
            Opcode.STATFS: self._statfs,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.DESTROY: self.empty,
        }

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
            | Init.HANDLE_KILLPRIV_V2  # without, it asks for security.capability before each write
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
            wanted |= Init.PASSTHROUGH
            self._mount.passthrough = Passthrough(self._connection.fd, read_only=self._tree.read_only)
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
            MAX_WRITE,
            1,  # ns: granularity of times
            MAX_WRITE // 4096,
            0,
            agreed >> 32,
            1 if self._mount.passthrough is not None else 0,  # how deep a stack of file systems may be on top of it
            0,
            *(0,) * 11,
        )
        self._mount.accepted()
        return reply

    def _interrupt(self, request: Request) -> Answer:
        waiting = self._connection.waiting.get(p.U64.unpack_from(request.body)[0])
        return NO_REPLY if waiting is None else self._end_when_killed(waiting)

    async def _end_when_killed(self, waiting: Request) -> bytes:
        """Answer a request early whose program got a signal, once it is one that ends it.

        Not for any other: the kernel tells of one signal only, and programs do not expect EINTR of a file on a disk.
        """
        while waiting.unique in self._connection.waiting:
            if waiting.may_leave and waiting.is_gone():
                waiting.has_left = True
                return p.OUT_HEADER.pack(p.OUT_HEADER.size, -errno.EINTR, waiting.unique)
            await trio.sleep(LOOK_S)
        return NO_REPLY

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
