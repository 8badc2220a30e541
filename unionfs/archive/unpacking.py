"""Applying a layer's tar stream to a directory, whatever the stream tries.

Nothing outside of the target is ever created, changed or read: the parent of every entry is opened with openat2(2),
which follows no link; those met on the way (which the archive itself may have made, or another process may swap in)
lead to places in the target only, as they would in a container. The entry itself is made by a call on that descriptor
which never follows a link. What is in an entry's way is removed, never written into.

The rules for whiteouts, duplicates, owners and times are Docker's.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from unionfs.archive.compare import CAPABILITY_XATTR, get_xattr, list_xattrs
from unionfs.archive.idmapping import MapOwner
from unionfs.archive.layer_target import LayerTarget
from unionfs.archive.stash import Stash
from unionfs.archive.tar_format import (
    BLOCK_DEVICE,
    CHAR_DEVICE,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    PAX_GLOBAL_HEADER,
    REGULAR,
    SYMLINK,
    TarEntry,
    show,
)
from unionfs.archive.tar_reader import Readable, TarReader
from unionfs.archive.target import DEFAULT_ACL, NEW_FILE_FLAGS, Parent, Target, drop_acls
from unionfs.errors import ArchiveError, BreakoutError
from unionfs.host.files import RootedDir, join
from unionfs.host.syscalls import in_user_namespace
from unionfs.overlay.format import FUSE_OVERLAYFS_PREFIX, MARK, META_MARK, OPAQUE_MARK, TRUSTED, USER, may_use_trusted
from unionfs.overlay.rules import entry_path

_log = logging.getLogger(__name__)

_MAX_TIME_NS = (1 << 63) - 1
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1  # the kernel's dev_t
_KEPT = 16  # directories held open, of the target and of all layers below
_HARD_LINK_DIR = b".wh..wh.plnk"

# Eight times PATH_MAX: deeper than any tree in use, and still no means to fill a disk with directories.
_MAX_NAME_BYTES = 1 << 15
# They would stand for nothing, for the directory itself and for the one above it.
_INVALID_WHITEOUTS = (MARK, MARK + b".", MARK + b"..")

# What a file system for containers has; the others are those of other systems (com.apple., system.nfs4_acl).
_LINUX_XATTRS = ("user.", "trusted.", "security.", "system.posix_acl_")
_PAGE_BYTES = 4096
_ZERO_PAGE = bytes(_PAGE_BYTES)
_OVERLAY_XATTRS = tuple(map(os.fsdecode, (TRUSTED.prefix, USER.prefix, FUSE_OVERLAYFS_PREFIX)))
_NO_SUPPORT = frozenset({errno.ENOTSUP, errno.ENOSYS})
_FOREIGN = _NO_SUPPORT | {errno.EINVAL, errno.ERANGE}


class WhiteoutMode(enum.Enum):
    """What a ``.wh.`` entry does."""

    DELETE = "delete"
    """It removes what it names: for a complete tree (NaiveDiff, vfs, a layer with none below it)."""
    OVERLAY = "overlay"
    """It becomes an overlay whiteout or the opaque xattr: for a bare layer directory."""
    KEEP = "keep"
    """It stays a file with that name: for a layer directory of a file system that reads those."""


class DevicePolicy(enum.Enum):
    """What to do with device nodes."""

    AUTO = "auto"
    """Create them; in a user namespace, where that is not allowed, leave them out as Docker does."""
    CREATE = "create"
    SKIP = "skip"
    REFUSE = "refuse"
    """An archive with a device is an error."""


@dataclass(frozen=True, slots=True)
class UnpackOptions:
    """How to apply an archive.

    Attributes:
        whiteouts: see :class:`WhiteoutMode`.
        to_host: maps the owner in the archive to that on disk; None: unchanged.
        owner: (uid, gid) for every entry instead of its own; an unprivileged user gives their own.
        parents_owner: (uid, gid) of directories that entries need but the archive does not have; None: what
            ``to_host`` (or ``owner``) makes of 0:0.
        devices: see :class:`DevicePolicy`.
        best_effort_xattrs: go on when the file system takes no xattrs; otherwise that is an error.
        lowers: for :attr:`WhiteoutMode.OVERLAY`, the layer directories below the target, top first. What the archive
            says of objects in them (whiteouts, hard links, entries in directories and behind links) then has the effect
            that it would have on a copy of them all. None: they are not known.
        user_xattrs: mark opaque directories with ``user.overlay.`` instead of ``trusted.overlay.``; None: where the
            latter are not for us (in a user namespace).
        include_root: apply an entry for the root itself (``./``) to the target directory; Docker leaves it out.
    """

    whiteouts: WhiteoutMode = WhiteoutMode.DELETE
    to_host: MapOwner | None = None
    owner: tuple[int, int] | None = None
    parents_owner: tuple[int, int] | None = None
    devices: DevicePolicy = DevicePolicy.AUTO
    best_effort_xattrs: bool = False
    lowers: Sequence[str | bytes] | None = None
    user_xattrs: bool | None = None
    include_root: bool = False


@dataclass(slots=True)
class UnpackResult:
    """What was applied.

    Attributes:
        entries: how many entries the archive had.
        size: sum of the sizes in their headers in bytes, as Docker's naive ``ApplyDiff`` reports it.
        skipped: how many were left out (devices in a user namespace).
    """

    entries: int = 0
    size: int = 0
    skipped: int = 0


_DEFAULT = UnpackOptions()


def unpack(stream: Readable, root: str | bytes, options: UnpackOptions = _DEFAULT) -> UnpackResult:
    """Apply the tar archive in ``stream`` to the directory ``root``, and read the stream to its end.

    Args:
        stream: the archive, uncompressed (:mod:`unionfs.archive.compression` opens others).
        root: the directory; it must exist.
        options: see :class:`UnpackOptions`.

    Raises:
        BreakoutError: an entry points outside of ``root``.
        ArchiveError: the archive is damaged, or an entry cannot be made; what came before it stays.
    """
    with contextlib.ExitStack() as stack:
        top = _open_directory(stack, root, "unpack into", _KEPT)
        lowers = options.lowers
        keep = max(_KEPT // len(lowers), 1) if lowers else 0
        below = None if lowers is None else [_open_directory(stack, lower, "read the layer", keep) for lower in lowers]
        return _Unpacker(TarReader(stream), top, below, options).run()


def _open_directory(stack: contextlib.ExitStack, path: str | bytes, doing: str, keep: int) -> RootedDir:
    try:
        return stack.enter_context(RootedDir(path, keep))
    except OSError as error:
        raise ArchiveError(
            f"cannot {doing} {os.fsdecode(path)}: {error.strerror}; give the path of an existing directory"
        ) from error


def clean_name(name: bytes) -> list[bytes]:
    """The components of an entry's name, ``a/../b`` resolved; empty for the root itself.

    Raises:
        BreakoutError: the name leads upwards out of the root.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part != b"..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise BreakoutError(f"{show(name)}: the entry points outside of the archive; do not trust this archive")
    return parts


