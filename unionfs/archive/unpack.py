"""Applying a layer's tar stream to a directory, whatever the stream tries.

Nothing outside of the target is ever created, changed or read: the parent of every entry is opened with openat2(2)
and ``RESOLVE_IN_ROOT``, so that symlinks met on the way (which the archive itself may have made, or another
process may swap in) lead to places in the target only, as they would in a container; the entry itself is made
by a call on that descriptor which never follows a link. What is in an entry's way is removed, never written into.

The rules for whiteouts, duplicates, owners and times are Docker's.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unionfs.archive.idmapping import MapOwner
from unionfs.archive.overlay_view import (
    ALL_PREFIXES,
    OPAQUE_MARKER,
    TRUSTED_PREFIX,
    USER_PREFIX,
    WHITEOUT_META_PREFIX,
    WHITEOUT_PREFIX,
    entry_path,
)
from unionfs.archive.rooted import RootedDir
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
from unionfs.archive.target import Parent, Target
from unionfs.errors import ArchiveError, BreakoutError

_log = logging.getLogger(__name__)

_MAX_TIME_NS = (1 << 63) - 1
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1  # the kernel's dev_t
_HARD_LINK_DIR = b".wh..wh.plnk"

# Eight times PATH_MAX: deeper than any tree in use, and still no means to fill a disk with directories.
_MAX_NAME_BYTES = 1 << 15
# They would stand for nothing, for the directory itself and for the one above it.
_INVALID_WHITEOUTS = (WHITEOUT_PREFIX, WHITEOUT_PREFIX + b".", WHITEOUT_PREFIX + b"..")

# What a file system for containers has; the others are those of other systems (com.apple., system.nfs4_acl).
_LINUX_XATTRS = ("user.", "trusted.", "security.", "system.posix_acl_")
_PAGE_BYTES = 4096
_ZERO_PAGE = bytes(_PAGE_BYTES)
_NO_SUPPORT = frozenset({errno.ENOTSUP, errno.ENOSYS})
_FOREIGN = _NO_SUPPORT | {errno.EINVAL, errno.ERANGE}


class WhiteoutMode(enum.Enum):
    """What a ``.wh.`` entry does."""

    DELETE = "delete"
    """It removes what it names: for a complete tree (NaiveDiff, vfs)."""
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
        user_xattrs: mark opaque directories with ``user.overlay.`` instead of ``trusted.overlay.``; None: in a user
            namespace.
        include_root: apply an entry for the root itself (``./``) to the target directory; Docker leaves it out.
    """

    whiteouts: WhiteoutMode = WhiteoutMode.DELETE
    to_host: MapOwner | None = None
    owner: tuple[int, int] | None = None
    parents_owner: tuple[int, int] | None = None
    devices: DevicePolicy = DevicePolicy.AUTO
    best_effort_xattrs: bool = False
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
    try:
        top = RootedDir(root)
    except OSError as error:
        raise ArchiveError(
            f"cannot unpack into {os.fsdecode(root)}: {error.strerror}; give the path of an existing directory"
        ) from error
    with top:
        return _Unpacker(TarReader(stream), top, options).run()


