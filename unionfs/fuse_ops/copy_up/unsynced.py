"""Copies whose data may not be on the disk yet, and what makes up for that after a crash.

``chown -R`` copies one small file after the other, and waiting for the disk takes longer than all the rest of each
copy. Such a copy gets its place at once, with an attribute that says that the lower file still has the data: an
``overlay.metacopy``, as the kernel's metadata-only copies have. Its data is there all the same, for whoever reads the
upper directory. Later, or before anybody may write to it, the data is synced and the attribute removed
(:func:`sync_and_unmark`). So at each moment either the attribute is there or the data is on the disk.

While there may be such copies, the work directory has a file that says so: the next mount after a crash looks for
them, and copies their data again (:mod:`unionfs.fuse_ops.speedups.late_sync`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.tree.inodes import FileInode

NOTE: Final = "unsynced"
"""The file in the work directory, beside ``work``, that says that the upper one may have such copies."""

MANY: Final = 4096
"""Copies that are settled without waiting for more."""


Attribute = tuple[bytes, bytes]
"""Name and value of an extended attribute."""


def sync_and_unmark(fd: int, mark: bytes, origin: Attribute | None) -> None:
    """Sync the copy ``fd``, and put ``origin`` in the place of its attribute ``mark``. May be called in a thread.

    Synced again after that: what is then written to the file, and synced without its metadata, must not lie under an
    attribute that comes back in a crash.
    """
    os.fsync(fd)
    unmark(fd, mark, origin)
    os.fsync(fd)


def unmark(what: int | bytes, mark: bytes, origin: Attribute | None) -> None:
    """Remove the attribute ``mark`` of ``what``, a descriptor or a path in /proc, and give it ``origin``."""
    try:
        os.removexattr(what, mark)
    except OSError as error:
        if error.errno != errno.ENODATA:  # somebody else settled it meanwhile
            raise
    if origin is not None:
        with contextlib.suppress(OSError):  # only costs the stability of its inode number
            os.setxattr(what, *origin)


class Unsynced:
    """The copies of one mount that are to be settled. ``workdir_fd`` is of its work directory, which is ours alone.

    They are remembered for that, as if somebody used them. ``added`` is called with each that comes.
    """

    def __init__(self, workdir_fd: int) -> None:
        self._workdir_fd = workdir_fd
        self._noted = False
        self._keeps_note = False
        self._copies: dict[FileInode, bytes] = {}  # with their origins, in the order in which they were made
        self.added: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._copies)

    def copies(self) -> list[FileInode]:
        """Those that there are now, the oldest first."""
        return list(self._copies)

    def origin_of(self, inode: FileInode) -> bytes | None:
        """The origin that ``inode`` is to have; None if it is not such a copy."""
        return self._copies.get(inode)

    def note(self) -> None:
        """Have the work directory say, across a crash, that there are such copies. Before the first is made."""
        if self._noted:
            return
        fd = os.open(NOTE, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._workdir_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.fsync(self._workdir_fd)
        self._noted = True

    def add(self, inode: FileInode, origin: bytes) -> None:
        """Remember that ``inode`` is such a copy, which is to have ``origin`` recorded when it is settled."""
        inode.unsynced = True
        inode.lookups += 1
        self._copies[inode] = origin
        if self.added is not None:
            self.added()

    def remove(self, inode: FileInode) -> None:
        """``inode`` was settled, or removed. Whoever calls looks whether it is still needed."""
        if inode in self._copies:
            del self._copies[inode]
            inode.unsynced = False
            inode.lookups -= 1

    def end(self, sync: Callable[[], None], remove_mark: Callable[[FileInode], None]) -> None:
        """Settle all at the end of the mount, by ``sync``, which syncs everything, and ``remove_mark`` of each.

        What fails raises OSError, when all others are done, and is left to the next mount.
        """
        sync()
        first: OSError | None = None
        if self._copies:
            for inode in self.copies():
                try:
                    remove_mark(inode)
                except OSError as error:
                    first = first or error
                else:
                    self.remove(inode)
            sync()
        if first is not None:
            raise first
        if self._noted and not self._keeps_note:
            os.unlink(NOTE, dir_fd=self._workdir_fd)
            self._noted = False

    def recovered(self, *, all_of_them: bool) -> None:
        """What an earlier mount left has been settled, or some of it stays for the next one."""
        if all_of_them:
            os.unlink(NOTE, dir_fd=self._workdir_fd)
        self._keeps_note = not all_of_them


def was_noted(workdir_fd: int) -> bool:
    """Whether a server has left such copies, as far as the work directory says."""
    try:
        os.stat(NOTE, dir_fd=workdir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
