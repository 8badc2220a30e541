"""Whether a file is opened next whose name was just looked up.

Lookups do not say what they are for. But a program that opens files by their names (compilers, interpreters,
``cat``) has each of them looked up and opens it at once, and one that only asks for attributes opens none. Some do
one with files of one kind and the other with those of another: Python asks when a ``.py`` was changed, and opens the
``.pyc``.
"""

from __future__ import annotations

from typing import Final

from unionfs.fuse_ops.tree.inodes import Inode

_LIKELY: Final = 4
_MOST: Final = 8
_NOT_OPENED: Final = -2  # weighs more: what is read in vain keeps the disk from what is wanted
_KINDS_MAX: Final = 256


class ExpectedOpens:
    """Counts the files that were opened right after they were looked up against those that were not."""

    __slots__ = ("_kinds", "_last", "_score")

    def __init__(self) -> None:
        self._last: Inode | None = None  # the one that was looked up, until it is opened
        self._score = 0
        self._kinds: dict[bytes, int] = {}  # the score of each, as far as something is known of it

    def looked_up(self, inode: Inode) -> bool:
        """A regular file was looked up. Whether it is likely that it will be opened next."""
        last = self._last
        if last is not None and last is not inode:
            self._count(last, _NOT_OPENED)
        self._last = inode
        of_kind = self._kinds.get(_kind(inode), 0)
        return of_kind >= _LIKELY or (of_kind >= 0 and self._score >= _LIKELY)

    def opened(self, inode: Inode) -> None:
        """A file is opened to be read."""
        if inode is self._last:
            self._last = None
            self._count(inode, 1)

    def _count(self, inode: Inode, points: int) -> None:
        kind = _kind(inode)
        if len(self._kinds) >= _KINDS_MAX:
            self._kinds.clear()
        self._kinds[kind] = max(-_MOST, min(self._kinds.get(kind, 0) + points, _MOST))
        self._score = max(0, min(self._score + points, _MOST))


def _kind(inode: Inode) -> bytes:
    return inode.name[inode.name.rfind(b".") + 1 :]
