"""Which open files the kernel reads and writes by itself, on the upper file, without asking us.

The kernel's rules (Linux 6.9 and later): all opens of an inode at one time are either passed through to the same
backing file or cached; mixing them is EIO for the program. And it opens the backing *path* anew, with the client's
flags and our credentials, so a backing file must be one that the client may write. Hence:

- Only upper files with their data are passed through, or lower ones on a mount that has no upper: what a reader of a
  lower file has open must show what a later writer puts into the copy.
- While a file has cached users, further ones are cached too; while it has passed-through ones, further ones share
  their backing file.
- A file with setuid, setgid or capabilities is not passed through to a writer: the kernel would write with our
  privileges, and not clear them.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass

from unionfs.fuse_ops.transports.direct.protocol import BACKING_CLOSE, BACKING_MAP, BACKING_OPEN, U32, Open
from unionfs.fuse_ops.tree.attributes import CAPABILITY
from unionfs.fuse_ops.tree.inodes import Inode, OpenFile

_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID


@dataclass(slots=True)
class _Users:
    """Who has an inode open. ``backing_id`` is 0 while they are cached."""

    cached: int = 0
    passed: int = 0
    backing_id: int = 0


class Passthrough:
    """The passthrough state of all open files of one mount; ``fuse_fd`` is its /dev/fuse."""

    def __init__(self, fuse_fd: int, *, read_only: bool) -> None:
        self._fuse_fd = fuse_fd
        self._read_only = read_only
        self._users: dict[Inode, _Users] = {}
        self._passed: set[OpenFile] = set()

    def __len__(self) -> int:
        return len(self._passed)

    def open(self, file: OpenFile, mode: int | None = None) -> tuple[int, int]:
        """The open flags and backing id to answer an open with; :meth:`release` undoes it.

        ``mode`` is the file's, where that is known.
        """
        users = self._users.get(file.inode)
        if users is None:
            users = self._users[file.inode] = _Users()
        if users.passed:
            flags = Open.PASSTHROUGH
            if not self._suitable(file, mode):
                flags |= Open.DIRECT_IO  # reads and writes come to us
        elif users.cached or not self._suitable(file, mode):
            users.cached += 1
            # Pages may be left from before the file was written behind the page cache.
            return (0 if file.inode.upper else int(Open.KEEP_CACHE)), 0
        else:
            users.backing_id = self._register(file.fd)
            if not users.backing_id:
                users.cached += 1
                return 0, 0
            flags = Open.PASSTHROUGH
        users.passed += 1
        self._passed.add(file)
        return int(flags), users.backing_id

    def passes(self, inode: Inode) -> bool:
        """Whether ``inode`` is open and passed through, so that the kernel has nothing of it in its cache."""
        users = self._users.get(inode)
        return users is not None and users.passed > 0

    def release(self, file: OpenFile) -> None:
        """A client's file is closed, and none of its mappings is left."""
        users = self._users[file.inode]
        if file in self._passed:
            self._passed.discard(file)
            users.passed -= 1
            if not users.passed:
                self._unregister(users.backing_id)
                users.backing_id = 0
        else:
            users.cached -= 1
        if not users.passed and not users.cached:
            del self._users[file.inode]

    def _suitable(self, file: OpenFile, mode: int | None) -> bool:
        inode = file.inode
        if inode.metacopy or not (inode.upper or self._read_only):
            return False
        if not file.writable:
            return True
        if file.appends:
            return False
        if (os.fstat(file.fd).st_mode if mode is None else mode) & _SPECIAL_BITS:
            return False
        if inode.kernel.has_no_xattrs:
            return True
        try:
            os.getxattr(file.fd, CAPABILITY)
        except OSError:
            return True
        return False

    def _register(self, fd: int) -> int:
        try:
            # A mutable argument, so that the id comes back as the result of the call.
            return int(fcntl.ioctl(self._fuse_fd, BACKING_OPEN, bytearray(BACKING_MAP.pack(fd, 0, 0))))
        except OSError:
            return 0  # a file system that cannot serve as a backing one, such as an overlay

    def _unregister(self, backing_id: int) -> None:
        fcntl.ioctl(self._fuse_fd, BACKING_CLOSE, U32.pack(backing_id))
