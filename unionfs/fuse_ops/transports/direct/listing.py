"""The answers to READDIR and READDIRPLUS: in which order names come, and as many entries as fit, one after the other.

An offset in a listing is made of a name's hash, and names are listed in the order of their hashes. So nothing has to be
kept for an open directory: a reader that goes on at an offset gets every name that has been there all the time once,
whatever was created and removed since. Kept listings only save time. Attributes of lower files are packed once, for all
programs that list a directory.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from unionfs.fuse_ops.requests.union_requests import UnionRequests, has_gone, is_listed_bare
from unionfs.fuse_ops.stack.lower_stack import LowerDir
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import ATTR, attr_fields
from unionfs.fuse_ops.tree.attributes import Attributes
from unionfs.fuse_ops.tree.inodes import ROOT_INO, UNKNOWN_INO, DirInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.union.union_tree import UnionTree

DOT, DOT_DOT = 1, 2  # the offsets after "." and ".."
_FIRST: Final = 3
_HASH_BITS: Final = 30  # an offset fits what 32 bit programs have for it
_KEPT: Final = 16


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


def pack(inode: Inode, attributes: Attributes) -> bytes:
    """``attributes`` of ``inode`` as struct fuse_attr; kept where they stay what they are."""
    packed = ATTR.pack(*attr_fields(attributes))
    # A file of several names has fewer when one of them is removed.
    if not inode.upper and (attributes.nlink == 1 or inode.kind == stat.S_IFDIR):
        inode.kernel.packed = packed
    return packed


class PackedAttributes:
    """Attributes of the inodes of a tree."""

    def __init__(self, view: MergedView) -> None:
        self._view = view

    def of(self, inode: Inode) -> bytes:
        """What stat(2) shows of ``inode``."""
        packed = inode.kernel.packed
        if packed is None or inode.upper or inode.parent is None:  # copied up since, or removed
            return pack(inode, self._view.attributes(inode))
        return packed

    def of_new(self, inode: Inode) -> bytes:
        """As :meth:`of`, for the answer to the request that made ``inode``."""
        return pack(inode, self._view.attributes_of_new(inode))

    def child(self, directory: Inode, name: bytes) -> tuple[Inode, bytes] | None:
        """The object called ``name`` in ``directory`` with its attributes; None if there is none."""
        if isinstance(directory, DirInode) and directory.children is not None:
            inode = directory.children.get(name)
            if inode is not None:
                return inode, self.of(inode)
        found = self._view.child(directory, name)
        return None if found is None else (found[0], pack(*found))


_PLUS_SIZE: Final = p.ENTRY.size + p.ATTR.size
_PADDING: Final = [bytes(-length % 8) for length in range(8)]


class DirectListing:
    """Lists directories of a tree for a kernel that believes what it is told for some time.

    ``valid_s`` and ``valid_ns`` are that time, and ``tick`` that of attributes which may change meanwhile. ``files``
    is told in which order; ``listings`` says it, by the names' hashes unless given.
    """

    def __init__(
        self,
        tree: UnionTree,
        packed: PackedAttributes,
        valid_s: int,
        valid_ns: int,
        requests: UnionRequests,
        listings: Listings | None = None,
        tick: tuple[int, int] = (0, 0),
    ) -> None:
        self._tree = tree
        self._requests = requests
        self._child = packed.child
        self._lower = tree.view.lower
        self._listings = Listings(tree.view) if listings is None else listings
        # Of an entry, after its node: generation, and for how long it and its attributes are valid.
        self._valid = (0, valid_s, valid_s, valid_ns, valid_ns)
        self._changing = (0, valid_s, tick[0], valid_ns, tick[1])

    def answer(self, unique: int, directory: Inode, offset: int, size: int, *, plus: bool) -> bytes:
        """Entries of ``directory`` after ``offset``, at most ``size`` bytes of them, with the header of a reply.

        With ``plus`` each has attributes, and the kernel takes it as looked up; one that cannot be has its name only.
        Raises OSError where we lack what we need for the first entry; if it is for a later one that ends the answer,
        and is met again by whoever goes on.
        """
        answer = bytearray(p.OUT_HEADER.size)
        room = size + len(answer)
        if offset < DOT_DOT:
            self._add_dots(answer, directory, offset, plus=plus)
            offset = DOT_DOT
            listing, position = self._listings.start(directory), 0
        else:
            listing, position = self._listings.go_on(directory, offset)
        offsets, names = listing
        count = len(names)
        if position == count:
            self._listings.drop(directory)
            if plus:
                self._requests.observer.listed(directory, names)
        directories: list[LowerDir] | None = [] if plus and self._lower.observer.wants_more else None
        header = p.DIRENT.size + (_PLUS_SIZE if plus else 0)
        while position < count:
            # Names of one offset come together or not at all: the kernel goes on after it.
            end = position + 1
            if end < count and offsets[end] == offsets[position]:
                while end < count and offsets[end] == offsets[position]:
                    end += 1
                if len(answer) + sum(header + len(name) + 7 for name in names[position:end]) > room:
                    break
            elif len(answer) + header + (len(names[position]) + 7 & ~7) > room:
                break
            for name in names[position:end]:
                try:
                    child = self._child(directory, name)
                except OSError as error:
                    if has_gone(error):
                        continue
                    if not is_listed_bare(error):
                        if len(answer) > p.OUT_HEADER.size:
                            count = 0  # what was found so far has counted as looked up
                            break
                        raise
                    number, kind = UNKNOWN_INO, 0
                    if plus:
                        answer += bytes(_PLUS_SIZE)
                else:
                    if child is None:
                        continue
                    inode, attributes = child
                    number, kind = inode.ino, inode.kind >> 12
                    if plus:
                        inode.lookups += 1
                        answer += p.ENTRY.pack(number, *(self._changing if inode.kernel.may_be_mapped else self._valid))
                        answer += attributes
                    if directories is not None and isinstance(inode, DirInode):
                        directories += inode.lowers
                length = len(name)
                answer += p.DIRENT.pack(number, offsets[position], length, kind)
                answer += name
                answer += _PADDING[length % 8]
            position = end
        if directories:  # who is told of attributes walks on
            self._lower.observer.will_be_read(directories)
        p.OUT_HEADER.pack_into(answer, 0, len(answer), 0, unique)
        return bytes(answer)

    def _add_dots(self, answer: bytearray, directory: Inode, offset: int, *, plus: bool) -> None:
        for after, name, inode in ((DOT, b".", directory), (DOT_DOT, b"..", directory.parent or directory)):
            if after <= offset:
                continue
            if plus:  # these the kernel does not take as looked up, nor their attributes
                answer += bytes(_PLUS_SIZE)
            number = inode.ino if inode.ino != ROOT_INO else self._tree.attributes(inode).ino
            answer += p.DIRENT.pack(number, after, len(name), stat.S_IFDIR >> 12)
            answer += name.ljust(8, b"\0")