class _Unpacker:
    def __init__(
        self, reader: TarReader, root: RootedDir, lowers: list[RootedDir] | None, options: UnpackOptions
    ) -> None:
        self._reader = reader
        self._options = options
        self._result = UnpackResult()
        self._in_userns = in_user_namespace()
        use_user = not may_use_trusted() if options.user_xattrs is None else options.user_xattrs
        self._target = (
            LayerTarget(root, self._parents_owner(), USER if use_user else TRUSTED, lowers)
            if options.whiteouts is WhiteoutMode.OVERLAY
            else Target(root, self._parents_owner())
        )
        self._stash = Stash(root.fd)
        self._xattr_warned = False

    def _parents_owner(self) -> tuple[int, int]:
        options = self._options
        if options.parents_owner is not None:
            return options.parents_owner
        if options.owner is not None:
            return options.owner
        if options.to_host is not None:
            return options.to_host(0, 0)
        return (0, 0) if os.geteuid() == 0 else (os.geteuid(), os.getegid())

    def run(self) -> UnpackResult:
        with contextlib.closing(self._target), contextlib.closing(self._stash):
            for entry in self._reader:
                self._result.entries += 1
                self._result.size += entry.size
                try:
                    self._apply(entry)
                except OSError as error:
                    raise self._failed(entry, error) from error
            self._target.set_all_times()
            self._reader.drain()
        return self._result

    def _failed(self, entry: TarEntry, error: OSError) -> ArchiveError:
        advice = "check the target directory and its file system"
        if error.errno == errno.EINVAL and self._in_userns:
            # What lchown(2) says in a user namespace about an id that is not mapped into it.
            advice = "try increasing the number of subordinate IDs in /etc/subuid and /etc/subgid"
        elif error.errno in (errno.EPERM, errno.EACCES):
            advice = "run as root, also of a user namespace (unshare --map-root-user --map-auto --mount)"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room on the file system"
        elif entry.kind == HARD_LINK and error.errno == errno.ENOENT:
            return ArchiveError(
                f"{entry.shown_name()}: the hard link's target {show(entry.linkname)} is not there; "
                "apply the layer over the one that has it"
            )
        return ArchiveError(f"{entry.shown_name()}: cannot be unpacked: {error.strerror or error}; {advice}")

    # One entry

    def _apply(self, entry: TarEntry) -> None:
        if entry.kind == PAX_GLOBAL_HEADER:
            return
        if b"\0" in entry.name or b"\0" in entry.linkname:
            raise ArchiveError(f"{entry.shown_name()}: the name has a NUL in it; do not trust this archive")
        parts = clean_name(entry.name)
        if not parts:
            if self._options.include_root and entry.kind == DIRECTORY:
                self._map_owner(entry)
                self._finish_dir(entry, os.dup(self._target.root.fd), b"", clear=True)
            return
        if len(entry.name) > _MAX_NAME_BYTES:
            raise ArchiveError(f"{show(entry.name[:60])}...: the name is too long; do not trust this archive")
        if parts[-1] in _INVALID_WHITEOUTS:
            raise ArchiveError(f"{entry.shown_name()}: invalid whiteout entry; do not trust this archive")
        if self._options.whiteouts is not WhiteoutMode.KEEP and self._whiteout(entry, parts):
            return
        self._map_owner(entry)
        self._node(entry, parts)

    def _map_owner(self, entry: TarEntry) -> None:
        if self._options.owner is not None:
            entry.uid, entry.gid = self._options.owner
        elif self._options.to_host is not None:
            try:
                entry.uid, entry.gid = self._options.to_host(entry.uid, entry.gid)
            except ArchiveError as error:
                raise ArchiveError(f"{entry.shown_name()}: {error}") from error

    # Whiteouts

    def _whiteout(self, entry: TarEntry, parts: list[bytes]) -> bool:
        """Act on an entry that is a whiteout or one of AUFS' own files; False: it is neither."""
        if parts[0] == _HARD_LINK_DIR and len(parts) == 2 and entry.kind == REGULAR:
            self._stash.add(parts[1], entry, self._reader.contents())
            return True
        base = parts[-1]
        if base.startswith(META_MARK) and base != OPAQUE_MARK:
            return True
        for part in parts[:-1]:
            if part.startswith(META_MARK):
                return True
            if part.startswith(MARK):
                raise ArchiveError(f"{entry.shown_name()}: invalid whiteout entry: it is used as a directory")
        if not base.startswith(MARK):
            return False
        if base == OPAQUE_MARK:
            self._target.hide_all(parts[:-1])
        else:
            self._target.white_out(parts[:-1], base[len(MARK) :], lambda: self._mapped_owner(entry))
        return True

    def _mapped_owner(self, entry: TarEntry) -> tuple[int, int]:
        self._map_owner(entry)
        return entry.uid, entry.gid

    # Nodes

    def _node(self, entry: TarEntry, parts: list[bytes]) -> None:
        if entry.kind == HARD_LINK:
            self._hard_link(entry, parts)
            return
        if entry.kind not in (DIRECTORY, REGULAR, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, FIFO):
            raise ArchiveError(
                f"{entry.shown_name()}: unhandled tar header type {show(entry.kind)}; make the archive without it"
            )
        name = parts[-1]
        parent = self._target.parent(parts[:-1])
        if entry.kind == DIRECTORY:
            fd, new = self._target.make_dir(parent, name)
            self._finish_dir(entry, fd, join(parent.path, name), clear=not new or parent.inherits)
        elif entry.kind == REGULAR:
            self._regular(entry, parent, name, self._reader.contents())
        elif entry.kind == SYMLINK:
            if not entry.linkname:
                raise ArchiveError(f"{entry.shown_name()}: the symlink has no target; make the archive again")
            self._make(parent, name, lambda: os.symlink(entry.linkname, name, dir_fd=parent.fd))
            self._finish_by_name(entry, parent, name)
        else:
            self._special(entry, parent, name)

    def _make(self, parent: Parent, name: bytes, create: Callable[[], None]) -> None:
        """Call ``create``, once more after removing what is in its way."""
        try:
            create()
        except FileExistsError:
            self._target.remove(parent, name)
            create()
        self._target.remember(parent, name)

    def _finish_dir(self, entry: TarEntry, fd: int, path: bytes, *, clear: bool) -> None:
        """Owner, xattrs and mode now, the times at the very end. ``clear``: it may have xattrs of its own."""
        try:
            os.fchown(fd, entry.uid, entry.gid)
            cleared = self._clear_xattrs(entry, fd) if clear else []
            self._set_xattrs(entry, fd)
            os.fchmod(fd, entry.mode)
            self._target.set_times(fd, path, *_times(entry))
            if DEFAULT_ACL in entry.xattrs or DEFAULT_ACL in cleared:
                self._target.default_acl_changed()
        finally:
            os.close(fd)

    @staticmethod
    def _clear_xattrs(entry: TarEntry, fd: int) -> list[str]:
        """Remove the xattrs that the entry does not have: it replaces those of a directory that is there."""
        cleared = []
        for name in list_xattrs(fd):
            if name in entry.xattrs or name.startswith(_OVERLAY_XATTRS):
                continue
            if name == CAPABILITY_XATTR or name.startswith(("user.", "trusted.", "system.posix_acl_")):
                with contextlib.suppress(PermissionError):  # as those that cannot be set
                    os.removexattr(fd, name)
                    cleared.append(name)
        return cleared

    def _regular(self, entry: TarEntry, parent: Parent, name: bytes, contents: Iterator[bytes]) -> None:
        fd = -1

        def create() -> None:
            nonlocal fd
            fd = os.open(name, NEW_FILE_FLAGS, 0o600, dir_fd=parent.fd)

        self._make(parent, name, create)
        try:
            _write(fd, entry, contents)
            if parent.inherits:
                drop_acls(fd)
            os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                self._set_xattrs(entry, fd)
            os.fchmod(fd, entry.mode)
            os.utime(fd, ns=_times(entry))
        finally:
            os.close(fd)

    def _hard_link(self, entry: TarEntry, parts: list[bytes]) -> None:
        name = parts[-1]
        try:
            target = clean_name(entry.linkname)
        except BreakoutError:
            raise BreakoutError(
                f"{entry.shown_name()}: the hard link points outside of the archive, to {show(entry.linkname)}; "
                "do not trust this archive"
            ) from None
        if target and target[0] == _HARD_LINK_DIR and self._options.whiteouts is not WhiteoutMode.KEEP:
            found = self._stash.get(target[-1]) if len(target) == 2 else None
            if found is None:
                raise ArchiveError(
                    f"{entry.shown_name()}: invalid aufs hardlink to {show(entry.linkname)}; make the archive again"
                )
            stashed, contents = found
            entry.kind, entry.size, entry.sparse = REGULAR, stashed.size, stashed.sparse
            entry.stored_size = stashed.stored_size
            self._regular(entry, self._target.parent(parts[:-1]), name, contents)
            return
        if not target:
            raise ArchiveError(f"{entry.shown_name()}: the hard link has no target; make the archive again")
        try:
            source = self._target.link_source(target)
        except IsADirectoryError:
            raise ArchiveError(
                f"{entry.shown_name()}: is a hard link to the directory {show(entry.linkname)}, "
                "which cannot be; make the archive again"
            ) from None
        source = source._replace(fd=os.dup(source.fd))
        try:
            parent = self._target.parent(parts[:-1])
            if _differs(entry, source, target[-1]):
                self._target.separate(source, target[-1])
            if (source.inode, target[-1]) != (parent.inode, name):

                def create() -> None:
                    os.link(target[-1], name, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)

                self._make(parent, name, create)
            self._finish_by_name(entry, parent, name)
        finally:
            os.close(source.fd)

    def _special(self, entry: TarEntry, parent: Parent, name: bytes) -> None:
        device = 0
        if entry.kind != FIFO:
            if self._skips_device(entry):
                self._result.skipped += 1
                return
            if entry.major > _MAX_MAJOR or entry.minor > _MAX_MINOR:
                raise ArchiveError(
                    f"{entry.shown_name()}: device number {entry.major}:{entry.minor} is out of Linux' range; "
                    "make the archive without it"
                )
            device = os.makedev(entry.major, entry.minor)
        kind = {FIFO: stat.S_IFIFO, CHAR_DEVICE: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK}[entry.kind]
        try:
            self._make(parent, name, lambda: os.mknod(name, kind | 0o600, device, dir_fd=parent.fd))
        except PermissionError:
            if not (self._in_userns and self._options.devices is DevicePolicy.AUTO):
                raise
            self._result.skipped += 1
            return
        if parent.inherits:
            drop_acls(entry_path(parent.fd, name))
        self._finish_by_name(entry, parent, name)

    def _skips_device(self, entry: TarEntry) -> bool:
        policy = self._options.devices
        if policy is DevicePolicy.REFUSE:
            raise ArchiveError(f"{entry.shown_name()}: is a device, which is not allowed here; remove it")
        return policy is DevicePolicy.SKIP or (policy is DevicePolicy.AUTO and self._in_userns)

    # Attributes

    def _finish_by_name(self, entry: TarEntry, parent: Parent, name: bytes) -> None:
        """Owner, xattrs, mode and times of something that must not be opened for real."""
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
        try:
            info = os.fstat(handle)
            if stat.S_ISLNK(info.st_mode):
                # These have calls that do not follow; through /proc a link's handle would not do.
                os.chown(name, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)
                self._set_xattrs(entry, entry_path(parent.fd, name))
                os.utime(name, ns=_times(entry), dir_fd=parent.fd, follow_symlinks=False)
                return
            path = b"/proc/self/fd/%d" % handle
            # A further name of a file: chown(2) would take its capability away, which only the first name's
            # entry need have.
            if (info.st_uid, info.st_gid) != (entry.uid, entry.gid):
                os.chown(path, entry.uid, entry.gid)
            self._set_xattrs(entry, path, follow=True)
            os.chmod(path, entry.mode)
            os.utime(path, ns=_times(entry))
        finally:
            os.close(handle)

    def _set_xattrs(self, entry: TarEntry, path: bytes | int, follow: bool = False) -> None:
        for name, value in entry.xattrs.items():
            # Overlay's own would make the layer show, or reach, something else than the archive holds.
            if name.startswith(_OVERLAY_XATTRS) or "\0" in name:
                continue
            try:
                if isinstance(path, int):
                    os.setxattr(path, name, value)
                else:
                    os.setxattr(path, name, value, follow_symlinks=follow)
            except OSError as error:
                self._xattr_failed(entry, name, error)

    def _xattr_failed(self, entry: TarEntry, name: str, error: OSError) -> None:
        shown = show(name.encode("utf-8", "surrogateescape"))
        foreign = not name.startswith(_LINUX_XATTRS) and error.errno in _FOREIGN
        lenient = self._options.best_effort_xattrs and error.errno in _NO_SUPPORT
        if error.errno == errno.EPERM or foreign or lenient:
            if not self._xattr_warned:
                _log.warning("%s: xattr %s not set (%s); further ones are not logged", entry.shown_name(), shown, error)
                self._xattr_warned = True
            return
        raise ArchiveError(
            f"{entry.shown_name()}: cannot set the xattr {shown}: {error.strerror}; "
            "use a file system that has it, or allow best-effort xattrs"
        ) from error


