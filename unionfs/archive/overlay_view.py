"""The merged view of overlay layer directories, read from disk without mounting anything.

It answers "what is at this name" for a stack of layer directories the way the kernel's overlayfs does, and
says *where* the answer lies: change lists compare such answers, archives read their contents.

On-disk forms understood (sources: the kernel's Documentation/filesystems/overlayfs.rst; the AUFS names of the
OCI image layer specification; fuse-overlayfs): whiteouts as character device 0:0, as an empty file with the
``overlay.whiteout`` xattr in a directory whose ``overlay.opaque`` is ``x``, and as ``.wh.NAME``; opaque directories
as ``overlay.opaque=y`` and as a ``.wh..wh..opq`` entry; ``overlay.redirect`` (relative and absolute) on
directories and files; ``overlay.metacopy``. The xattr prefixes are ``trusted.overlay.``, ``user.overlay.`` and, for
opaque directories, ``user.fuseoverlayfs.``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol

from unionfs.archive.rooted import RootedDir, split_path

WHITEOUT_PREFIX = b".wh."
WHITEOUT_META_PREFIX = b".wh..wh."
OPAQUE_MARKER = b".wh..wh..opq"

TRUSTED_PREFIX = "trusted.overlay."
USER_PREFIX = "user.overlay."
FUSE_OVERLAYFS_PREFIX = "user.fuseoverlayfs."
ALL_PREFIXES = (TRUSTED_PREFIX, USER_PREFIX, FUSE_OVERLAYFS_PREFIX)

# There is nothing at the name; ENAMETOOLONG: such a name cannot exist on the file system.
_ABSENT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_NO_XATTR_ERRNOS = frozenset({errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES})


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


def entry_path(dir_fd: int, name: bytes) -> bytes:
    """A path of ``name`` in ``dir_fd`` for the xattr calls, which take no directory descriptor."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


