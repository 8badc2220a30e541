"""The merged view of the read-only layers: which of them show a name, and what hides it.

Everything here is a pure function of immutable directories. A *stack* is the tuple of directories, top first, that
are merged into one directory; :meth:`LowerStack.lookup` finds a name in it by the kernel's rules: a whiteout or a
file hides what lies below, an opaque directory ends the merge, a redirect continues it under another name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.overlay import rules
from unionfs.overlay.format import MARK, OPAQUE_MARK, OverlayXattrs
from unionfs.overlay.rules import WHITEOUT, DirMarks

if TYPE_CHECKING:
    from os import _ScandirIterator as ScandirIterator


class LowerDir(NamedTuple):
    """One directory of a stack.

    ``xwhiteouts``: zero-size files in it may be whiteouts (``opaque=x``). ``nested``: they may be whiteouts of an
    overlay that is stacked on this mount, and are shown as such.
    """

    layer: LayerDir
    path: bytes
    xwhiteouts: bool
    nested: bool

    def join(self, name: bytes) -> bytes:
        return self.path + b"/" + name if self.path else name

    @property
    def fd(self) -> int:
        """A descriptor of it, which belongs to its layer's cache."""
        return self.layer.dir_fd(self.path)


class LowerHit(NamedTuple):
    """What a stack shows under a name: a stack of directories, or one file of any other type."""

    st: os.stat_result  # of the topmost object
    dirs: tuple[LowerDir, ...]  # empty for anything but a directory
    layer: LayerDir
    path: bytes
    position: int  # in the stack that was searched


@dataclass(slots=True)
class DirIndex:
    """The names of a stack: for each the positions in the stack that contribute to it, top first."""

    names: dict[bytes, tuple[int, ...]]
    depth: int  # directories of the stack that count; those below an opaque mark do not


class StackObserver:
    """Is told what is read of the layers. This one does nothing, and no answer ever depends on one."""

    @property
    def busy(self) -> bool:
        """Whether something is read in the background just now, for which a processor is wanted."""
        return False

    @property
    def wants_more(self) -> bool:
        """Whether :meth:`will_be_read` is of use now."""
        return False

    def reads(self, stack: Sequence[LowerDir]) -> None:
        """All directories of ``stack`` are about to be read."""

    def has_read(self, index: DirIndex) -> None:
        """They have been read."""

    def will_be_read(self, directories: Sequence[LowerDir]) -> None:
        """These directories will probably be read next, the first ones first."""

    def close(self) -> None:
        """The layers are about to be closed."""


