"""What requests tell of files, to whom it makes a mount faster."""

from __future__ import annotations

from unionfs.fuse_ops.tree.inodes import Inode, OpenFile


class Observer:
    """Is told what happens to files, before the answer goes out. This one does nothing: a mount without speed-ups.

    An answer never depends on an observer.
    """

    @property
    def busy(self) -> bool:
        """Whether something is read in the background just now, for which a processor is wanted."""
        return False

    def opened(self, file: OpenFile, flags: int) -> None:
        """A client opened ``file`` with ``flags``; what it reads goes through the kernel's page cache."""

    def reads(self, file: OpenFile, offset: int, size: int) -> None:
        """The kernel asks for ``size`` bytes of ``file``, which it does not have in its page cache."""

    def listed(self, directory: Inode, names: list[bytes]) -> None:
        """All ``names`` of ``directory`` were told, in this order."""