def _times(entry: TarEntry) -> tuple[int, int]:
    """(atime, mtime) in nanoseconds; what no file system holds becomes 1970."""
    mtime = entry.mtime_ns if 0 <= entry.mtime_ns <= _MAX_TIME_NS else 0
    atime = max(entry.atime_ns or 0, mtime)
    return (atime if atime <= _MAX_TIME_NS else 0), mtime


def _differs(entry: TarEntry, source: Parent, name: bytes) -> bool:
    """Whether the entry, a hard link, would change anything of the file that it names."""
    info = os.lstat(name, dir_fd=source.fd)
    if (info.st_uid, info.st_gid, info.st_mtime_ns) != (entry.uid, entry.gid, _times(entry)[1]):
        return True
    if not stat.S_ISLNK(info.st_mode) and stat.S_IMODE(info.st_mode) != entry.mode:
        return True
    path = entry_path(source.fd, name)
    return any(get_xattr(path, xattr) != value for xattr, value in entry.xattrs.items())


def _write(fd: int, entry: TarEntry, contents: Iterator[bytes]) -> None:
    """Write what is stored at the places that it is from; pages of zeros become holes, as they mostly were."""
    pieces = iter(entry.sparse if entry.sparse is not None else [(0, entry.stored_size)])
    offset = left = written = 0
    for piece in contents:
        at = 0
        while at < len(piece):
            while not left:
                offset, left = next(pieces)
            size = min(left, len(piece) - at)
            for start, end in _data_in(piece, at, at + size, offset):
                written = _write_at(fd, memoryview(piece)[start:end], offset + start - at)
            at += size
            offset += size
            left -= size
    if written < entry.size:
        os.ftruncate(fd, entry.size)


def _data_in(piece: bytes, start: int, end: int, offset: int) -> Iterator[tuple[int, int]]:
    """The ranges of ``piece`` without its pages of zeros; ``start`` is at ``offset`` in the file."""
    first = at = start
    page_end = start + _PAGE_BYTES - offset % _PAGE_BYTES
    while at < end:
        page_end = min(page_end, end)
        # Looking at two bytes spares the comparison for nearly all pages with something in them.
        if not (piece[at] or piece[page_end - 1]) and piece[at:page_end] == _ZERO_PAGE[: page_end - at]:
            if first < at:
                yield first, at
            first = page_end
        at = page_end
        page_end += _PAGE_BYTES
    if first < end:
        yield first, end


def _write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of ``data`` at ``offset``; where that ends."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written
    return offset
