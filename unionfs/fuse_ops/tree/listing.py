"""The order in which a directory is listed, and offsets in it that do not depend on what happens meanwhile.

An offset is made of a name's hash, and names are listed in the order of their hashes. So nothing has to be kept for an
open directory: whoever goes on at an offset gets every name that has been there all the time once, whatever was
created and removed since. Kept listings only save time.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView

DOT, DOT_DOT = 1, 2  # the offsets after "." and ".."
_FIRST: Final = 3
_HASH_BITS: Final = 30  # an offset fits what 32 bit programs have for it
_KEPT: Final = 16
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def has_gone(error: OSError) -> bool:
    """Whether a listed name that could not be looked up was removed since, and is to be left out."""
    return error.errno in _GONE


def is_listed_bare(error: OSError) -> bool:
    """Whether a name that could not be looked up is still one of its directory's: the fault is its own.

    So one damaged or forbidden entry, say with an invalid redirect, does not hide those beside it.
    """
    return error.errno not in _GONE and error.errno not in _NO_ROOM


class Listing(NamedTuple):
    """The names of a directory and, for each, the offset after it; names of equal hash have one offset."""

    offsets: list[int]
    names: list[bytes]


def offset_of(name: bytes) -> int:
    """The offset after ``name``, the same for as long as this process lives."""
    # bytes cache their hash, and it is keyed: nobody can make names that collide.
    return (hash(name) & ((1 << _HASH_BITS) - 1)) + _FIRST


class Listings:
    """The listings of the directories that were read last; ``offset_of`` orders them."""

    def __init__(self, view: MergedView, offset_of: Callable[[bytes], int] = offset_of) -> None:
        self._view = view
        self._offset_of = offset_of
        self._kept: OrderedDict[Inode, Listing] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def start(self, directory: Inode) -> Listing:
        """The names that ``directory`` has now; raises OSError if it cannot be read."""
        offset_of = self._offset_of
        pairs = sorted((offset_of(name), name) for name in self._view.names(directory))
        listing = Listing([offset for offset, _ in pairs], [name for _, name in pairs])
        self._kept[directory] = listing
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return listing

    def go_on(self, directory: Inode, offset: int) -> tuple[Listing, int]:
        """A listing, and the position in it of the first name after ``offset``."""
        listing = self._kept.get(directory) or self.start(directory)
        return listing, bisect_right(listing.offsets, offset)

    def drop(self, directory: Inode) -> None:
        """The end of ``directory`` was reached; its names need not be kept."""
        self._kept.pop(directory, None)