def in_user_namespace() -> bool:
    """Whether this process lives in a user namespace other than the host's first."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return file.read().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


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
    def __init__(self, reader: TarReader, root: RootedDir, options: UnpackOptions) -> None:
        self._reader = reader
        self._options = options
        self._result = UnpackResult()
        in_userns = in_user_namespace()
        self._in_userns = in_userns
        use_user = in_userns if options.user_xattrs is None else options.user_xattrs
        self._opaque_xattr = (USER_PREFIX if use_user else TRUSTED_PREFIX) + "opaque"
        self._target = Target(
            root,
            self._parents_owner(),
            remember=options.whiteouts is WhiteoutMode.DELETE,
            opaque_xattr=self._opaque_xattr if options.whiteouts is WhiteoutMode.OVERLAY else None,
        )
        self._stash = Stash(root.fd)
        self._dir_times: list[tuple[bytes, tuple[int, int], int, int]] = []
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
            self._set_dir_times()
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
                self._finish_dir(entry, os.dup(self._target.root.fd), b"")
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
        if base.startswith(WHITEOUT_META_PREFIX) and base != OPAQUE_MARKER:
            return True
        for part in parts[:-1]:
            if part.startswith(WHITEOUT_META_PREFIX):
                return True
            if part.startswith(WHITEOUT_PREFIX):
                raise ArchiveError(f"{entry.shown_name()}: invalid whiteout entry: it is used as a directory")
        if not base.startswith(WHITEOUT_PREFIX):
            return False
        hidden = base[len(WHITEOUT_PREFIX) :]
        parent = self._target.parent(parts[:-1])
        if base == OPAQUE_MARKER:
            self._opaque(entry, parent)
        elif self._options.whiteouts is WhiteoutMode.DELETE:
            self._target.remove(parent, hidden)
        else:
            self._overlay_whiteout(entry, parent, hidden)
        return True

    def _opaque(self, entry: TarEntry, parent: Parent) -> None:
        if self._options.whiteouts is WhiteoutMode.DELETE:
            self._target.remove_older(parent)
            return
        try:
            os.setxattr(parent.fd, self._opaque_xattr, b"y")
        except OSError as error:
            # Unlike other xattrs this one decides what the layer shows, so it is never best effort.
            raise ArchiveError(
                f"{entry.shown_name()}: cannot mark the directory opaque ({self._opaque_xattr}): {error.strerror}; "
                "use a file system with xattrs"
            ) from error

    def _overlay_whiteout(self, entry: TarEntry, parent: Parent, name: bytes) -> None:
        self._map_owner(entry)
        try:
            self._make(parent, name, lambda: os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent.fd))
        except PermissionError as error:
            raise ArchiveError(
                f"{entry.shown_name()}: this user may not make a whiteout (a 0:0 device); "
                "keep the .wh. form instead (WhiteoutMode.KEEP)"
            ) from error
        os.chown(name, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)

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
            self._finish_dir(entry, self._target.make_dir(parent, name), b"/".join(parts))
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

    def _finish_dir(self, entry: TarEntry, fd: int, path: bytes) -> None:
        """Owner, xattrs and mode now, the times at the very end: what is made inside changes them."""
        try:
            os.fchown(fd, entry.uid, entry.gid)
            self._set_xattrs(entry, fd)
            os.fchmod(fd, entry.mode)
            info = os.fstat(fd)
            self._dir_times.append((path, (info.st_dev, info.st_ino), *_times(entry)))
        finally:
            os.close(fd)

    def _set_dir_times(self) -> None:
        for path, identity, atime_ns, mtime_ns in self._dir_times:
            try:
                fd = self._target.open_existing_dir(path)
            except OSError:
                continue  # a later entry removed it
            try:
                info = os.fstat(fd)
                if (info.st_dev, info.st_ino) == identity:
                    os.utime(fd, ns=(atime_ns, mtime_ns))
            finally:
                os.close(fd)

    def _regular(self, entry: TarEntry, parent: Parent, name: bytes, contents: Iterator[bytes]) -> None:
        fd = -1

        def create() -> None:
            nonlocal fd
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=parent.fd)

        self._make(parent, name, create)
        try:
            _write(fd, entry, contents)
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
        parent = self._target.parent(parts[:-1])
        if target and target[0] == _HARD_LINK_DIR and self._options.whiteouts is not WhiteoutMode.KEEP:
            found = self._stash.get(target[-1]) if len(target) == 2 else None
            if found is None:
                raise ArchiveError(
                    f"{entry.shown_name()}: invalid aufs hardlink to {show(entry.linkname)}; make the archive again"
                )
            stashed, contents = found
            entry.kind, entry.size, entry.sparse = REGULAR, stashed.size, stashed.sparse
            entry.stored_size = stashed.stored_size
            self._regular(entry, parent, name, contents)
            return
        if not target:
            raise ArchiveError(f"{entry.shown_name()}: the hard link has no target; make the archive again")
        with self._target.existing_parent(target[:-1]) as source:
            info = os.lstat(target[-1], dir_fd=source.fd)
            if stat.S_ISDIR(info.st_mode):
                raise ArchiveError(
                    f"{entry.shown_name()}: is a hard link to the directory {show(entry.linkname)}, "
                    "which cannot be; make the archive again"
                )
            if (source.inode, target[-1]) != (parent.inode, name):

                def create() -> None:
                    os.link(target[-1], name, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)

                self._make(parent, name, create)
        self._finish_by_name(entry, parent, name)

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
            if name.startswith(ALL_PREFIXES) or "\0" in name:
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
