"""Building layer directories for tests."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass

# Long ago and with nanoseconds, so that a time that was not kept is noticed.
OLD_NS = 1_000_000_000_123_456_789
OPAQUE = "trusted.overlay.opaque"
WHITEOUT = "trusted.overlay.whiteout"


@dataclass(frozen=True, slots=True)
class Layer:
    """A directory that is filled by chained calls; every time is set to ``OLD_NS`` unless told otherwise."""

    root: str

    def at(self, path: str) -> str:
        """The path in the host's file system."""
        return os.path.join(self.root, path)

    def _made(self, path: str, mode: int | None, owner: tuple[int, int], mtime_ns: int) -> Layer:
        full = self.at(path)
        if owner != (0, 0):
            os.lchown(full, *owner)
        if mode is not None:
            os.chmod(full, mode)
        os.utime(full, ns=(mtime_ns, mtime_ns), follow_symlinks=False)
        self._age_parents(path)
        return self

    def _age_parents(self, path: str) -> None:
        while path := os.path.dirname(path):
            os.utime(self.at(path), ns=(OLD_NS, OLD_NS))
        os.utime(self.root, ns=(OLD_NS, OLD_NS))

    def _parents(self, path: str) -> None:
        os.makedirs(os.path.dirname(self.at(path)), exist_ok=True)

    def file(
        self,
        path: str,
        content: bytes | str = b"",
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        mtime_ns: int = OLD_NS,
    ) -> Layer:
        """A regular file."""
        self._parents(path)
        with open(self.at(path), "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
        return self._made(path, mode, owner, mtime_ns)

    def sparse(self, path: str, size: int, data_at: int, data: bytes) -> Layer:
        """A file with holes around ``data``."""
        self._parents(path)
        with open(self.at(path), "wb") as f:
            f.truncate(size)
            f.seek(data_at)
            f.write(data)
        return self._made(path, 0o644, (0, 0), OLD_NS)

    def dir(self, path: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0), mtime_ns: int = OLD_NS) -> Layer:
        """A directory."""
        os.makedirs(self.at(path), exist_ok=True)
        return self._made(path, mode, owner, mtime_ns)

    def symlink(self, path: str, target: str, owner: tuple[int, int] = (0, 0), mtime_ns: int = OLD_NS) -> Layer:
        """A symbolic link."""
        self._parents(path)
        os.symlink(target, self.at(path))
        return self._made(path, None, owner, mtime_ns)

    def node(self, path: str, kind: int, major: int = 0, minor: int = 0, mode: int = 0o640) -> Layer:
        """A fifo or device."""
        self._parents(path)
        os.mknod(self.at(path), kind | mode, os.makedev(major, minor))
        return self._made(path, mode, (0, 0), OLD_NS)

    def socket(self, path: str) -> Layer:
        """A unix socket."""
        self._parents(path)
        here = os.open(os.path.dirname(self.at(path)), os.O_PATH)
        try:  # through the descriptor: a socket's address is limited to 108 bytes
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(f"/proc/self/fd/{here}/{os.path.basename(path)}")
        finally:
            os.close(here)
        return self._made(path, 0o755, (0, 0), OLD_NS)

    def link(self, path: str, to: str) -> Layer:
        """A further name for ``to``."""
        self._parents(path)
        os.link(self.at(to), self.at(path))
        self._age_parents(path)
        return self

    def whiteout(self, path: str) -> Layer:
        """The kernel's whiteout: character device 0:0."""
        return self.node(path, stat.S_IFCHR, 0, 0, 0)

    def opaque(self, path: str, name: str = OPAQUE, value: bytes = b"y") -> Layer:
        """Mark a directory as hiding what is below it."""
        self.dir(path)
        return self.xattr(path, name, value)

    def xattr(self, path: str, name: str, value: bytes) -> Layer:
        """An extended attribute."""
        os.setxattr(self.at(path), name, value, follow_symlinks=False)
        return self