def _lstat(dir_fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.lstat(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _ABSENT_ERRNOS:
            return None
        raise


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
        info = _lstat(self._fd, name)
        if info is None:
            return None
        return _plain_node(Place(self._place.layer, join(self._place.rel, name)), info)


def join(parent: bytes, name: bytes) -> bytes:
    """``parent/name``, with the root as the empty path."""
    return parent + b"/" + name if parent else name


class _Hit(NamedTuple):
    """What one layer says about a name."""

    whiteout: bool
    stat: os.stat_result | None
    place: Place | None
    stop: bool  # layers further down do not count any more
    redirect: bytes | None  # the name or path to look for in the layers further down
    metacopy: bool  # a regular file whose contents lie further down


_NOTHING = _Hit(False, None, None, False, None, False)
_WHITEOUT = _Hit(True, None, None, True, None, False)
_DEAD_END = _Hit(False, None, None, True, None, False)


class MergedView:
    """Overlay layers, top first, as one tree.

    Args:
        layers: the layer directories, top first.
        data_only: layers that only absolute redirects of metadata-only copies reach (``::`` in ``lowerdir``).
        prefixes: the xattr name spaces that are the overlay's own; xattrs in others are the entries'.
        opaque_root: an opaque xattr on a layer's root hides the layers below. The kernel never takes a root for
            opaque, whatever its xattr says (checked on 6.18).
    """

    def __init__(
        self,
        layers: Sequence[RootedDir],
        data_only: Sequence[RootedDir] = (),
        *,
        prefixes: Sequence[str] = ALL_PREFIXES,
        opaque_root: bool = False,
    ) -> None:
        self.layers = tuple(layers)
        self.prefixes = tuple(prefixes)
        self._opaque_root = opaque_root
        self._data_only = tuple(data_only)
        self._index = {layer: i for i, layer in enumerate(self.layers)}

    def root(self) -> Node:
        places = []
        for layer in self.layers:
            places.append(Place(layer, b""))
            # The marker file is AUFS', and there a root may be opaque.
            if _lstat(layer.fd, OPAQUE_MARKER) is not None:
                break
            if self._opaque_root and is_opaque(overlay_xattrs(layer.fd, self.prefixes)):
                break
        stack = tuple(places)
        return Node(os.fstat(self.layers[0].fd), stack[0], stack[0], stack, stack)

    def open(self, node: Node) -> OpenMerged:
        """Open the directory ``node`` of this view."""
        return OpenMerged(self, node.stack)

    def index(self, layer: RootedDir) -> int:
        """The position of ``layer``, 0 at the top."""
        return self._index[layer]

    def find_data(self, path: bytes) -> Place | None:
        """The regular file at the absolute ``path`` of a data-only layer."""
        for layer in self._data_only:
            hit = probe_path(layer, path, self.prefixes)
            if hit.stat is not None and stat.S_ISREG(hit.stat.st_mode):
                return hit.place
        return None


class _Part(NamedTuple):
    place: Place
    fd: int
    xattr_whiteouts: bool


class OpenMerged:
    """A merged directory whose layers' directories are held open while its entries are read."""

    def __init__(self, view: MergedView, stack: Sequence[Place]) -> None:
        self._view = view
        self._parts: list[_Part] = []
        with ExitStack() as undo:
            for place in stack:
                fd = place.layer.open_dir(place.rel)
                undo.callback(os.close, fd)
                self._parts.append(_Part(place, fd, _has_xattr_whiteouts(fd, view.prefixes)))
            self._close = undo.pop_all()

    def __enter__(self) -> OpenMerged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def top_names(self) -> set[bytes]:
        """Names about which the top layer's directory says something."""
        return _visible_names(self._parts[0].fd)

    def names(self) -> set[bytes]:
        """Names about which any layer says something."""
        names: set[bytes] = set()
        for part in self._parts:
            names |= _visible_names(part.fd)
        return names

    def lookup(self, name: bytes) -> Node | None:
        """What the merged directory shows at ``name``."""
        search = name  # the name in this directory's parts, or an absolute path in whole layers
        parts = iter(self._parts)
        below = 0  # after an absolute redirect: the next layer to look into
        top: _Hit | None = None
        data: Place | None = None
        dirs: list[Place] = []
        metacopy = False
        while True:
            if search.startswith(b"/"):
                if below >= len(self._view.layers):
                    break
                hit = probe_path(self._view.layers[below], search, self._view.prefixes)
                below += 1
            else:
                part = next(parts, None)
                if part is None:
                    break
                hit = _probe(part.place, part.fd, search, part.xattr_whiteouts, self._view.prefixes)
                below = self._view.index(part.place.layer) + 1
            if hit.stat is not None and hit.place is not None:
                is_dir = stat.S_ISDIR(hit.stat.st_mode)
                if top is None:
                    top = hit
                    metacopy = hit.metacopy
                elif is_dir != bool(dirs):
                    break  # a file below a directory, or a directory below a file: hidden
                if is_dir:
                    dirs.append(hit.place)
                else:
                    data = None if hit.metacopy else hit.place
                    metacopy = hit.metacopy
                    if not hit.metacopy:
                        break
            if hit.stop:
                break
            if hit.redirect is not None:
                search = _redirected(search, hit.redirect)
        if top is None or top.stat is None or top.place is None:
            return None
        if metacopy and data is None and search.startswith(b"/"):
            data = self._view.find_data(search)
        stack = tuple(dirs)
        identity: object = stack or (top.stat.st_dev, top.stat.st_ino)
        return Node(top.stat, top.place, data, stack, identity)


def _redirected(search: bytes, redirect: bytes) -> bytes:
    """The path to look for further down, after ``redirect`` was found on the object at ``search``."""
    if redirect.startswith(b"/") or not search.startswith(b"/"):
        return redirect
    return search[: search.rindex(b"/") + 1] + redirect


def _visible_names(dir_fd: int) -> set[bytes]:
    """The names in a layer's directory, and those that its ``.wh.`` entries speak about."""
    names = set()
    for name in _list_names(dir_fd):
        if not name.startswith(WHITEOUT_PREFIX):
            names.add(name)
        elif not name.startswith(WHITEOUT_META_PREFIX) and len(name) > len(WHITEOUT_PREFIX):
            names.add(name[len(WHITEOUT_PREFIX) :])
    return names


def _probe(parent: Place, dir_fd: int, name: bytes, xattr_whiteouts: bool, prefixes: Sequence[str]) -> _Hit:
    """What the layer directory ``parent``, open as ``dir_fd``, says about ``name``."""
    if name.startswith(WHITEOUT_PREFIX):
        return _NOTHING
    info = _lstat(dir_fd, name)
    # A ".wh." entry beside the name itself speaks about the layers below only (OCI image-spec, layer.md).
    hides = _lstat(dir_fd, WHITEOUT_PREFIX + name) is not None
    if info is None:
        return _WHITEOUT if hides else _NOTHING
    place = Place(parent.layer, join(parent.rel, name))
    if stat.S_ISCHR(info.st_mode):
        return _WHITEOUT if info.st_rdev == 0 else _Hit(False, info, place, True, None, False)
    if not stat.S_ISDIR(info.st_mode) and not stat.S_ISREG(info.st_mode):
        return _Hit(False, info, place, True, None, False)
    xattrs = overlay_xattrs(entry_path(dir_fd, name), prefixes)
    redirect = xattrs.get("redirect")
    if redirect is not None and not _valid_redirect(redirect):
        redirect, hides = None, True
    if stat.S_ISREG(info.st_mode):
        if xattr_whiteouts and info.st_size == 0 and "whiteout" in xattrs:
            return _WHITEOUT
        return _Hit(False, info, place, hides, redirect, "metacopy" in xattrs)
    opaque = hides or is_opaque(xattrs) or _has_marker(dir_fd, name)
    return _Hit(False, info, place, opaque, redirect, False)


def _valid_redirect(redirect: bytes) -> bool:
    """Whether a redirect is a single name or an absolute path; one with ``..`` would lead out of the layer."""
    parts = split_path(redirect)
    return bool(parts) and b".." not in parts and (redirect.startswith(b"/") or parts == [redirect])


def _has_marker(dir_fd: int, name: bytes) -> bool:
    try:
        return _lstat(dir_fd, name + b"/" + OPAQUE_MARKER) is not None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symlink took the directory's place meanwhile
            return False
        raise


def probe_path(layer: RootedDir, path: bytes, prefixes: Sequence[str]) -> _Hit:
    """What ``layer`` says about the absolute ``path``, obeying the redirects and opacity met on the way."""
    parts = split_path(path)
    redirect: bytes | None = None
    stop = False
    place = Place(layer, b"")
    hit = _NOTHING
    for i, name in enumerate(parts):
        try:
            fd = layer.open_dir(place.rel)
        except OSError as error:
            if error.errno in (*_ABSENT_ERRNOS, errno.ELOOP):
                return _DEAD_END
            raise
        try:
            hit = _probe(place, fd, name, _has_xattr_whiteouts(fd, prefixes), prefixes)
        finally:
            os.close(fd)
        if hit.place is None or hit.stat is None:
            if redirect is not None:
                redirect += _absolute(parts[i:])
            return hit._replace(stop=hit.stop or stop, redirect=redirect)
        if hit.redirect is not None:
            # Below this layer the rest of the path continues from where the redirect points.
            ancestors = _absolute(parts[:i]) if redirect is None else redirect[: redirect.rindex(b"/")]
            target = hit.redirect if hit.redirect.startswith(b"/") else ancestors + b"/" + hit.redirect
            redirect = target
        elif redirect is not None:
            redirect += b"/" + name
        last = i == len(parts) - 1
        if not last and not stat.S_ISDIR(hit.stat.st_mode):
            return _DEAD_END
        stop = stop or hit.stop
        place = hit.place
    return hit._replace(stop=stop, redirect=redirect)


def _absolute(parts: Sequence[bytes]) -> bytes:
    return b"".join(b"/" + part for part in parts)


def overlay_xattrs(path: bytes | int, prefixes: Sequence[str] = ALL_PREFIXES) -> dict[str, bytes]:
    """Overlay's own xattrs of ``path`` (not followed) by their name without the prefix; the first prefix counts."""
    found: dict[str, bytes] = {}
    for name in list_xattrs(path):
        for prefix in prefixes:
            short = name[len(prefix) :]
            # "overlay." again is an xattr of an overlay nested in this one, none of ours.
            if name.startswith(prefix) and not short.startswith("overlay."):
                value = get_xattr(path, name)
                if value is not None:
                    found.setdefault(short, value)
    return found


def is_opaque(xattrs: dict[str, bytes]) -> bool:
    """Whether a directory with these :func:`overlay_xattrs` hides what is below it."""
    return xattrs.get("opaque", b"").startswith(b"y")


def list_xattrs(path: bytes | int) -> list[str]:
    """Names of the xattrs of ``path``, sorted; none where the file system has no xattrs."""
    try:
        if isinstance(path, int):
            return sorted(os.listxattr(path))
        return sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno in _NO_XATTR_ERRNOS or error.errno in _ABSENT_ERRNOS:
            return []
        raise


def get_xattr(path: bytes | int, name: str) -> bytes | None:
    """The value of one xattr; None when it is not there."""
    try:
        if isinstance(path, int):
            return os.getxattr(path, name)
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTR_ERRNOS or error.errno in _ABSENT_ERRNOS:
            return None
        raise


def _has_xattr_whiteouts(fd: int, prefixes: Sequence[str]) -> bool:
    """Whether files in the open directory can be whiteouts by xattr, which is what the value ``x`` says."""
    return any(get_xattr(fd, prefix + "opaque") == b"x" for prefix in prefixes)
