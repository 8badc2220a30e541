"""A request of the kernel as the direct transport reads it: who sent it, about which inode, with which arguments."""

from __future__ import annotations

from typing import Final

from unionfs.fuse_ops.requests.job import Waiter

UNKNOWN_ID: Final = 0xFFFF_FFFF
"""In the place of user and group, where the kernel leaves them out (linux/fuse.h: FUSE_INVALID_UIDGID)."""

_OVERFLOW_ID: Final = 65534


class Request(Waiter):
    """One request. ``body`` is what follows the header."""

    __slots__ = ("_gid", "_uid", "body", "node", "unique")

    def __init__(self, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes | memoryview) -> None:
        super().__init__(pid)
        self.unique = unique
        self.node = node
        self._uid = uid
        self._gid = gid
        self.body = body

    @property
    def uid(self) -> int:
        if self._uid == UNKNOWN_ID:
            self._find_caller()
        return self._uid

    @property
    def gid(self) -> int:
        if self._uid == UNKNOWN_ID:
            self._find_caller()
        return self._gid

    def name(self, offset: int = 0) -> bytes:
        """The zero-terminated name at ``offset`` of the arguments."""
        body = self.body
        return bytes(body[offset : bytes(body).index(b"\0", offset)])

    def _find_caller(self) -> None:
        """Set user and group to those of the sending process.

        Of a process that this one cannot see they are those that stand for unknown ones, without privilege.
        """
        self._uid = self._gid = _OVERFLOW_ID
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"Uid:"):
                        self._uid = int(line.split()[4])  # the fourth is that of file accesses
                    elif line.startswith(b"Gid:"):
                        self._gid = int(line.split()[4])
                        break
        except OSError:
            pass  # it has ended
