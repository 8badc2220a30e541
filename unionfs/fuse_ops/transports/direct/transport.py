"""Serves a mount: what is agreed with the kernel, and the loop that reads requests and has them answered.

A thread answers those that wait for the disk; those that go on with the tree after that become tasks of their own.
After a request the reader looks again for a moment before it goes to sleep: programs send their requests one after the
other, and waking up takes longer than answering.
"""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import select
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, Final

import trio

from unionfs.fuse_ops.options import MountOptions, default_fuse_options
from unionfs.fuse_ops.requests.job import LOOK_S
from unionfs.fuse_ops.speedups.late_sync import LateSync
from unionfs.fuse_ops.speedups.placement import LOOK_EVERY
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.connection import name_of
from unionfs.fuse_ops.transports.direct.handlers import (
    NO_REPLY,
    Answer,
    AttributeHandlers,
    DirectoryHandlers,
    FileHandlers,
    Handler,
    Handlers,
    NameHandlers,
    ServedMount,
)
from unionfs.fuse_ops.transports.direct.passthrough import Passthrough
from unionfs.fuse_ops.transports.direct.protocol import Init, Opcode, Request
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.processes import CAP_SYS_ADMIN, has_capability

log = logging.getLogger(__name__)

MAX_WRITE: Final = 1 << 20
"""Bytes that a request writes at most; the kernel's limit is 256 pages."""


class SessionHandlers(Handlers):
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
        if "default_permissions" in (options.fuse_options or default_fuse_options()):
            wanted |= Init.ALLOW_IDMAP  # the kernel takes it only where it checks permissions by itself
        # Either the kernel writes to upper files by itself, or it caches what is written: it does not do both.
        privileged = has_capability(CAP_SYS_ADMIN)
        # What is passed through needs its descriptor at once, and without an upper directory everything may be.
        self._tree.opens_lazily = privileged and not self._tree.read_only
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


_BUFFER_SIZE: Final = MAX_WRITE + 4096
_LOOK_AGAIN_S: Final = 50e-6  # how long to look for the next request before sleeping
_TURN_S: Final = 2e-3  # how long to serve before other tasks get their turn
_LONG_TURN_S: Final = 10e-3  # the same when there are none that wait for it
_STAY_MS: Final = 2  # how long to stay beside a client that sends nothing
# Requests that no program waits for: the kernel sends them by itself.
_NOBODYS: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.INTERRUPT})
_HANDLERS: Final = (SessionHandlers, NameHandlers, AttributeHandlers, FileHandlers, DirectoryHandlers)


