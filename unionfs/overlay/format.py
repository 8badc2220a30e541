"""The on-disk vocabulary of overlayfs: names of its attributes, origin handles, whiteout marks.

Source: Documentation/filesystems/overlayfs.rst and the values the kernel's overlayfs writes; the ``.wh.`` marks
are those of aufs, which OCI layers and fuse-overlayfs use.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import Final

from unionfs.host.processes import CAP_SYS_ADMIN, has_capability
from unionfs.host.syscalls import FileHandle

WHITEOUT_DEVICE: Final = os.makedev(0, 0)
MARK: Final = b".wh."
META_MARK: Final = b".wh..wh."  # what aufs keeps for itself: no names are hidden by it
OPAQUE_MARK: Final = b".wh..wh..opq"
FUSE_OVERLAYFS_PREFIX: Final = b"user.fuseoverlayfs."
FUSE_OVERLAYFS_OPAQUE: Final = b"user.fuseoverlayfs.opaque"
NAME_MAX: Final = 255
UNSYNCED: Final = b"\0\4\0\0"
"""The value of ``overlay.metacopy`` on a copy that has its data, which may not be on the disk yet.

A header without a digest (struct ovl_metacopy: version, length, flags, digest algorithm). The kernel takes it for what
an empty value says, and writes only that, so it tells which attributes are ours.
"""

_FH_MAGIC: Final = 0xFB
_FH_HEADER: Final = struct.Struct("BBBBB16s")  # version, magic, length, flags, handle type, file system uuid
_FH_BIG_ENDIAN: Final = 1
_FH_ANY_ENDIAN: Final = 2
_FH_UPPER: Final = 4


def is_whiteout(st: os.stat_result) -> bool:
    """Whether ``st`` is of a character device 0:0, the kernel's whiteout."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == WHITEOUT_DEVICE


class OverlayXattrs:
    """The names of overlayfs' extended attributes in one of its two name spaces.

    ``trusted.overlay.`` belongs to mounts by root, ``user.overlay.`` to those in a user namespace or with the
    option ``userxattr``.
    """

    __slots__ = (
        "escape",
        "impure",
        "metacopy",
        "nested_opaque",
        "nested_whiteout",
        "opaque",
        "origin",
        "prefix",
        "protattr",
        "redirect",
        "user",
        "whiteout",
    )

    def __init__(self, *, user: bool) -> None:
        self.user = user
        self.prefix = b"user.overlay." if user else b"trusted.overlay."
        self.escape = self.prefix + b"overlay."
        self.opaque = self.prefix + b"opaque"
        self.redirect = self.prefix + b"redirect"
        self.origin = self.prefix + b"origin"
        self.impure = self.prefix + b"impure"
        self.metacopy = self.prefix + b"metacopy"
        self.protattr = self.prefix + b"protattr"
        self.whiteout = self.prefix + b"whiteout"
        # A whiteout that belongs to an overlay whose upper directory is on ours: what that one would call
        # ``overlay.whiteout`` and ``overlay.opaque``, see to_stored().
        self.nested_whiteout = self.escape + b"whiteout"
        self.nested_opaque = self.escape + b"opaque"

    def is_private(self, stored: bytes) -> bool:
        """Whether the stored attribute is overlayfs' own, and so not part of the merged tree."""
        return stored.startswith(self.prefix) and not stored.startswith(self.escape)

    def to_stored(self, shown: bytes) -> bytes:
        """The name under which an attribute that a program sees as ``shown`` is kept (nested overlays)."""
        if shown.startswith(self.prefix):
            return self.escape + shown[len(self.prefix) :]
        return shown

    def to_shown(self, stored: bytes) -> bytes:
        """The inverse of :meth:`to_stored` for attributes that are not private."""
        if stored.startswith(self.escape):
            return self.prefix + stored[len(self.escape) :]
        return stored


TRUSTED: Final = OverlayXattrs(user=False)
USER: Final = OverlayXattrs(user=True)


def may_use_trusted() -> bool:
    """Whether this process may set and sees ``trusted.`` attributes; root in a container may not."""
    return has_capability(CAP_SYS_ADMIN)


def encode_origin(handle: FileHandle, filesystem_uuid: bytes) -> bytes:
    """The value of ``overlay.origin`` for a file copied up from the one behind ``handle``."""
    length = _FH_HEADER.size + len(handle.data)
    return _FH_HEADER.pack(0, _FH_MAGIC, length, 0, handle.type, filesystem_uuid) + handle.data


def decode_origin(value: bytes) -> tuple[FileHandle, bytes] | None:
    """Handle and file system uuid from a value of ``overlay.origin``; None if it holds none we can use."""
    if len(value) <= _FH_HEADER.size:
        return None  # the kernel writes an empty value where the lower file system has no handles
    version, magic, length, flags, kind, uuid = _FH_HEADER.unpack_from(value)
    if version != 0 or magic != _FH_MAGIC or length != len(value):
        return None
    if flags & _FH_UPPER or (flags & _FH_BIG_ENDIAN and not flags & _FH_ANY_ENDIAN):
        return None
    return FileHandle(kind, value[_FH_HEADER.size :]), uuid


def inode_in_handle(handle: FileHandle) -> int | None:
    """The inode number that a handle of a well-known type contains, for those who may not open handles.

    linux/exportfs.h: FILEID_INO32_GEN 1 (ext4, also tmpfs with three words), btrfs 0x4d, xfs 0x81.
    """
    data = handle.data
    if handle.type == 1 and len(data) == 8:
        return int(struct.unpack_from("I", data)[0])
    if handle.type == 1 and len(data) == 12:  # tmpfs: generation, then the inode number in two words
        low, high = struct.unpack_from("II", data, 4)
        return int(low | high << 32)
    if handle.type in (0x4D, 0x81) and len(data) >= 12:
        return int(struct.unpack_from("Q", data)[0])
    return None
