"""Which contents in a tar stream can be read back from the unpacked tree, and which are gone.

A layer's record refers to files in the tree that the layer was unpacked into. That fails for contents that a later
entry of the same stream replaced or removed, and for those that were never unpacked (AUFS' own files, a whiteout with
contents). tar-split refuses archives with two entries of one name; here such contents are recorded in full instead.

The names of the stream are kept as a tree, and symbolic links in it are followed as unpacking follows them, so that
``lib/a`` and ``usr/lib/a`` are known to be one file when the stream made ``lib`` a link.
"""

from __future__ import annotations

from collections.abc import Iterator

from unionfs.archive.tar_format import DIRECTORY, PAX_GLOBAL_HEADER, SYMLINK, TarEntry
from unionfs.archive.target import MAX_LINK_STEPS, MAX_LINKS
from unionfs.archive.unpack import clean_name
from unionfs.overlay.format import MARK, META_MARK, OPAQUE_MARK


class _Node:
    __slots__ = ("children", "has_payload", "index", "left_out", "link", "through")

    def __init__(self) -> None:
        self.index = -1  # of the last entry with this name; -1: only a directory on the way
        self.left_out: list[int] = []  # entries after it that repeat the name and hold nothing either
        self.has_payload = False
        self.children: dict[bytes, _Node] = {}
        self.link: bytes | None = None
        self.through: list[int] = []  # entries with contents whose names lead through this link


class PayloadTracker:
    """Follows the entries of one stream and says which must not be recorded as files.

    Args:
        lost: what an earlier pass over the same stream found in :attr:`late`.

    Attributes:
        late: numbers of entries that :meth:`must_embed` was false for, and that turned out to be lost afterwards. When
            there are any the record is wrong: make it again, giving them as ``lost``.
    """

    def __init__(self, lost: frozenset[int] = frozenset()) -> None:
        self._lost = lost
        self._root = _Node()
        self._last: tuple[list[bytes], _Node, list[_Node]] = ([], self._root, [])
        self.late: set[int] = set()

    def must_embed(self, index: int, entry: TarEntry) -> bool:
        """Whether the entry's contents, if any, belong into the record, and no file entry for it.

        Args:
            index: the entry's number in the stream.
            entry: its header.

        Raises:
            BreakoutError: its name leads out of the archive.
        """
        if entry.kind == PAX_GLOBAL_HEADER:
            return False
        parts = clean_name(entry.name)
        hidden = any(part.startswith(MARK) for part in parts)
        if hidden:
            self._whiteout(parts)
        if not parts:
            node, links = self._root, list[_Node]()
        else:
            parent, links = self._directory(parts[:-1])
            node = parent.children.setdefault(parts[-1], _Node())
        if index in self._lost:
            self._become(node, entry)
            node.index, node.has_payload = -1, False
            return True
        sized = entry.stored_size > 0
        repeated = node.index >= 0
        if repeated and not sized and not node.has_payload:
            # Nothing to lose, but the original takes no second entry of this name.
            self._become(node, entry)
            node.left_out.append(index)
            return True
        if repeated:
            self.late.update((node.index, *node.left_out))
            node.left_out = []
        self._become(node, entry)
        if sized and (hidden or entry.sparse is not None):
            # What is read from a sparse file is not what the archive holds: its holes are not there.
            node.index, node.has_payload = -1, False
            return True
        node.index, node.has_payload = index, sized
        if sized:
            for link in links:
                link.through.append(index)
        return False

    def _become(self, node: _Node, entry: TarEntry) -> None:
        if entry.kind != DIRECTORY and node.children:
            self._lose(node)
        self._unlink(node)
        node.link = entry.linkname if entry.kind == SYMLINK else None
        self._last = ([], self._root, [])

    def _whiteout(self, parts: list[bytes]) -> None:
        base = parts[-1]
        if base == OPAQUE_MARK or base.startswith(META_MARK) or not base.startswith(MARK):
            return  # an opaque marker removes nothing that came from this stream
        parent, _ = self._directory(parts[:-1])
        node = parent.children.pop(base[len(MARK) :], None)
        if node is not None:
            self._note(node)
            self._lose(node)
            self._last = ([], self._root, [])

    def _lose(self, node: _Node) -> None:
        """Everything beneath ``node`` is removed."""
        for below in _descendants(node):
            self._note(below)
        node.children = {}

    def _note(self, node: _Node) -> None:
        if node.index >= 0 and node.has_payload:
            self.late.add(node.index)
        self._unlink(node)

    def _unlink(self, node: _Node) -> None:
        """If it is a link, it goes: the contents reached through it may stay, but their names lead nowhere."""
        self.late.update(node.through)
        node.through = []

    def _directory(self, parts: list[bytes]) -> tuple[_Node, list[_Node]]:
        """The directory that ``parts`` lead to, made where it is missing, and the links on the way."""
        if parts != self._last[0]:
            self._last = (parts, *self._follow(parts))
        return self._last[1:]

    def _follow(self, parts: list[bytes]) -> tuple[_Node, list[_Node]]:
        todo = parts[::-1]
        way: list[_Node] = [self._root]
        links: list[_Node] = []
        steps = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(way) > 1:
                    way.pop()
                continue
            node = way[-1].children.setdefault(part, _Node())
            inner = node.link.split(b"/") if node.link is not None else []
            steps += len(inner)
            if inner and len(links) < MAX_LINKS and steps <= MAX_LINK_STEPS:
                links.append(node)
                if not inner[0]:
                    del way[1:]
                todo.extend(inner[::-1])
                continue
            if node.has_payload:
                # A file in the way of a directory: if unpacking allows that at all, the file is gone.
                self._note(node)
                node.index, node.has_payload = -1, False
            way.append(node)
        return way[-1], links


def _descendants(node: _Node) -> Iterator[_Node]:
    todo = list(node.children.values())
    while todo:
        child = todo.pop()
        yield child
        todo.extend(child.children.values())