class DirectTransport:
    """Serves a tree on a /dev/fuse of its own."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self.served = ServedMount(tree, options)
        self._connection = self.served.connection
        self._affinity = self._connection.affinity
        self._inline_waits = self.served.inline_waits
        self._ahead = tree.view.lower.observer
        self._look_again_s = _LOOK_AGAIN_S if "polling" in options.speedups else 0.0
        self._waiting = 0  # requests that are tasks of their own
        self._begun: list[tuple[Request, int, Coroutine[Any, Any, bytes]]] = []  # those that are to become such
        self._ready = select.poll()
        # What has no handler is answered with ENOSYS, after which the kernel does not ask again: FLUSH (nothing is
        # buffered here), ACCESS (default_permissions), and syncs and extended attributes where the options say so.
        self._handlers: dict[int, Handler] = defaultdict(lambda: _unknown)
        for handlers in _HANDLERS:
            for code, handler in handlers(self.served).table().items():
                self._handlers[code] = handler

    @property
    def name(self) -> str:
        return "direct" if self.served.passthrough is None else "direct, passthrough"

    def mount(self, target: str) -> None:
        """Mount on ``target``, or take over the /dev/fuse of a mount made by mount.fuse3."""
        self._connection.mount(target, self.served.options)

    async def serve(self, accepted: Callable[[], None], gone: Callable[[], None]) -> None:
        """See :meth:`Transport.serve`."""
        self.served.accepted = accepted
        self._ready.register(self._connection.fd, select.POLLIN)
        # Memory of which only the pages count that requests have filled: most mounts never see a large write.
        buffer = memoryview(mmap.mmap(-1, _BUFFER_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        late_sync = LateSync(self.served.requests, self._affinity.postpone, self._affinity.leave)
        await late_sync.run_beside(functools.partial(self._serve, buffer), gone, self._connection.end_calls)

    async def _serve(self, buffer: memoryview, nursery: trio.Nursery) -> None:
        while await self._turn(buffer, nursery):
            await trio.lowlevel.checkpoint()

    async def _turn(self, view: memoryview, nursery: trio.Nursery) -> bool:
        """Serve for a while; false when the mount is gone."""
        fd = self._connection.fd
        now = time.perf_counter
        affinity = self._affinity
        until = now() + _LONG_TURN_S
        last = 0.0
        while True:
            if affinity.in_other_thread:
                go_on = affinity.run(functools.partial(self._turn_beside, view, until))
                last = now()
                self._begin(nursery)
                if not go_on or self._is_over(until, last):
                    return go_on
            size = self._receive(view)
            if size < 0:
                return False
            if not size:
                if self._stays_beside():
                    continue
                # Others may be waiting for this thread; if not, the next request is probably on its way.
                if self._waiting or now() - last > self._look_again_s:
                    await trio.lowlevel.wait_readable(fd)
                    affinity.slept()
                    until = now() + _LONG_TURN_S
                continue
            self.dispatch(view[:size], nursery)
            last = now()
            if self._is_over(until, last):
                return True

    def _turn_beside(self, view: memoryview, until: float) -> bool:
        """Serve the client that this thread is beside, which is not trio's; false when the mount is gone."""
        while self._affinity.active:
            size = self._receive(view)
            if size < 0:
                return False
            if size:
                self._answer(view[:size])
                if self._is_over(until, time.perf_counter()):
                    break
            elif not self._stays_beside():
                break
        return True

    def _is_over(self, until: float, now: float) -> bool:
        """Whether a turn that lasts ``until`` then at the longest has to end."""
        return now > until or (self._waiting > 0 and now > until - _LONG_TURN_S + _TURN_S)

    def _stays_beside(self) -> bool:
        """Nothing was sent: wait for it beside the client, if that is where this thread is."""
        affinity = self._affinity
        if not affinity.active:
            return False
        if not self._waiting and self._ready.poll(_STAY_MS):
            affinity.slept()
            return True
        affinity.leave()
        return False

    def _receive(self, view: memoryview) -> int:
        """The length of the next request, put into ``view``; 0 when there is none, -1 when the mount is gone."""
        while True:
            try:
                return os.readv(self._connection.fd, [view])
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return -1
                if error.errno not in (errno.EINTR, errno.ENOENT):  # a request that was taken back
                    raise

    def dispatch(self, message: memoryview, nursery: trio.Nursery) -> None:
        """Answer the request in ``message``, now or in a task of ``nursery``."""
        self._answer(message)
        if self._begun:
            self._begin(nursery)

    def _answer(self, message: memoryview) -> None:
        """Answer the request in ``message`` now, or leave it to :meth:`_begin`."""
        _, code, unique, node, uid, gid, pid, _, _ = p.IN_HEADER.unpack_from(message)
        body: bytes | memoryview = message[p.IN_HEADER.size :]
        if code != Opcode.WRITE:
            body = bytes(body)  # the buffer is used again
        if code not in _NOBODYS and (pid or code != Opcode.WRITE):  # the kernel's cache writes by itself too
            before = self._inline_waits.request_from(pid)
            if not before % LOOK_EVERY or self._affinity.in_doubt:
                if self._ahead.busy or self.served.requests.observer.busy:  # those who read want a processor
                    before = 0
                self._affinity.consider(pid, before)
        request = Request(unique, node, uid, gid, pid, body)
        if self._connection.tells:
            log.debug("%s of %#x by process %d: %r", name_of(code), node, pid, bytes(body[:80]))
        try:
            answer = self._handlers[code](request)
            if not isinstance(answer, bytes):
                self._affinity.leave()  # it goes on in threads, which would inherit the place
                self._waiting += 1
                self._connection.waiting[unique] = request
                self._begun.append((request, code, answer))
                return
        except Exception as error:
            answer = self._connection.failure(request, code, error)
        self._connection.reply(answer)

    def _begin(self, nursery: trio.Nursery) -> None:
        """Make tasks of the requests that wait for something."""
        begun, self._begun = self._begun, []
        for request, code, answer in begun:
            nursery.start_soon(self._wait_for, request, code, answer)

    async def _wait_for(self, request: Request, code: int, answer: Coroutine[Any, Any, bytes]) -> None:
        try:
            reply = await answer
        except Exception as error:
            reply = self._connection.failure(request, code, error)
        finally:
            self._waiting -= 1
            self._connection.waiting.pop(request.unique, None)
        self._connection.reply(reply)

    def close(self) -> None:
        """Give the connection up; what still waits for an answer gets ENOTCONN."""
        self._connection.close()


def _unknown(request: Request) -> bytes:
    return p.OUT_HEADER.pack(p.OUT_HEADER.size, -errno.ENOSYS, request.unique)
