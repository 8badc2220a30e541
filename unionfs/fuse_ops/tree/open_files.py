"""Open files: a descriptor of the real file each, which follows its file when that is copied up."""

from __future__ import annotations

import os
from collections.abc import Callable

from unionfs.fuse_ops.tree.inodes import Inode

# What the kernel has already done, or does itself, when it sends an open: it resolved and created the name, serialises
# appends (and with its writeback cache sends them at their offset), and aligns direct I/O as it likes.
_KERNELS_BUSINESS = (
    os.O_CREAT
    | os.O_EXCL
    | os.O_TRUNC
    | os.O_APPEND
    | os.O_DIRECT
    | os.O_SYNC
    | os.O_DSYNC
    | os.O_NOCTTY
    | os.O_NOATIME
)


def backing_flags(flags: int) -> int:
    """The flags to open the real file with, for a client's ``flags``."""
    result = (flags & ~_KERNELS_BUSINESS & ~os.O_ACCMODE) | os.O_NOFOLLOW | os.O_CLOEXEC
    # The kernel's writeback cache fills pages by reading through descriptors that are open for writing only.
    return result | (os.O_RDONLY if flags & os.O_ACCMODE == os.O_RDONLY else os.O_RDWR)


class OpenFile:
    """A client's open file. ``fd`` stays the same number for its life; copy-up puts another file behind it.

    With ``open_late`` in the place of a descriptor, there is none until it is needed: what the kernel has in its page
    cache is never read from us. ``synced_size``: how large the file was at its last sync if that was short, else 0.
    """

    __slots__ = ("_fd", "_open_late", "appends", "inode", "synced_size", "writable")

    def __init__(
        self, inode: Inode, fd: int, *, writable: bool, open_late: Callable[[Inode], int] | None = None
    ) -> None:
        self.inode = inode
        self._fd = fd
        self.writable = writable
        self._open_late = open_late
        self.synced_size = 0
        self.appends = False  # nothing but that, since the file was append-only when it was opened
        if inode.handles is None:
            inode.handles = []
        inode.handles.append(self)

    @property
    def fd(self) -> int:
        """The descriptor of the real file; raises OSError where it is opened now and cannot be."""
        if self._fd < 0:
            assert self._open_late is not None
            self._fd = self._open_late(self.inode)
        return self._fd

    @property
    def has_fd(self) -> bool:
        return self._fd >= 0

    def switch(self, fd: int) -> None:
        """Put the file behind ``fd`` behind this one, atomically for a read going on in a thread; takes ``fd``."""
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        assert self.inode.handles is not None
        self.inode.handles.remove(self)
        if not self.inode.handles:
            self.inode.handles = None
        if self._fd >= 0:
            os.close(self._fd)


class OpenDir:
    """A client's open directory: the names as they were at the last rewind, so that offsets stay what they are."""

    __slots__ = ("inode", "names")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.names: list[bytes] | None = None
