"""The merged view of overlay layer directories, read from disk without mounting anything.

It answers "what is at this name" for a stack of layer directories by the rules of :mod:`unionfs.overlay.rules`, and
says *where* the answer lies: change lists compare such answers, archives read their contents.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol

from unionfs.errors import LayerError
from unionfs.host.files import RootedDir, join
from unionfs.overlay import rules
from unionfs.overlay.format import MARK, META_MARK, TRUSTED, USER
from unionfs.overlay.rules import Entry, Spaces

ALL_SPACES: Spaces = (TRUSTED, USER)

# There is nothing at the name; ENAMETOOLONG: such a name cannot exist on the file system.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})


class Place(NamedTuple):
    """Where something lies: a layer, and the path in it without a leading slash (``b""``: the layer itself)."""

    layer: RootedDir
    rel: bytes


@dataclass(frozen=True, slots=True)
class Node:
    """What a view shows at a path.

    Attributes:
        stat: attributes as seen in the view.
        place: where the attributes lie.
        data: where the contents of a regular file lie; differs from ``place`` for a metadata-only copy, None
            when a metadata-only copy has lost its data.
        stack: the directories that make up a merged directory, top first; empty for everything else.
        identity: equal for two nodes that cannot differ, since they are the same object on disk.
    """

    stat: os.stat_result
    place: Place
    data: Place | None
    stack: tuple[Place, ...]
    identity: object

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.stat.st_mode)


class OpenNode(Protocol):
    """A directory of a view while its entries are read; closed by leaving the ``with`` block."""

    def __enter__(self) -> OpenNode: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def names(self) -> set[bytes]:
        """Names that may be present; :meth:`lookup` says whether they are."""
        ...

    def lookup(self, name: bytes) -> Node | None:
        """What the view shows at ``name``; None: nothing."""
        ...


class View(Protocol):
    """A tree that can be compared with another."""

    def root(self) -> Node: ...

    def open(self, node: Node) -> OpenNode: ...


def _list_names(dir_fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(dir_fd)]


class PlainView:
    """A complete tree, taken literally: the view that the naive comparison works on."""

    def __init__(self, root: RootedDir) -> None:
        self._root = root

    def root(self) -> Node:
        return _plain_node(Place(self._root, b""), os.fstat(self._root.fd))

    def open(self, node: Node) -> OpenNode:
        return _OpenPlain(node.place)


def _plain_node(place: Place, info: os.stat_result) -> Node:
    stack = (place,) if stat.S_ISDIR(info.st_mode) else ()
    return Node(info, place, place, stack, (info.st_dev, info.st_ino))


class _OpenPlain:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._fd = place.layer.open_dir(place.rel)

    def __enter__(self) -> _OpenPlain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def names(self) -> set[bytes]:
        return set(_list_names(self._fd))

    def lookup(self, name: bytes) -> Node | None:
        try:
            info = os.lstat(name, dir_fd=self._fd)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        return _plain_node(Place(self._place.layer, join(self._place.rel, name)), info)


class OverlayView:
    """Overlay layers, top first, as one tree.

    Args:
        layers: the layer directories, top first.
        data_only: layers that only absolute redirects of metadata-only copies reach (``::`` in ``lowerdir``).
        spaces: the name spaces of xattrs that are the overlay's own; xattrs in others are the entries'.
    """

    def __init__(
        self, layers: Sequence[RootedDir], data_only: Sequence[RootedDir] = (), *, spaces: Spaces = ALL_SPACES
    ) -> None:
        self.layers = tuple(layers)
        self.spaces = spaces
        self._data_only = tuple(data_only)
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        places = []
        for layer in self.layers:
            places.append(Place(layer, b""))
            # An attribute at the top of a layer is nothing to the kernel (checked on 6.18); the mark is AUFS'.
            if rules.is_marked_opaque(layer.fd):
                break
        self._root = tuple(places)

    def root(self) -> Node:
        return self.directory(self._root)

    def directory(self, stack: Sequence[Place]) -> Node:
        """The directory that those of ``stack``, which must exist, make together."""
        places = tuple(stack)
        top = places[0]
        fd = top.layer.open(top.rel, os.O_PATH | os.O_DIRECTORY)
        try:
            return Node(os.fstat(fd), top, top, places, places)
        finally:
            os.close(fd)

    def open(self, node: Node) -> OpenMerged:
        """Open the directory ``node`` of this view."""
        return OpenMerged(self, node.stack)

    def root_below(self, layer: RootedDir) -> tuple[Place, ...]:
        """The tops of the layers below ``layer``: where its absolute redirects start."""
        return tuple(place for place in self._root if self._index[place.layer] > self._index[layer])

    def is_last(self, layer: RootedDir) -> bool:
        """Whether no other is below ``layer``."""
        return self._index[layer] >= self._index[self._root[-1].layer]

    def walk(self, stack: Sequence[Place], path: bytes) -> Node | None:
        """What the directories of ``stack`` show at ``path``, a path of one or more components."""
        node: Node | None = None
        for name in path.split(b"/"):
            if not stack:
                return None
            with OpenMerged(self, stack) as directory:
                node = directory.lookup(name)
            if node is None:
                return None
            stack = node.stack
        return node

    def find_data(self, path: bytes) -> Place | None:
        """The regular file at ``path`` in one of the data-only layers."""
        for layer in self._data_only:
            try:
                os.close(layer.open_file(path))
            except OSError:
                continue
            return Place(layer, path)
        return None


class _Part(NamedTuple):
    place: Place
    fd: int
    xwhiteouts: bool


class OpenMerged:
    """A merged directory whose layers' directories are held open while its entries are read.

    Only the first is opened at once: the others may never be needed, and unlike an upper directory they do not vanish.
    """

    def __init__(self, view: OverlayView, stack: Sequence[Place]) -> None:
        self._view = view
        self._stack = stack
        self._parts: list[_Part] = []
        self._part(0)

    def __enter__(self) -> OpenMerged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the directories; closing twice is harmless."""
        while self._parts:
            os.close(self._parts.pop().fd)

    def _part(self, i: int) -> _Part:
        while len(self._parts) <= i:
            place = self._stack[len(self._parts)]
            fd = place.layer.open_dir(place.rel)
            marks = rules.read_marks(rules.entry_path(fd, b"."), self._view.spaces)
            self._parts.append(_Part(place, fd, marks.xwhiteouts))
        return self._parts[i]

    def top_names(self) -> set[bytes]:
        """Names about which the top layer's directory says something."""
        return _spoken_of(self._part(0).fd)

    def names(self) -> set[bytes]:
        """Names about which any layer says something."""
        names: set[bytes] = set()
        for i in range(len(self._stack)):
            names |= _spoken_of(self._part(i).fd)
        return names

    def lookup(self, name: bytes) -> Node | None:
        """What the merged directory shows at ``name``; raises :class:`LayerError` for an invalid redirect."""
        return self._lookup(name, 0)

    def _lookup(self, name: bytes, start: int) -> Node | None:
        """As :meth:`lookup`, in the parts from ``start`` on."""
        top: os.stat_result | None = None
        dirs: list[Place] = []
        for i in range(start, len(self._stack)):
            part = self._part(i)
            found = self._probe(i, name)
            hides = found.hides
            if found.st is not None:
                place = Place(part.place.layer, join(part.place.rel, name))
                if not stat.S_ISDIR(found.st.st_mode):
                    if top is not None:
                        break  # a file below a directory: hidden
                    data = self._data(i, name, found) if found.metacopy else place
                    return Node(found.st, place, data, (), (found.st.st_dev, found.st.st_ino))
                top = top or found.st
                dirs.append(place)
                if rules.is_marked_opaque(part.fd, name):
                    break
                if found.redirect is not None:
                    dirs += self._behind(i, found.redirect)
                    break
            if hides:
                break
        if top is None:
            return None
        return Node(top, dirs[0], dirs[0], tuple(dirs), tuple(dirs))

    def _probe(self, i: int, name: bytes) -> Entry:
        part = self._part(i)
        last = i + 1 == len(self._stack) and self._view.is_last(part.place.layer)
        try:
            return rules.probe(part.fd, name, self._view.spaces, xwhiteouts=part.xwhiteouts, last=last)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EACCES):
                raise
            where = join(part.place.layer.path, join(part.place.rel, name))
            raise LayerError(
                f"{os.fsdecode(where)}: {error.strerror}; mend or remove it, no overlay shows it"
            ) from error

    def _behind(self, i: int, redirect: bytes) -> tuple[Place, ...]:
        """The directories that the redirect of a directory in part ``i`` continues with."""
        if redirect.startswith(b"/"):
            node = self._view.walk(self._view.root_below(self._stack[i].layer), redirect[1:])
        else:
            node = self._lookup(redirect, i + 1)
        return node.stack if node is not None else ()

    def _data(self, i: int, name: bytes, found: Entry) -> Place | None:
        """Where the contents of the metadata-only copy ``name`` of part ``i`` lie."""
        if found.redirect is None:
            node = self._lookup(name, i + 1)
        elif not found.redirect.startswith(b"/"):
            node = self._lookup(found.redirect, i + 1)
        else:
            path = found.redirect[1:]
            node = self._view.walk(self._view.root_below(self._stack[i].layer), path)
            if node is None:
                return self._view.find_data(path)
        return node.data if node is not None and stat.S_ISREG(node.stat.st_mode) else None


def _spoken_of(dir_fd: int) -> set[bytes]:
    """The names in a layer's directory, and those that its ``.wh.`` entries speak about."""
    names = set()
    for name in _list_names(dir_fd):
        if not rules.is_mark(name):
            names.add(name)
        elif not name.startswith(META_MARK) and len(name) > len(MARK):
            names.add(name[len(MARK) :])
    return names
