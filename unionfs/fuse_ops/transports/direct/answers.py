"""What the answers of one mount are made of, whatever they are about."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.requests.job import Job, completed, done_here
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.speedups.beside_client import BesideClient
from unionfs.fuse_ops.speedups.early_pages import EarlyPages
from unionfs.fuse_ops.speedups.file_ahead import FileReadAhead
from unionfs.fuse_ops.speedups.patience import Patience
from unionfs.fuse_ops.speedups.short_reads import ShortReads
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.connection import Connection
from unionfs.fuse_ops.transports.direct.packed_attributes import PackedAttributes
from unionfs.fuse_ops.transports.direct.passthrough import Passthrough
from unionfs.fuse_ops.transports.direct.protocol import Opcode, Open
from unionfs.fuse_ops.transports.direct.request import Request
from unionfs.fuse_ops.tree.attributes import DEFAULT_ACL
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.union_tree import UnionTree

Answer = bytes | Coroutine[Any, Any, bytes]
"""A reply, or what has to be waited for until there is one."""

Handler = Callable[[Request], Answer]

T = TypeVar("T")

NO_REPLY: Final = b""
_TICK_NS: Final = 1_000_000  # what the kernel makes one or two ticks of its clock of
ENTRY_SIZE: Final = p.ENTRY_REPLY.size + p.ATTR.size
_ATTR_SIZE: Final = p.ATTR_REPLY.size + p.ATTR.size


class Mount:
    """What belongs to one mount; its parts change while it is served, and are shared by all answers."""

    def __init__(self, tree: UnionTree, options: MountOptions) -> None:
        self.tree = tree
        self.options = options
        speedups = options.speedups
        self.connection = Connection(BesideClient(usable="placement" in speedups))
        self.requests = UnionRequests(tree, options)
        self.requests.last_close.outside = self.connection.beside.outside
        self.packed = PackedAttributes(tree.view)
        self.patience = Patience(usable="inline" in speedups)
        self.short_reads = ShortReads(self.connection.beside)
        if "pages" in speedups:
            ahead = FileReadAhead() if "readahead" in speedups else None
            store, read = self.connection.store_pages, self.short_reads.read
            self.requests.observer = EarlyPages(store, read, self.patience, ahead)
        self.passthrough: Passthrough | None = None  # once the kernel has offered it
        self.accepted: Callable[[], None] = lambda: None
        seconds = min(options.timeout_s, 1e18)
        self.valid_s = int(seconds)
        self.valid_ns = int((seconds - self.valid_s) * 1e9)
        self.tick = (0, min(_TICK_NS, self.valid_ns) if self.valid_s == 0 else _TICK_NS)
        self.keep_cache = int(Open.KEEP_CACHE) if options.timeout_s > 0 else 0


class Answers:
    """Handlers of some kinds of requests, for one mount."""

    def __init__(self, mount: Mount) -> None:
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
        while isinstance(outcome, Job) and outcome.short and self._mount.patience.may_wait():
            start = time.perf_counter()
            outcome = done_here(outcome)
            self._mount.patience.waited_since(start)
        if not isinstance(outcome, Job):
            return encode(outcome)
        job = outcome
        if job.answers_alone:
            request.may_leave = not job.changes
            return self._connection.answer_in_thread(request, code, lambda: encode(job.run()))
        return self._wait(request, job, encode)

    async def _wait(self, request: Request, job: Job[T], encode: Callable[[T], bytes]) -> bytes:
        # A thread would inherit the place beside the client.
        return encode(await completed(job, self._connection.beside.leave, request))

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
        if inode.may_be_mapped:
            if self._requests.is_written(inode):
                return self._mount.tick
            inode.may_be_mapped = False
        return self._valid_s, self._valid_ns

    def _masked(self, directory: Inode, mode: int, umask: int) -> int:
        """``mode`` as POSIX has it: a default ACL takes the place of the umask."""
        if umask and self._options.acl and self._options.xattrs:
            if directory.default_acl is None:
                try:
                    self._tree.get_xattr(directory, DEFAULT_ACL)
                except OSError:
                    directory.default_acl = False
                else:
                    directory.default_acl = True
            if directory.default_acl:
                return mode
        return mode & ~umask
