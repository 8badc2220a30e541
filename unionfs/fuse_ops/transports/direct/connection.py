"""The /dev/fuse of a mount, and the threads that answer on it beside the one that serves."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable

import trio

from unionfs.fuse_ops.options import MountOptions, default_fuse_options
from unionfs.fuse_ops.requests.threads import CallThreads
from unionfs.fuse_ops.speedups.placement import ClientAffinity
from unionfs.fuse_ops.transports import mounting
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import Opcode, Request
from unionfs.fuse_ops.tree.inodes import Inode

log = logging.getLogger(__name__)


class Connection:
    """The way of requests and replies. ``fd`` is negative while there is none."""

    def __init__(self, affinity: ClientAffinity) -> None:
        self.fd = -1
        self.affinity = affinity
        self.tells = log.isEnabledFor(logging.DEBUG)
        self._calls = CallThreads()
        self.waiting: dict[int, Request] = {}  # those that threads or tasks are about, by number

    def mount(self, target: str, options: MountOptions) -> None:
        """Mount on ``target``, or take over the /dev/fuse of a mount made by mount.fuse3."""
        handed_over = re.fullmatch(r"/dev/fd/(\d+)", target)
        if handed_over:
            self.fd = int(handed_over.group(1))
            os.set_inheritable(self.fd, False)
        else:
            self.fd = mounting.mount(target, options.fuse_options or default_fuse_options(), options.source)
        os.set_blocking(self.fd, False)

    def reply(self, answer: bytes | memoryview) -> None:
        """Send ``answer``; an empty one is none. Any thread may do this."""
        if not answer:
            return
        try:
            os.write(self.fd, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the program was killed, or the mount is gone
                log.warning("the kernel does not take an answer: %s", error)

    def store_pages(self, inode: Inode, contents: memoryview) -> None:
        """Put ``contents`` into the kernel's page cache, from the beginning of ``inode`` on."""
        length = p.NOTIFY_STORE.size + len(contents)
        header = p.NOTIFY_STORE.pack(length, p.NOTIFY_STORE_CODE, 0, inode.ino, 0, len(contents), 0)
        os.writev(self.fd, [header, contents])

    def failure(self, request: Request, code: int, error: Exception) -> bytes:
        """The reply for a request that ``error`` has ended."""
        number = errno.EIO
        if isinstance(error, OSError) and error.errno:
            number = error.errno
            if self.tells:
                log.debug("%s of %#x: %s", name_of(code), request.node, error)
        else:
            log.error("%s of %#x failed; the program gets EIO", name_of(code), request.node, exc_info=error)
        return p.OUT_HEADER.pack(p.OUT_HEADER.size, -number, request.unique)

    def answer_in_thread(self, request: Request, code: int, call: Callable[[], bytes | memoryview]) -> bytes:
        """Let a thread answer with what ``call`` returns, which waits for the disk and knows nothing of the tree.

        Returns what the handler is to return meanwhile.
        """

        def answer() -> None:
            reply: bytes | memoryview
            try:
                reply = call()
            except Exception as error:
                reply = self.failure(request, code, error)
            self.waiting.pop(request.unique, None)
            self.reply(reply)

        self.waiting[request.unique] = request
        self.affinity.outside(lambda: self._calls.start(answer))
        return b""

    def forget_attributes(self, inode: Inode) -> None:
        """Make the kernel ask for the attributes of ``inode`` when somebody wants them next."""
        self._invalidate(inode, -1)

    def write_back(self, inode: Inode, offset: int) -> None:
        """Have the kernel write what it has cached of ``inode`` from ``offset`` on, which it then reads anew.

        Returns when all is written, by requests that another thread has to answer meanwhile.
        """
        self._invalidate(inode, offset)

    def _invalidate(self, inode: Inode, offset: int) -> None:
        message = p.NOTIFY_INVAL_INODE.pack(
            p.NOTIFY_INVAL_INODE.size, p.NOTIFY_INVAL_INODE_CODE, 0, inode.ino, offset, 0
        )
        try:
            os.write(self.fd, message)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # the kernel has nothing of it, or the mount is gone
                raise

    async def end_calls(self) -> None:
        """Wait for all threads, and go back to where this one ran; nothing can be answered by a thread any more."""
        self.affinity.close()
        # Descriptors that a thread reads from or answers to must not be closed yet. Where there is none, none is
        # made for it: a supervisor's copy, which rehearses this, has to stay a process of one thread.
        if self._calls.has_threads:
            with trio.CancelScope(shield=True):
                # Not one of the program's own limit: all of those may be waiting for this mount.
                await trio.to_thread.run_sync(self._calls.close, limiter=trio.CapacityLimiter(1))

    def close(self) -> None:
        """Give the connection up; what still waits for an answer gets ENOTCONN."""
        self.affinity.close()
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1


def name_of(code: int) -> str:
    """What linux/fuse.h calls a request, for people."""
    try:
        return Opcode(code).name
    except ValueError:
        return f"request {code}"