class LowerStack:
    """Lookups in the lower layers of one mount, by the rules of :mod:`unionfs.overlay.rules`.

    ``layers`` and ``data_layers`` are top first. ``follow_redirects`` false makes a redirect an EPERM, as the
    kernel does with ``redirect_dir=nofollow``.

    A stack may hold directories below one that a mark ``.wh..wh..opq`` makes opaque: whoever goes down in a stack looks
    for that mark (:meth:`below`), so that nobody reads a directory from the disk just to be told of it.
    """

    def __init__(
        self,
        layers: Sequence[LayerDir],
        data_layers: Sequence[LayerDir],
        xattrs: OverlayXattrs,
        *,
        follow_redirects: bool = True,
        observer: StackObserver | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.data_layers = tuple(data_layers)
        self.spaces = (xattrs,)
        self.follows_redirects = follow_redirects
        self.observer = StackObserver() if observer is None else observer
        self.root = tuple(self._root_dirs())

    def _root_dirs(self) -> list[LowerDir]:
        found = []
        for layer in self.layers:
            # The kernel ignores an opaque attribute at the top of a layer; the mark counts there, too.
            marks = self.read_marks(layer.proc_path(b""))
            found.append(LowerDir(layer, b"", marks.xwhiteouts, marks.nested))
            if rules.is_marked_opaque(layer.fd):
                break
        return found

    def root_below(self, layer: LayerDir) -> tuple[LowerDir, ...]:
        """The top directories of the layers below ``layer``: where its absolute redirects start."""
        return tuple(entry for entry in self.root if entry.layer.index > layer.index)

    def is_last(self, layer: LayerDir) -> bool:
        """Whether no data can lie below ``layer``."""
        return layer.index == len(self.layers) - 1 and not self.data_layers

    def below(self, stack: Sequence[LowerDir], position: int) -> Sequence[LowerDir]:
        """What of ``stack`` comes after ``position`` and is not hidden by a mark in the directory there."""
        rest = stack[position + 1 :]
        if rest and rules.is_marked_opaque(stack[position].fd):
            return ()
        return rest

    def read_marks(self, path: bytes) -> DirMarks:
        """The overlay attributes of the directory at ``path`` (a /proc path, its last component not followed)."""
        return rules.read_marks(path, self.spaces)

    # -- names ------------------------------------------------------------------------------------------------

    def lookup(self, stack: Sequence[LowerDir], name: bytes) -> LowerHit | None:
        """What ``stack`` shows under ``name``; None if nothing. Raises EPERM at a redirect not to be followed."""
        if len(stack) == 1:
            entry = stack[0]
            st = rules.stat_entry(entry.fd, name, self.spaces, xwhiteouts=entry.xwhiteouts)
            if st is None or st is WHITEOUT:
                return None
            if not stat.S_ISDIR(st.st_mode):
                return LowerHit(st, (), entry.layer, entry.join(name), 0)
            return self._merge(stack, (0,), name, st)
        return self._search(stack, name)

    def lookup_indexed(self, stack: Sequence[LowerDir], index: DirIndex, name: bytes) -> LowerHit | None:
        """As :meth:`lookup`, asking only the layers that ``index`` says have the name."""
        positions = index.names.get(name)
        if positions is None:
            return None
        top = stack[positions[0]]
        st = os.stat(name, dir_fd=top.fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            return self._merge(stack, positions, name, st)
        return LowerHit(st, (), top.layer, top.join(name), positions[0])  # the index has no whiteouts

    def _merge(self, stack: Sequence[LowerDir], positions: Sequence[int], name: bytes, st: os.stat_result) -> LowerHit:
        """The directory that those of ``positions`` make together, all of which are known to be directories."""
        dirs: list[LowerDir] = []
        for position in positions:
            entry = stack[position]
            marks = self.read_marks(rules.entry_path(entry.fd, name))
            dirs.append(LowerDir(entry.layer, entry.join(name), marks.xwhiteouts, marks.nested))
            if marks.opaque:
                break
            if marks.redirect is not None and not self._is_last(stack, position):
                behind = self._search(*self._behind(stack, position, marks.redirect))
                dirs.extend(behind.dirs if behind is not None else ())
                break
        return LowerHit(st, tuple(dirs), dirs[0].layer, dirs[0].path, positions[0])

    def _search(self, stack: Sequence[LowerDir], name: bytes) -> LowerHit | None:
        top: tuple[os.stat_result, int] | None = None
        dirs: list[LowerDir] = []
        position = 0
        while position < len(stack):
            entry = stack[position]
            found = rules.probe(
                entry.fd, name, self.spaces, xwhiteouts=entry.xwhiteouts, last=self._is_last(stack, position)
            )
            if found.st is not None:
                if not stat.S_ISDIR(found.st.st_mode):
                    if top is None:
                        return LowerHit(found.st, (), entry.layer, entry.join(name), position)
                    break
                if top is None:
                    top = (found.st, position)
                dirs.append(LowerDir(entry.layer, entry.join(name), found.marks.xwhiteouts, found.marks.nested))
                if found.redirect is not None:
                    stack, name = self._behind(stack, position, found.redirect)
                    position = 0
                    continue
            if found.hides or not self.below(stack, position):
                break
            position += 1
        if top is None:
            return None
        return LowerHit(top[0], tuple(dirs), dirs[0].layer, dirs[0].path, top[1])

    def _is_last(self, stack: Sequence[LowerDir], position: int) -> bool:
        """Whether nothing can be merged with what is at ``position``, neither of this stack nor by a redirect."""
        if position + 1 < len(stack):
            return False
        return not self.follows_redirects or stack[position].layer.index >= self.root[-1].layer.index

    def _behind(self, stack: Sequence[LowerDir], position: int, redirect: bytes) -> tuple[Sequence[LowerDir], bytes]:
        return self._redirected(redirect, self.below(stack, position), self.root_below(stack[position].layer))

    def _redirected(
        self, redirect: bytes, siblings: Sequence[LowerDir], root: Sequence[LowerDir]
    ) -> tuple[Sequence[LowerDir], bytes]:
        """The stack in which a redirect asks for an object, and its name there."""
        if not self.follows_redirects:
            raise PermissionError(errno.EPERM, "redirect found, and redirect_dir=nofollow", os.fsdecode(redirect))
        head, slash, name = rules.check_redirect(redirect).rpartition(b"/")
        if not slash:
            return siblings, name
        if not head:
            return root, name
        parent = self.walk(head[1:], root)
        return () if parent is None else parent.dirs, name

    def resolve_redirect(
        self, redirect: bytes, siblings: Sequence[LowerDir], root: Sequence[LowerDir]
    ) -> LowerHit | None:
        """What lies behind the value of a redirect attribute.

        A relative one names a sibling, looked up in the stack ``siblings``; an absolute one starts at ``root``. Raises
        OSError for one that is invalid, or is not to be followed.
        """
        return self._search(*self._redirected(redirect, siblings, root))

    def walk(self, path: bytes, stack: Sequence[LowerDir]) -> LowerHit | None:
        """What ``stack`` shows at ``path``, a path of one or more components without a leading slash."""
        dirs = stack
        hit: LowerHit | None = None
        for name in path.split(b"/"):
            if hit is not None:
                dirs = hit.dirs
            hit = self.lookup(dirs, name) if dirs else None
            if hit is None:
                return None
        return hit

    # -- listings ---------------------------------------------------------------------------------------------

    def index(self, stack: Sequence[LowerDir]) -> DirIndex:
        """All names that ``stack`` shows. Reads every directory of it once."""
        self.observer.reads(stack)
        index = self._read_index(stack)
        self.observer.has_read(index)
        return index

    def _read_index(self, stack: Sequence[LowerDir]) -> DirIndex:
        names: dict[bytes, tuple[int, ...]] = {}
        closed: set[bytes] = set()  # names that a file or a whiteout ends
        depth = len(stack)
        for position, entry in enumerate(stack):
            marks: list[bytes] = []
            last = position + 1 == depth
            opaque = False
            with scan(entry.fd) as items:
                for item in items:
                    name = item.name
                    if rules.is_mark(name):
                        if name == OPAQUE_MARK:
                            opaque = True
                        else:
                            marks.append(name[len(MARK) :])
                        continue
                    if name in closed:
                        continue
                    above = names.get(name)
                    if item.is_dir(follow_symlinks=False):
                        names[name] = (*above, position) if above else (position,)
                        continue
                    if not last:
                        closed.add(name)
                    if above is None and not rules.is_whiteout_entry(entry.fd, item, self.spaces, entry.xwhiteouts):
                        names[name] = (position,)
            if opaque:
                depth = position + 1
                break
            closed.update(marks)
        return DirIndex(names, depth)

    # -- data -------------------------------------------------------------------------------------------------

    def is_metacopy(self, what: bytes | int) -> bool:
        """Whether a file, given by a /proc path or a descriptor, carries only metadata."""
        return rules.is_metacopy(what, self.spaces)

    def data_below(
        self, path: bytes, rest: Sequence[LowerDir], name: bytes, root: Sequence[LowerDir]
    ) -> tuple[LayerDir, bytes] | None:
        """Where the contents of the metacopy at ``path`` (a /proc path) are; None if they are missing.

        ``rest`` is what remains, below the file, of the stack that it was found in as ``name``; ``root`` are the tops
        of the layers below it, where an absolute redirect starts. Raises OSError as :meth:`resolve_redirect`.
        """
        stack = rest
        redirect = rules.read_redirect(path, self.spaces)
        if redirect is not None:
            redirect = rules.check_redirect(redirect)
            stack, name = self._redirected(redirect, rest, root)
        hit = self.lookup(stack, name) if stack else None
        if hit is None:
            if redirect is None or not redirect.startswith(b"/"):
                return None
            return self._in_data_layers(redirect[1:])
        if not stat.S_ISREG(hit.st.st_mode):
            return None
        path = hit.layer.proc_path(hit.path)
        if not self.is_metacopy(path):
            return hit.layer, hit.path
        return self.data_below(path, self.below(stack, hit.position), name, self.root_below(hit.layer))

    def _in_data_layers(self, path: bytes) -> tuple[LayerDir, bytes] | None:
        for layer in self.data_layers:
            try:
                if stat.S_ISREG(layer.stat(path).st_mode):
                    return layer, path
            except OSError:
                continue
        return None


def scan(dir_fd: int) -> ScandirIterator[bytes]:
    """The entries of a directory, names as bytes; to be used in a ``with``."""
    return os.scandir(b"/proc/self/fd/%d" % dir_fd)
