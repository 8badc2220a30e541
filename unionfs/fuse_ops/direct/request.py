"""A request of the kernel as the direct transport reads it: who sent it, about which inode, with which arguments."""

from __future__ import annotations

from typing import Final

UNKNOWN_ID: Final = 0xFFFF_FFFF
"""In the place of user and group, where the kernel leaves them out (linux/fuse.h: FUSE_INVALID_UIDGID)."""

_OVERFLOW_ID: Final = 65534


class Request:
    """One request. ``body`` is what follows the header."""

    __slots__ = ("body", "gid", "node", "pid", "uid", "unique")

    uid: int
    gid: int

    def __init__(self, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes | memoryview) -> None:
        self.unique = unique
        self.node = node
        if uid != UNKNOWN_ID:  # else they are looked up by whoever needs them, which is hardly ever
            self.uid = uid
            self.gid = gid
        self.pid = pid
        self.body = body

    def __getattr__(self, name: str) -> int:
        if name not in ("uid", "gid"):
            raise AttributeError(name)
        self._find_caller()
        return self.uid if name == "uid" else self.gid

    def name(self, offset: int = 0) -> bytes:
        """The zero-terminated name at ``offset`` of the arguments."""
        body = self.body
        return bytes(body[offset : bytes(body).index(b"\0", offset)])

    def _find_caller(self) -> None:
        """Set user and group to those of the sending process.

        Of a process that this one cannot see they are those that stand for unknown ones, without privilege.
        """
        self.uid = self.gid = _OVERFLOW_ID
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"Uid:"):
                        self.uid = int(line.split()[4])  # the fourth is that of file accesses
                    elif line.startswith(b"Gid:"):
                        self.gid = int(line.split()[4])
                        break
        except OSError:
            pass  # it has ended
