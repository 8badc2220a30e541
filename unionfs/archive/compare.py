"""Whether two entries are the same as far as a change list is concerned."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from unionfs.archive.overlay_view import ALL_SPACES, Node, Place
from unionfs.overlay.format import FUSE_OVERLAYFS_PREFIX
from unionfs.overlay.rules import Spaces, entry_path

CAPABILITY_XATTR = "security.capability"

Same = Callable[[Node, Node], bool]
"""Compares two nodes of the same name that are not the same object; children of directories do not count."""

_NS_PER_S = 1_000_000_000
_COMPARE_BYTES = 1 << 20
_NO_XATTR = frozenset({errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOTDIR})
_COMPARED_NAMESPACES = ("user.", "trusted.", "system.posix_acl_")


def naive_same(all_xattrs: bool) -> Same:
    """The comparison for two complete trees (moby's ``ChangesDirs``).

    Two mtimes count as equal when they are, or when they are in the same second and one of them has no
    fraction: an archive carries whole seconds. Differs from moby in one point: symlinks that agree in
    everything else are compared by target too (moby#31805).

    Args:
        all_xattrs: compare user, trusted and ACL xattrs too, instead of ``security.capability`` only.
    """

    everything = ALL_SPACES if all_xattrs else None

    def same(new: Node, old: Node) -> bool:
        a, b = new.stat, old.stat
        if not _same_metadata(a, b):
            return False
        if not stat.S_ISDIR(a.st_mode) and (a.st_size != b.st_size or not _same_mtime(a.st_mtime_ns, b.st_mtime_ns)):
            return False
        if stat.S_ISLNK(a.st_mode) and _target(new) != _target(old):
            return False
        return _xattrs(new, everything) == _xattrs(old, everything)

    return same


def exact_same(spaces: Spaces) -> Same:
    """The comparison for an entry of an upper directory with what it covers.

    Nanosecond mtimes, all xattrs that belong to the entry, symlink targets, and at last the contents, so that an
    edit that keeps size and mtime is seen, and a file that was copied up but never changed is not listed.

    Args:
        spaces: the name spaces of xattrs that are the overlay's own.
    """

    def same(new: Node, old: Node) -> bool:
        a, b = new.stat, old.stat
        if not _same_metadata(a, b):
            return False
        if not stat.S_ISDIR(a.st_mode) and (a.st_size != b.st_size or a.st_mtime_ns != b.st_mtime_ns):
            return False
        if _xattrs(new, spaces) != _xattrs(old, spaces):
            return False
        if stat.S_ISLNK(a.st_mode):
            return _target(new) == _target(old)
        if stat.S_ISREG(a.st_mode):
            return _same_contents(new, old)
        return True

    return same


def _same_metadata(a: os.stat_result, b: os.stat_result) -> bool:
    if (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid):
        return False
    # Only of a device is st_rdev defined.
    return not (stat.S_ISCHR(a.st_mode) or stat.S_ISBLK(a.st_mode)) or a.st_rdev == b.st_rdev


def _same_mtime(a_ns: int, b_ns: int) -> bool:
    if a_ns == b_ns:
        return True
    return a_ns // _NS_PER_S == b_ns // _NS_PER_S and (a_ns % _NS_PER_S == 0 or b_ns % _NS_PER_S == 0)


def _parent_fd(place: Place) -> tuple[int, bytes]:
    parent, _, name = place.rel.rpartition(b"/")
    return place.layer.open(parent, os.O_PATH | os.O_DIRECTORY), name or b"."


def _target(node: Node) -> bytes:
    fd, name = _parent_fd(node.place)
    try:
        return os.readlink(name, dir_fd=fd)
    finally:
        os.close(fd)


def _xattrs(node: Node, spaces: Spaces | None) -> dict[str, bytes]:
    """All xattrs but those of an overlay with these name spaces; None: the capability only."""
    fd, name = _parent_fd(node.place)
    try:
        path = entry_path(fd, name)
        if spaces is not None:
            return comparable_xattrs(path, spaces)
        value = get_xattr(path, CAPABILITY_XATTR)
        return {} if value is None else {CAPABILITY_XATTR: value}
    finally:
        os.close(fd)


def comparable_xattrs(path: bytes | int, spaces: Spaces = ALL_SPACES) -> dict[str, bytes]:
    """The xattrs that belong to an entry itself: overlay's own left out, those of a nested overlay unescaped.

    ``security.*`` other than the capability is the host's policy (SELinux labels, IMA), not the entry's.
    """
    found: dict[str, bytes] = {}
    for name in list_xattrs(path):
        shown = _shown_name(name, spaces)
        if shown is None:
            continue
        value = get_xattr(path, name)
        if value is not None:
            found[shown] = value
    return found


def _shown_name(name: str, spaces: Spaces) -> str | None:
    if name == CAPABILITY_XATTR:
        return name
    stored = os.fsencode(name)
    if not name.startswith(_COMPARED_NAMESPACES) or stored.startswith(FUSE_OVERLAYFS_PREFIX):
        return None
    for space in spaces:
        if space.is_private(stored):
            return None
        stored = space.to_shown(stored)
    return os.fsdecode(stored)


def list_xattrs(path: bytes | int) -> list[str]:
    """Names of the xattrs of ``path``, not followed, sorted; none where the file system has no xattrs."""
    try:
        return sorted(os.listxattr(path, follow_symlinks=isinstance(path, int)))
    except OSError as error:
        if error.errno in _NO_XATTR:
            return []
        raise


def get_xattr(path: bytes | int, name: str) -> bytes | None:
    """The value of one xattr of ``path``, not followed; None when it is not there."""
    try:
        return os.getxattr(path, name, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise


def _same_contents(new: Node, old: Node) -> bool:
    if new.data is None or old.data is None:
        return False
    if new.data == old.data:
        return True
    try:
        a = new.data.layer.open_file(new.data.rel)
    except OSError as error:
        # It vanished while the tree is in use; whatever is there next was not what we compared.
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ELOOP):
            return False
        raise
    try:
        b = old.data.layer.open_file(old.data.rel)
        try:
            return _same_bytes(a, b)
        finally:
            os.close(b)
    finally:
        os.close(a)


def _same_bytes(a: int, b: int) -> bool:
    """Whether two files of the same length have the same contents; what is a hole in both is not read."""
    offset, size = 0, os.fstat(a).st_size
    while True:
        if offset < size:
            offset = min(next_data(a, offset, size), next_data(b, offset, size))
        left = os.pread(a, _COMPARE_BYTES, offset)
        right = os.pread(b, len(left) or 1, offset)
        if left != right:
            return False
        if not left:
            return True
        offset += len(left)


def next_data(fd: int, offset: int, size: int) -> int:
    """Where data begins at or after ``offset`` in a file of ``size`` bytes; ``size`` if there is a hole up to there."""
    try:
        return min(size, os.lseek(fd, offset, os.SEEK_DATA))
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return size if os.fstat(fd).st_size >= size else offset
        if error.errno == errno.EINVAL:  # a file system that cannot tell
            return offset
        raise
