"""Tar streams made from a directory or from a change list.

The output is a function of the tree alone: sorted names, no clock, no host names; two runs give the same bytes.
Contents pass through in pieces, so memory does not grow with the tree, except for one small record per file that
has several names. The details are Docker's; where its stream would change from run to run
(the time of a deletion) ours is fixed.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter

from unionfs.archive.changes import Change, ChangeKind, Origin
from unionfs.archive.compare import CAPABILITY_XATTR, comparable_xattrs, get_xattr, next_data
from unionfs.archive.idmapping import MapOwner
from unionfs.archive.overlay_view import ALL_SPACES
from unionfs.archive.tar_format import (
    BLOCK_DEVICE,
    CHAR_DEVICE,
    DIRECTORY,
    END_OF_ARCHIVE,
    HARD_LINK,
    REGULAR,
    SYMLINK,
    TarEntry,
    encode_entry,
    kind_of_mode,
    padding,
    show,
)
from unionfs.errors import ArchiveError
from unionfs.host.files import RootedDir, join, open_regular
from unionfs.overlay import rules
from unionfs.overlay.format import MARK, OPAQUE_MARK
from unionfs.overlay.rules import Spaces, entry_path

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_KEPT = 32  # directories held open
_ZEROS = bytes(_PIECE_BYTES)
# Entries may go away under a running container; such a one is simply not there.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})


class XattrSelection(enum.Enum):
    """Which extended attributes go into an archive."""

    CAPABILITY = "capability"
    """``security.capability`` only, as Docker's archives have it."""
    ALL = "all"
    """Every user, trusted and ACL attribute too; overlay's own never."""


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How to write an archive.

    Attributes:
        convert_whiteouts: write overlay whiteouts and opaque directories in the ``.wh.`` form of image layers. For a
            bare layer directory (``diff``); a complete tree is taken literally.
        include_root: begin with an entry ``./`` for the directory itself; Docker leaves it out.
        to_container: maps the owner on disk to that in the archive; None: unchanged.
        owner: (uid, gid) for every entry instead of its own.
        xattrs: which extended attributes to write.
        spaces: the name spaces of xattrs that are the overlay's own, see
            :func:`unionfs.archive.changes.changes_of_upper`.
    """

    convert_whiteouts: bool = False
    include_root: bool = False
    to_container: MapOwner | None = None
    owner: tuple[int, int] | None = None
    xattrs: XattrSelection = XattrSelection.CAPABILITY
    spaces: Spaces = ALL_SPACES


_DEFAULT = PackOptions()


def pack_tree(root: str | bytes, options: PackOptions = _DEFAULT) -> Iterator[bytes]:
    """The tar archive of everything beneath the directory ``root``, in pieces of at most 1 MiB.

    Each directory's names come in the order of their bytes, contents following their directory at once.

    Args:
        root: the directory.
        options: see :class:`PackOptions`.

    Raises:
        ArchiveError: an entry that cannot be read or represented. In ``convert_whiteouts`` mode also a renamed
            directory or metadata-only copy, since their contents lie in other layers: pack the changes instead
            (:func:`pack_changes` of :func:`unionfs.archive.changes.changes_of_upper`).
    """
    with ExitStack() as stack:
        top = stack.enter_context(_open_root(os.fsencode(root)))
        yield from _TreePacker(top, options).pieces()
        yield END_OF_ARCHIVE


def pack_changes(changes: Iterable[Change], options: PackOptions = _DEFAULT) -> Iterator[bytes]:
    """The tar archive of a change list (a layer): whiteouts for deletions, the entries themselves for the rest.

    Args:
        changes: a sequence is put in path order first; an iterator must come in path order, as those of
            :mod:`unionfs.archive.changes` do, and is not held in memory.
        options: see :class:`PackOptions`; ``convert_whiteouts`` and ``include_root`` play no part.

    Raises:
        ArchiveError: an entry that cannot be read or represented, or an iterator out of order.
    """
    if isinstance(changes, Sequence):
        changes = sorted(changes, key=attrgetter("path"))
    with ExitStack() as stack:
        yield from _ChangePacker(stack, options).pieces(changes)
        yield END_OF_ARCHIVE


@contextmanager
def _open_root(path: bytes) -> Iterator[RootedDir]:
    try:
        root = RootedDir(path, _KEPT)
    except OSError as error:
        raise ArchiveError(
            f"cannot read the directory {show(path)}: {error.strerror}; give the path of an existing directory"
        ) from error
    with root:
        yield root


class _Packer:
    """What both kinds of archives share: from an object on disk to the bytes of its entry."""

    def __init__(self, options: PackOptions) -> None:
        self._options = options
        self._first_names: dict[tuple[int, int], bytes] = {}

    def _entry(self, dir_fd: int, base: bytes, name: bytes, info: os.stat_result) -> TarEntry | None:
        """The header of the object ``base`` in ``dir_fd`` under ``name``; None (and a log line) for a socket."""
        kind = kind_of_mode(info.st_mode)
        if kind is None:
            _log.warning("%s: a socket cannot be archived; skipped", show(name))
            return None
        entry = TarEntry(
            name=name,
            kind=kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
        )
        self._map_owner(entry)
        if kind == DIRECTORY:
            entry.name += b"/"
        elif info.st_nlink > 1:
            first = self._first_names.setdefault((info.st_dev, info.st_ino), name)
            if first != name:
                entry.kind = HARD_LINK
                entry.linkname = first
        if entry.kind == SYMLINK:
            entry.linkname = os.readlink(base, dir_fd=dir_fd)
        elif entry.kind in (CHAR_DEVICE, BLOCK_DEVICE):
            entry.major, entry.minor = os.major(info.st_rdev), os.minor(info.st_rdev)
        elif entry.kind == REGULAR:
            entry.size = entry.stored_size = info.st_size
        entry.xattrs = self._xattrs(entry_path(dir_fd, base))
        return entry

    def _map_owner(self, entry: TarEntry) -> None:
        # A whiteout belongs to nobody: the kernel makes it as the host's root, whatever the container's ids are.
        is_whiteout = entry.name.rpartition(b"/")[2].startswith(MARK)
        if self._options.to_container is not None and not is_whiteout:
            try:
                entry.uid, entry.gid = self._options.to_container(entry.uid, entry.gid)
            except ArchiveError as error:
                raise ArchiveError(f"{entry.shown_name()}: {error}") from error
        self._set_owner(entry)

    def _set_owner(self, entry: TarEntry) -> None:
        if self._options.owner is not None:
            entry.uid, entry.gid = self._options.owner

    def _xattrs(self, path: bytes) -> dict[str, bytes]:
        if self._options.xattrs is XattrSelection.ALL:
            found = comparable_xattrs(path, self._options.spaces)
        else:
            value = get_xattr(path, CAPABILITY_XATTR)
            found = {} if value is None else {CAPABILITY_XATTR: value}
        capability = found.get(CAPABILITY_XATTR)
        if capability is not None:
            found[CAPABILITY_XATTR] = _portable_capability(capability)
        return found

    def _contents(self, entry: TarEntry, open_file: Callable[[], int]) -> Iterator[bytes]:
        """Header and contents of a regular file; nothing when it went away meanwhile."""
        try:
            fd = open_file()
        except OSError as error:
            if error.errno in _GONE:
                _log.warning("%s: went away while it was archived; skipped", entry.shown_name())
                # The next name of this file is now the first to carry its contents.
                self._first_names = {k: v for k, v in self._first_names.items() if v != entry.name}
                return
            raise
        try:
            yield encode_entry(entry)
            yield from _read_exactly(fd, entry)
            if entry.size:
                yield padding(entry.size)
        finally:
            os.close(fd)


def _portable_capability(value: bytes) -> bytes:
    """``security.capability`` without the user namespace's root id: revision 3 becomes revision 2.

    The id is one of the host and means nothing in an archive (linux/capability.h: 24 bytes, revision in the
    fourth; revision 2 has the first 20).
    """
    if len(value) == 24 and value[3] == 3:
        return value[:3] + b"\x02" + value[4:20]
    return value


def _read_exactly(fd: int, entry: TarEntry) -> Iterator[bytes]:
    """``entry.size`` bytes of ``fd``; holes are not read. A file that shrank is an error: its header is out."""
    offset, size = 0, entry.size
    sparse = os.fstat(fd).st_blocks * 512 < size
    while offset < size:
        end = size
        if sparse:
            offset_of_data = next_data(fd, offset, size)
            while offset < offset_of_data:
                piece = _ZEROS[: min(_PIECE_BYTES, offset_of_data - offset)]
                offset += len(piece)
                yield piece
            if offset == size:
                return
            end = _next_hole(fd, offset, size)
        while offset < end:
            piece = os.pread(fd, min(_PIECE_BYTES, end - offset), offset)
            if not piece:
                raise ArchiveError(
                    f"{entry.shown_name()}: the file shrank from {size} to {offset} bytes while it was archived; "
                    "stop or pause what writes to it and try again"
                )
            offset += len(piece)
            yield piece


def _next_hole(fd: int, offset: int, size: int) -> int:
    try:
        return min(size, os.lseek(fd, offset, os.SEEK_HOLE))
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EINVAL):  # the file shrank, or a file system that cannot tell
            return size
        raise


def _fail(name: bytes, error: OSError) -> ArchiveError:
    return ArchiveError(f"{show(name)}: cannot be archived: {error.strerror}; make it readable and try again")


class _TreePacker(_Packer):
    def __init__(self, root: RootedDir, options: PackOptions) -> None:
        super().__init__(options)
        self._root = root

    def pieces(self) -> Iterator[bytes]:
        yield from self._root_entry()
        # Directories still to be gone through, with the names left in each, last first.
        todo: list[tuple[bytes, list[bytes]]] = [(b"", self._names(b""))]
        while todo:
            rel, names = todo.pop()
            try:
                dir_fd = self._root.open_dir(rel)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise _fail(rel, error) from error
            xwhiteouts = self._marks(dir_fd, b".").xwhiteouts
            try:
                while names:
                    base = names.pop()
                    name = join(rel, base)
                    try:
                        yield from self._object(dir_fd, base, name, xwhiteouts)
                        is_dir = stat.S_ISDIR(os.lstat(base, dir_fd=dir_fd).st_mode)
                    except OSError as error:
                        if error.errno in _GONE:
                            continue
                        raise _fail(name, error) from error
                    if is_dir:
                        # What is left here waits until this directory is through.
                        if names:
                            todo.append((rel, names))
                        todo.append((name, self._names(name)))
                        break
            finally:
                os.close(dir_fd)

    def _root_entry(self) -> Iterator[bytes]:
        if not self._options.include_root and not self._options.convert_whiteouts:
            return
        entry = self._entry(self._root.fd, b".", b".", os.fstat(self._root.fd))
        if entry is not None and self._options.include_root:
            yield encode_entry(entry)
        if entry is not None and self._options.convert_whiteouts:
            yield from self._opaque_marker(self._root.fd, b".", b"", entry)

    def _names(self, rel: bytes) -> list[bytes]:
        """The names in a directory, to be taken from the end."""
        try:
            fd = self._root.open_dir(rel)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise _fail(rel, error) from error
        try:
            return sorted((os.fsencode(name) for name in os.listdir(fd)), reverse=True)
        finally:
            os.close(fd)

    def _object(self, dir_fd: int, base: bytes, name: bytes, xwhiteouts: bool) -> Iterator[bytes]:
        info = os.lstat(base, dir_fd=dir_fd)
        if self._options.convert_whiteouts:
            if rules.stat_entry(dir_fd, base, self._options.spaces, xwhiteouts=xwhiteouts) is rules.WHITEOUT:
                yield self._whiteout(name, info)
                return
            self._refuse_other_layers(entry_path(dir_fd, base), name, info)
        entry = self._entry(dir_fd, base, name, info)
        if entry is None:
            return
        if entry.kind == REGULAR:
            yield from self._contents(entry, lambda: open_regular(dir_fd, base))
            return
        yield encode_entry(entry)
        if entry.kind == DIRECTORY and self._options.convert_whiteouts:
            yield from self._opaque_marker(dir_fd, base, name, entry)

    def _marks(self, dir_fd: int, base: bytes) -> rules.DirMarks:
        return rules.read_marks(entry_path(dir_fd, base), self._options.spaces)

    def _refuse_other_layers(self, path: bytes, name: bytes, info: os.stat_result) -> None:
        spaces = self._options.spaces
        what = ""
        if stat.S_ISDIR(info.st_mode):
            marks = rules.read_marks(path, spaces)
            if marks.redirect is not None and not marks.opaque:
                what = "renamed by a redirect"
        elif stat.S_ISREG(info.st_mode) and rules.is_metacopy(path, spaces):
            what = "a metadata-only copy, or one not synced yet"
        if what:
            raise ArchiveError(
                f"{show(name)}: is {what}, its contents are in another layer; "
                "unmount the layer if it is mounted, or pack its changes over its lowers instead"
            )

    def _whiteout(self, name: bytes, info: os.stat_result) -> bytes:
        parent, _, base = name.rpartition(b"/")
        entry = TarEntry(
            name=join(parent, MARK + base),
            mode=0o600,
            uid=info.st_uid,
            gid=info.st_gid,
            mtime_ns=info.st_mtime_ns,
        )
        self._set_owner(entry)
        return encode_entry(entry)

    def _opaque_marker(self, dir_fd: int, base: bytes, name: bytes, entry: TarEntry) -> Iterator[bytes]:
        """The ``.wh..wh..opq`` entry that comes right after an opaque directory's own."""
        if self._marks(dir_fd, base).opaque:
            yield encode_entry(
                TarEntry(name=join(name, OPAQUE_MARK), mode=entry.mode & 0o777, uid=entry.uid, gid=entry.gid)
            )


