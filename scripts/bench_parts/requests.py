"""Counts the requests that the kernel sends to a FUSE server, with its own trace events.

That is the same for every peer, and needs nothing of the server. The trace is an instance of its own, so that nobody
else's tracing is touched, and it is filtered to one mount. It slows the mount down: never count and time together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterator

from bench_parts.syscalls import mount, umount2

_ROOT = "/sys/kernel/tracing"
_EVENT = "events/fuse/fuse_request_send"
_PREFIX = "unionfs-bench-"
_BUFFER_KIB = 32768  # for each processor; an event takes some 40 bytes
_OPCODE = re.compile(rb"opcode \d+ \(FUSE_(\w+)\)")
_PIECE_BYTES = 1 << 20


class RequestCounter:
    """The trace instance; :meth:`counting` fills a counter for one mount."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def counting(self, target: str, into: Counter[str]) -> Iterator[None]:
        """Add the requests to the FUSE mount on ``target`` that are sent meanwhile to ``into``, by name."""
        self._write("trace", "")
        self._write(f"{_EVENT}/filter", f"connection == {os.minor(os.stat(target).st_dev)}")
        self._write(f"{_EVENT}/enable", "1")
        try:
            yield
        finally:
            self._write(f"{_EVENT}/enable", "0")
            into.update(self._read())

    def _read(self) -> Counter[str]:
        found: Counter[str] = Counter()
        rest = b""
        fd = os.open(os.path.join(self._directory, "trace_pipe"), os.O_RDONLY | os.O_NONBLOCK)
        try:
            while piece := os.read(fd, _PIECE_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if name := _OPCODE.search(line):
                        found[name[1].decode()] += 1
        except BlockingIOError:
            pass  # that was all
        finally:
            os.close(fd)
        return found

    def _write(self, name: str, text: str) -> None:
        with open(os.path.join(self._directory, name), "w", encoding="ascii") as file:
            file.write(text)


@contextlib.contextmanager
def request_counter() -> Iterator[RequestCounter | None]:
    """A counter, or None where the kernel does not offer one; call it in a mount namespace of our own."""
    with contextlib.ExitStack() as stack:
        try:
            instances = os.path.join(_ROOT, "instances")
            if not os.path.isdir(instances):
                mount("tracefs", _ROOT, "tracefs")
                stack.callback(umount2, _ROOT)
            for old in os.listdir(instances):  # of one that was killed
                if old.startswith(_PREFIX):
                    _remove_abandoned(os.path.join(instances, old))
            directory = os.path.join(instances, f"{_PREFIX}{os.urandom(4).hex()}")
            os.mkdir(directory)
            stack.callback(_remove, directory)
            # Held as long as we live: the sign that it is in use.
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(os.path.join(directory, "buffer_size_kb"), "w", encoding="ascii") as file:
                file.write(str(_BUFFER_KIB))
            os.stat(os.path.join(directory, _EVENT))  # since Linux 6.14
        except OSError:
            stack.close()
            yield None
        else:
            yield RequestCounter(directory)


def _remove(directory: str) -> None:
    with contextlib.suppress(OSError):  # in use by somebody who looks at it
        os.rmdir(directory)


def _remove_abandoned(directory: str) -> None:
    with contextlib.suppress(OSError):  # gone, or in use
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rmdir(directory)
        finally:
            os.close(fd)
