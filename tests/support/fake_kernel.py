"""A kernel for a transport to serve: a socket pair that speaks FUSE, at whose other end requests are made by hand.

The server is a process of its own, since pyfuse3 can serve one session in each. It opens the layers that it is told,
and reads its requests from the socket as it does from /dev/fuse: one message is one request.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import Init, Opcode

ROOT: Final = 1
_ANSWER_S: Final = 30.0
_MESSAGE_BYTES: Final = (1 << 20) + 4096
# What a kernel offers, as far as a socket can keep the promise: no passthrough, no splicing.
_OFFERED: Final = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.BIG_WRITES
    | Init.DONT_MASK
    | Init.DO_READDIRPLUS
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.POSIX_ACL
    | Init.WRITEBACK_CACHE
    | Init.HANDLE_KILLPRIV_V2
    | Init.SETXATTR_EXT
    | Init.INIT_EXT
)


class FuseError(OSError):
    """The errno that a server answered with."""


@dataclass(frozen=True)
class Attr:
    """The attributes of an answer, without times: struct fuse_attr."""

    ino: int
    size: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    mtime_s: int

    @classmethod
    def unpack(cls, data: bytes) -> Attr:
        ino, size, _, _, mtime, _, _, _, _, mode, nlink, uid, gid, rdev, _, _ = p.ATTR.unpack_from(data)
        return cls(ino, size, mode, nlink, uid, gid, rdev, mtime)


@dataclass(frozen=True)
class Entry:
    """The answer to a request that names something; ``node`` is 0 for a name that is not there."""

    node: int
    attr: Attr


@dataclass
class FakeKernel:
    """Sends requests over ``socket`` and waits for their answers, as a program that makes one system call does."""

    socket: socket.socket
    uid: int = 0
    gid: int = 0
    pid: int = field(default_factory=os.getpid)
    agreed: int = 0
    """The capabilities that the server took: :class:`Init`."""
    _unique: int = 2
    early: dict[int, bytes] = field(default_factory=dict)
    notifications: list[tuple[int, bytes]] = field(default_factory=list)
    """What was sent unasked: code and message."""

    # -- messages ---------------------------------------------------------------------------------------------

    def send(self, code: int, node: int, body: bytes = b"") -> int:
        """Send a request; returns its number, by which :meth:`answer` knows it."""
        self._unique += 2
        length = p.IN_HEADER.size + len(body)
        header = p.IN_HEADER.pack(length, code, self._unique, node, self.uid, self.gid, self.pid, 0, 0)
        self.socket.send(header + body)
        return self._unique

    def answer(self, unique: int) -> bytes:
        """What follows the header of the answer to request ``unique``. Raises FuseError for an errno."""
        while unique not in self.early:
            message = self.socket.recv(_MESSAGE_BYTES)
            if not message:
                raise EOFError("the server is gone")
            length, error, number = p.OUT_HEADER.unpack_from(message)
            assert length == len(message), (length, len(message))
            if number == 0:
                self.notifications.append((error, message[p.OUT_HEADER.size :]))
            else:
                self.early[number] = message
        message = self.early.pop(unique)
        _, error, _ = p.OUT_HEADER.unpack_from(message)
        if error:
            raise FuseError(-error, os.strerror(-error))
        return message[p.OUT_HEADER.size :]

    def ask(self, code: int, node: int, body: bytes = b"") -> bytes:
        """Send a request and wait for its answer."""
        return self.answer(self.send(code, node, body))

    def init(self) -> None:
        """Begin the session."""
        offered = int(_OFFERED)
        body = p.INIT_IN.pack(p.MAJOR, p.MINOR, 1 << 17, offered & 0xFFFF_FFFF, offered >> 32).ljust(64, b"\0")
        answer = self.ask(Opcode.INIT, 0, body)
        self.agreed = struct.unpack_from("=I", answer, 12)[0]

    def _masked(self, mode: int, umask: int) -> int:
        """A kernel whose server does not take DONT_MASK applies the umask itself."""
        return mode if self.agreed & Init.DONT_MASK else mode & ~umask

    # -- names ------------------------------------------------------------------------------------------------

    @staticmethod
    def _entry(answer: bytes) -> Entry:
        node = p.U64.unpack_from(answer)[0]
        return Entry(node, Attr.unpack(answer[p.ENTRY.size :]))

    def lookup(self, node: int, name: str) -> Entry:
        """LOOKUP; a server may say that there is none by ENOENT or by node 0, and both are ``Entry(0, ...)``."""
        try:
            return self._entry(self.ask(Opcode.LOOKUP, node, name.encode() + b"\0"))
        except FuseError as error:
            if error.errno != errno.ENOENT:
                raise
            return Entry(0, Attr(0, 0, 0, 0, 0, 0, 0, 0))

    def walk(self, path: str) -> int:
        """The node of a path below the root."""
        node = ROOT
        for name in path.split("/"):
            entry = self.lookup(node, name)
            assert entry.node, f"{name} of {path} is not there"
            node = entry.node
        return node

    def forget(self, node: int, count: int = 1) -> None:
        """FORGET, which has no answer."""
        self.send(Opcode.FORGET, node, p.U64.pack(count))

    def mkdir(self, node: int, name: str, mode: int, umask: int = 0) -> Entry:
        return self._entry(
            self.ask(Opcode.MKDIR, node, p.MKDIR_IN.pack(self._masked(mode, umask), umask) + name.encode() + b"\0")
        )

    def mknod(self, node: int, name: str, mode: int, rdev: int = 0, umask: int = 0) -> Entry:
        body = p.MKNOD_IN.pack(self._masked(mode, umask), rdev, umask, 0) + name.encode() + b"\0"
        return self._entry(self.ask(Opcode.MKNOD, node, body))

    def symlink(self, node: int, name: str, target: str) -> Entry:
        return self._entry(self.ask(Opcode.SYMLINK, node, name.encode() + b"\0" + target.encode() + b"\0"))

    def readlink(self, node: int) -> str:
        return self.ask(Opcode.READLINK, node).decode()

    def link(self, node: int, directory: int, name: str) -> Entry:
        return self._entry(self.ask(Opcode.LINK, directory, p.U64.pack(node) + name.encode() + b"\0"))

    def unlink(self, node: int, name: str) -> None:
        self.ask(Opcode.UNLINK, node, name.encode() + b"\0")

    def rmdir(self, node: int, name: str) -> None:
        self.ask(Opcode.RMDIR, node, name.encode() + b"\0")

    def rename(self, node: int, name: str, new_node: int, new_name: str, flags: int = 0) -> None:
        body = p.RENAME2_IN.pack(new_node, flags, 0) + name.encode() + b"\0" + new_name.encode() + b"\0"
        self.ask(Opcode.RENAME2, node, body)

    # -- attributes -------------------------------------------------------------------------------------------

    def getattr(self, node: int) -> Attr:
        return Attr.unpack(self.ask(Opcode.GETATTR, node, bytes(16))[16:])

    def setattr(self, node: int, valid: int, **fields: int) -> Attr:
        """SETATTR of ``size``, ``mode``, ``uid``, ``gid``, ``atime``, ``mtime`` (seconds), as ``valid`` says."""
        get = fields.get
        body = p.SETATTR_IN.pack(
            valid, 0, 0, get("size", 0), 0, get("atime", 0), get("mtime", 0), 0,
            0, 0, 0, get("mode", 0), 0, get("uid", 0), get("gid", 0), 0,
        )  # fmt: skip
        return Attr.unpack(self.ask(Opcode.SETATTR, node, body)[16:])

    def getxattr(self, node: int, name: str, size: int = 4096) -> bytes:
        return self.ask(Opcode.GETXATTR, node, p.GETXATTR_IN.pack(size, 0) + name.encode() + b"\0")

    def listxattr(self, node: int, size: int = 65536) -> list[str]:
        names = self.ask(Opcode.LISTXATTR, node, p.GETXATTR_IN.pack(size, 0))
        return [name.decode() for name in names.split(b"\0") if name]

    def setxattr(self, node: int, name: str, value: bytes, flags: int = 0) -> None:
        size = p.SETXATTR_IN.size if self.agreed & Init.SETXATTR_EXT else 8
        header = p.SETXATTR_IN.pack(len(value), flags, 0, 0)[:size]
        self.ask(Opcode.SETXATTR, node, header + name.encode() + b"\0" + value)

    def removexattr(self, node: int, name: str) -> None:
        self.ask(Opcode.REMOVEXATTR, node, name.encode() + b"\0")

    def statfs(self) -> tuple[int, ...]:
        """Blocks, free, available, files, free files, block size, longest name, fragment size."""
        return struct.unpack_from("=5Q3I", self.ask(Opcode.STATFS, ROOT))

    # -- files ------------------------------------------------------------------------------------------------

    def open(self, node: int, flags: int, open_flags: int = 0) -> int:
        """OPEN; returns the handle."""
        return int(p.U64.unpack_from(self.ask(Opcode.OPEN, node, p.OPEN_IN.pack(flags, open_flags)))[0])

    def create(self, node: int, name: str, flags: int, mode: int, umask: int = 0) -> tuple[Entry, int]:
        body = p.CREATE_IN.pack(flags, self._masked(mode, umask), umask, 0) + name.encode() + b"\0"
        answer = self.ask(Opcode.CREATE, node, body)
        return self._entry(answer), int(p.U64.unpack_from(answer, p.ENTRY.size + p.ATTR.size)[0])

    def read(self, node: int, handle: int, offset: int, size: int) -> bytes:
        return self.ask(Opcode.READ, node, p.READ_IN.pack(handle, offset, size, 0, 0, 0, 0))

    def write(self, node: int, handle: int, offset: int, data: bytes, write_flags: int = 0) -> int:
        body = p.WRITE_IN.pack(handle, offset, len(data), write_flags, 0, 0, 0) + data
        return int(p.U32.unpack_from(self.ask(Opcode.WRITE, node, body))[0])

    def fsync(self, node: int, handle: int, *, data_only: bool = False) -> None:
        self.ask(Opcode.FSYNC, node, p.FSYNC_IN.pack(handle, int(data_only), 0))

    def interrupt(self, unique: int) -> None:
        """INTERRUPT, which has no answer: the program that sent request ``unique`` got a signal."""
        self.send(Opcode.INTERRUPT, 0, p.U64.pack(unique))

    def release(self, node: int, handle: int) -> None:
        self.ask(Opcode.RELEASE, node, struct.pack("=QIIQ", handle, 0, 0, 0))

    def contents(self, node: int) -> bytes:
        """All that a program reads of a file that it opens."""
        handle = self.open(node, os.O_RDONLY)
        try:
            return self.read(node, handle, 0, 1 << 17)
        finally:
            self.release(node, handle)

    # -- directories ------------------------------------------------------------------------------------------

    def entries(self, node: int, size: int = 4096) -> dict[str, Entry]:
        """What is in a directory, as a program lists it with a buffer of ``size`` bytes; each counts as looked up."""
        handle = self.open_directory(node)
        found, offset = {}, 0
        while data := self.ask(Opcode.READDIRPLUS, node, p.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)):
            while data:
                entry, data = self._entry(data), data[p.ENTRY.size + p.ATTR.size :]
                _, offset, length, _ = p.DIRENT.unpack_from(data)
                found[data[p.DIRENT.size : p.DIRENT.size + length].decode()] = entry
                data = data[p.DIRENT.size + (length + 7 & ~7) :]
        self.close_directory(node, handle)
        return {name: entry for name, entry in found.items() if name not in (".", "..")}

    def names(self, node: int, size: int = 4096) -> list[str]:
        """The names in a directory, sorted; what was looked up for that is forgotten."""
        entries = self.entries(node, size)
        for entry in entries.values():
            self.forget(entry.node)
        return sorted(entries)

    def open_directory(self, node: int) -> int:
        """OPENDIR; 0 where the server says that directories need not be opened."""
        try:
            return int(p.U64.unpack_from(self.ask(Opcode.OPENDIR, node, p.OPEN_IN.pack(os.O_DIRECTORY, 0)))[0])
        except FuseError as error:
            if error.errno != errno.ENOSYS:
                raise
            return 0

    def close_directory(self, node: int, handle: int) -> None:
        """RELEASEDIR, of a directory that was opened."""
        if handle:
            self.ask(Opcode.RELEASEDIR, node, struct.pack("=QIIQ", handle, 0, 0, 0))

    def fsync_directory(self, node: int) -> None:
        handle = self.open_directory(node)
        self.ask(Opcode.FSYNCDIR, node, p.FSYNC_IN.pack(handle, 0, 0))
        self.close_directory(node, handle)


@contextmanager
def served(options: Sequence[str], *, stall: str = "") -> Iterator[FakeKernel]:
    """A kernel whose requests a server with ``options`` (those of ``-o``) answers, in a process of its own.

    While there is a file ``stall``, all copying of data waits.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES * 2)
    ours.settimeout(_ANSWER_S)
    argv = [sys.executable, "-m", "tests.support.fake_kernel", str(theirs.fileno()), ",".join(options), stall]
    with subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE) as server:
        theirs.close()
        try:
            kernel = FakeKernel(ours)
            kernel.init()
            yield kernel
        finally:
            assert server.stdin is not None
            server.stdin.close()  # the end of the session
            try:
                status = server.wait(_ANSWER_S)
            finally:
                server.kill()
                ours.close()
        assert status == 0, f"the server ended with status {status}"


def _serve(fd: str, options: str, stall: str) -> None:
    import trio

    copy_file_range = os.copy_file_range

    def stalled(*args: int) -> int:
        while os.path.exists(stall):
            time.sleep(0.01)
        return copy_file_range(*args)

    if stall:
        os.copy_file_range = stalled  # type: ignore[assignment]

    from unionfs.fuse_ops.session.assembly import open_tree
    from unionfs.fuse_ops.session.option_text import parse_options
    from unionfs.fuse_ops.transports.choice import choose_transport

    parsed = parse_options([options]).options
    tree = open_tree(parsed)
    transport = choose_transport(tree, parsed)
    transport.mount(f"/dev/fd/{fd}")

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.serve, lambda: None, lambda: None)
            await trio.lowlevel.wait_readable(0)  # closed at the end
            nursery.cancel_scope.cancel()

    try:
        trio.run(serve)
    finally:
        transport.close()
        tree.close()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