class _ChangePacker(_Packer):
    def __init__(self, stack: ExitStack, options: PackOptions) -> None:
        super().__init__(replace(options, convert_whiteouts=False))
        self._stack = stack
        self._roots: dict[bytes, RootedDir] = {}

    def pieces(self, changes: Iterable[Change]) -> Iterator[bytes]:
        last = b""
        for change in changes:
            if change.path <= last:
                raise ArchiveError(
                    f"{show(change.path)}: comes after {show(last)} in the change list; put the list in path order"
                )
            last = change.path
            name = change.path.lstrip(b"/")
            try:
                if change.kind is ChangeKind.DELETE:
                    yield self._deletion(name)
                elif change.meta is not None:
                    yield from self._change(name, change.meta, change.data)
                else:
                    raise ArchiveError(f"{show(change.path)}: the change list does not say where it lies; list again")
            except OSError as error:
                if error.errno not in _GONE:
                    raise _fail(change.path, error) from error

    def _deletion(self, name: bytes) -> bytes:
        parent, _, base = name.rpartition(b"/")
        # Mode and owner zero as in Docker's; the time is zero too where Docker writes the current one.
        entry = TarEntry(name=join(parent, MARK + base), mode=0)
        self._set_owner(entry)
        return encode_entry(entry)

    def _change(self, name: bytes, meta: Origin, data: Origin | None) -> Iterator[bytes]:
        parent, _, base = meta.rel.rpartition(b"/")
        dir_fd = self._root(meta.root).open(parent, os.O_PATH | os.O_DIRECTORY)
        try:
            info = os.lstat(base, dir_fd=dir_fd)
            entry = self._entry(dir_fd, base, name, info)
        finally:
            os.close(dir_fd)
        if entry is None:
            return
        if entry.kind != REGULAR:
            yield encode_entry(entry)
            return
        if data is None:
            raise ArchiveError(
                f"{show(name)}: is a metadata-only copy whose data is in none of the layers; "
                "give all the lower layers it was made over"
            )
        source = data
        yield from self._contents(entry, lambda: self._root(source.root).open_file(source.rel))

    def _root(self, path: bytes) -> RootedDir:
        root = self._roots.get(path)
        if root is None:
            root = self._roots[path] = self._stack.enter_context(_open_root(path))
        return root
