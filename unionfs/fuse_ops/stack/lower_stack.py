"""The merged view of the read-only layers: which of them show a name, and what hides it.

Everything here is a pure function of immutable directories. A *stack* is the tuple of directories, top first, that
are merged into one directory; :meth:`LowerStack.lookup` finds a name in it by the kernel's rules: a whiteout or a
file hides what lies below, an opaque directory ends the merge, a redirect continues it under another name.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unionfs.fuse_ops.speedups.directory_ahead import DirectoryReadAhead
from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.overlay.format import MARK, OPAQUE_MARK, OverlayXattrs, is_whiteout

_MANY = 8  # directories to merge, for which it pays to have them read in the background
_FUSE_OVERLAYFS_OPAQUE = b"user.fuseoverlayfs.opaque"


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


class LowerHit(NamedTuple):
    """What a stack shows under a name: a stack of directories, or one file of any other type."""

    st: os.stat_result  # of the topmost object
    dirs: tuple[LowerDir, ...]  # empty for anything but a directory
    layer: LayerDir
    path: bytes
    position: int  # in the stack that was searched


class DirMarks(NamedTuple):
    """What the attributes of a directory in a layer say of the layers below it."""

    opaque: bool
    xwhiteouts: bool
    redirect: bytes | None
    impure: bool
    nested: bool


_NO_MARKS = DirMarks(False, False, None, False, False)


@dataclass(slots=True)
class DirIndex:
    """The names of a stack: for each the positions in the stack that contribute to it, top first."""

    names: dict[bytes, tuple[int, ...]]
    depth: int  # directories of the stack that count; those below an opaque mark do not


class LowerStack:
    """Lookups in the lower layers of one mount.

    ``layers`` and ``data_layers`` are top first. ``follow_redirects`` false makes a redirect an EPERM, as the
    kernel does with ``redirect_dir=nofollow``.
    """

    def __init__(
        self,
        layers: Sequence[LayerDir],
        data_layers: Sequence[LayerDir],
        xattrs: OverlayXattrs,
        *,
        follow_redirects: bool = True,
        read_xattrs: bool = True,
    ) -> None:
        self.layers = tuple(layers)
        self.data_layers = tuple(data_layers)
        self.xattrs = xattrs
        self._follow = follow_redirects
        self._read_xattrs = read_xattrs
        self.ahead = DirectoryReadAhead()
        self.root = tuple(self._root_dirs(self.layers))

    def _root_dirs(self, layers: Sequence[LayerDir]) -> Iterator[LowerDir]:
        for layer in layers:
            marks = self.read_marks(layer.proc_path(b""))
            # The kernel ignores an opaque attribute at the top of a layer.
            yield LowerDir(layer, b"", marks.xwhiteouts, marks.nested)

    # -- attributes of a directory ----------------------------------------------------------------------------

    def read_marks(self, path: bytes) -> DirMarks:
        """The overlay attributes of the directory at ``path`` (a /proc path, its last component not followed)."""
        if not self._read_xattrs:
            return _NO_MARKS
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM):
                return _NO_MARKS
            raise
        if not names:
            return _NO_MARKS
        opaque = xwhiteouts = impure = nested = False
        redirect = None
        x = self.xattrs
        for text in names:
            name = os.fsencode(text)
            if name == x.opaque:
                value = os.getxattr(path, name, follow_symlinks=False)
                opaque = value[:1] == b"y"
                xwhiteouts = value[:1] == b"x"
            elif name == x.redirect:
                redirect = os.getxattr(path, name, follow_symlinks=False)
            elif name == x.impure:
                impure = True
            elif name == x.nested_opaque:
                nested = os.getxattr(path, name, follow_symlinks=False)[:1] == b"x"
            elif name == _FUSE_OVERLAYFS_OPAQUE:
                opaque = opaque or os.getxattr(path, name, follow_symlinks=False)[:1] == b"y"
        return DirMarks(opaque, xwhiteouts, redirect, impure, nested)

    def is_xattr_whiteout(self, path: bytes, st: os.stat_result) -> bool:
        """Whether a file in a directory marked ``opaque=x`` is a whiteout."""
        return _is_empty_file(st) and _has_xattr(path, self.xattrs.whiteout)

    def is_nested_whiteout(self, path: bytes, st: os.stat_result) -> bool:
        """Whether a file in a directory marked for it is the whiteout of an overlay stacked on this mount."""
        return _is_empty_file(st) and _has_xattr(path, self.xattrs.nested_whiteout)

    # -- names ------------------------------------------------------------------------------------------------

    def lookup(self, stack: Sequence[LowerDir], name: bytes) -> LowerHit | None:
        """What ``stack`` shows under ``name``; None if nothing. Raises EPERM at a redirect not to be followed."""
        if len(stack) == 1:
            entry = stack[0]
            st = self._stat_unless_whiteout(entry, name)
            if st is None or st is _HIDDEN:
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
        st = os.stat(name, dir_fd=top.layer.dir_fd(top.path), follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            return self._merge(stack, positions, name, st)
        return LowerHit(st, (), top.layer, top.join(name), positions[0])  # the index has no whiteouts

    def _merge(self, stack: Sequence[LowerDir], positions: Sequence[int], name: bytes, st: os.stat_result) -> LowerHit:
        """The directory that those of ``positions`` make together, all of which are known to be directories."""
        dirs: list[LowerDir] = []
        for position in positions:
            entry = stack[position]
            marks = self.read_marks(b"/proc/self/fd/%d/%s" % (entry.layer.dir_fd(entry.path), name))
            dirs.append(LowerDir(entry.layer, entry.join(name), marks.xwhiteouts, marks.nested))
            if marks.redirect is not None:
                dirs.extend(self._behind_redirect(stack[position + 1 :], entry.layer, marks))
                break
            if marks.opaque:
                break
        return LowerHit(st, tuple(dirs), dirs[0].layer, dirs[0].path, positions[0])

    def _search(self, stack: Sequence[LowerDir], name: bytes) -> LowerHit | None:
        top: tuple[os.stat_result, int] | None = None
        dirs: list[LowerDir] = []
        for position, entry in enumerate(stack):
            layer = entry.layer
            path = entry.join(name)
            st = self._stat_unless_whiteout(entry, name)
            if st is _HIDDEN:
                break
            if st is not None:
                if not stat.S_ISDIR(st.st_mode):
                    if top is None:
                        return LowerHit(st, (), layer, path, position)
                    break
                marks = self.read_marks(layer.proc_path(path))
                if top is None:
                    top = (st, position)
                dirs.append(LowerDir(layer, path, marks.xwhiteouts, marks.nested))
                if marks.redirect is not None:
                    dirs.extend(self._behind_redirect(stack[position + 1 :], layer, marks))
                    break
                if marks.opaque:
                    break
            # `.wh.name` beside the name hides the layers below, not the name itself: OCI layer rules.
            if position + 1 < len(stack) and self._has_mark(entry, name):
                break
        if top is None:
            return None
        return LowerHit(top[0], tuple(dirs), dirs[0].layer, dirs[0].path, top[1])

    def _stat_unless_whiteout(self, entry: LowerDir, name: bytes) -> os.stat_result | None:
        try:
            st = os.stat(name, dir_fd=entry.layer.dir_fd(entry.path), follow_symlinks=False)
        except FileNotFoundError:
            return None
        if is_whiteout(st):
            return _HIDDEN
        if entry.xwhiteouts and self.is_xattr_whiteout(entry.layer.proc_path(entry.join(name)), st):
            return _HIDDEN
        return st

    def _has_mark(self, entry: LowerDir, name: bytes) -> bool:
        if len(name) > 251:
            return False
        try:
            os.stat(MARK + name, dir_fd=entry.layer.dir_fd(entry.path), follow_symlinks=False)
        except OSError:
            return False
        return True

    def _behind_redirect(self, rest: Sequence[LowerDir], layer: LayerDir, marks: DirMarks) -> tuple[LowerDir, ...]:
        assert marks.redirect is not None
        hit = self.resolve_redirect(marks.redirect, rest, [d for d in self.layers if d.index > layer.index])
        return hit.dirs if hit else ()

    def resolve_redirect(
        self, redirect: bytes, siblings: Sequence[LowerDir], layers: Sequence[LayerDir] | None = None
    ) -> LowerHit | None:
        """What lies behind the value of a redirect attribute.

        A relative one names a sibling, looked up in the stack ``siblings``; an absolute one starts at the top of
        ``layers`` (default: all lower layers).
        """
        if not self._follow:
            raise PermissionError(errno.EPERM, "redirect found, and redirect_dir=nofollow", os.fsdecode(redirect))
        if not redirect.startswith(b"/"):
            return self.lookup(siblings, redirect)
        stack = self.root if layers is None else tuple(self._root_dirs(layers))
        return self.walk(redirect.strip(b"/"), stack)

    def walk(self, path: bytes, stack: Sequence[LowerDir] | None = None) -> LowerHit | None:
        """What the merged lower layers show at ``path``, a path of one or more components without a leading slash."""
        dirs: Sequence[LowerDir] = self.root if stack is None else stack
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
        start = time.perf_counter()
        if len(stack) > _MANY and self.ahead.active:
            self.want(stack[1:])
        index = self._read_index(stack)
        self.ahead.took(time.perf_counter() - start, index.depth, len(index.names))
        return index

    def want(self, stack: Sequence[LowerDir]) -> None:
        """Let the directories of ``stack`` be read from the disk: they will be asked for."""
        self.ahead.want([(entry.layer, entry.path) for entry in stack])

    def _read_index(self, stack: Sequence[LowerDir]) -> DirIndex:
        names: dict[bytes, tuple[int, ...]] = {}
        closed: set[bytes] = set()  # names that a file or a whiteout ends
        depth = len(stack)
        for position, entry in enumerate(stack):
            marks: list[bytes] = []
            last = position + 1 == depth
            opaque = False
            for item in scan(entry.layer.dir_fd(entry.path)):
                name = item.name
                if name.startswith(MARK):
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
                if above is None and not self._hidden(entry, item):
                    names[name] = (position,)
            if opaque:
                depth = position + 1
                break
            closed.update(marks)
        return DirIndex(names, depth)

    def _hidden(self, entry: LowerDir, item: os.DirEntry[bytes]) -> bool:
        if item.is_symlink():
            return False
        if item.is_file(follow_symlinks=False):
            return entry.xwhiteouts and self._stat_unless_whiteout(entry, item.name) is _HIDDEN
        return self._stat_unless_whiteout(entry, item.name) is _HIDDEN

    # -- data -------------------------------------------------------------------------------------------------

    def is_metacopy(self, path: bytes) -> bool:
        """Whether the file at ``path`` (a /proc path) carries only metadata."""
        return self._read_xattrs and _has_xattr(path, self.xattrs.metacopy)

    def data_below(
        self, proc_path: bytes, rest: Sequence[LowerDir], name: bytes, below: Sequence[LayerDir]
    ) -> tuple[LayerDir, bytes] | None:
        """Where the contents of the metacopy at ``proc_path`` are; None if they are missing.

        ``rest`` is what remains, below the file, of the stack that it was found in as ``name``; ``below`` are the
        layers below it, where an absolute redirect starts.
        """
        stack: Sequence[LowerDir] = rest
        target = b""
        try:
            redirect = os.getxattr(proc_path, self.xattrs.redirect, follow_symlinks=False)
        except OSError:
            pass
        else:
            if redirect.startswith(b"/"):
                target = redirect.strip(b"/")
                head, _, name = target.rpartition(b"/")
                top = tuple(self._root_dirs(below))
                parent = self.walk(head, top) if head else None
                stack = (parent.dirs if parent is not None else ()) if head else top
            else:
                name = redirect
        hit = self.lookup(stack, name)
        if hit is None:
            return self._in_data_layers(target) if target else None
        if not stat.S_ISREG(hit.st.st_mode):
            return None
        path = hit.layer.proc_path(hit.path)
        if not self.is_metacopy(path):
            return hit.layer, hit.path
        lower = [layer for layer in self.layers if layer.index > hit.layer.index]
        return self.data_below(path, stack[hit.position + 1 :], name, lower)

    def _in_data_layers(self, path: bytes) -> tuple[LayerDir, bytes] | None:
        for layer in self.data_layers:
            try:
                if stat.S_ISREG(layer.stat(path).st_mode):
                    return layer, path
            except OSError:
                continue
        return None


def _is_empty_file(st: os.stat_result) -> bool:
    return st.st_size == 0 and stat.S_ISREG(st.st_mode)


def _has_xattr(path: bytes, name: bytes) -> bool:
    try:
        os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return False
    return True


def scan(dir_fd: int) -> Iterator[os.DirEntry[bytes]]:
    """The entries of a directory, names as bytes."""
    with os.scandir(b"/proc/self/fd/%d" % dir_fd) as entries:
        yield from entries


_HIDDEN: os.stat_result = os.stat_result((0,) * 10)
