"""What the mount shows of a file's attributes, given those on disk: mapped owners, squashing, overrides."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Final, NamedTuple

from unionfs.fuse_ops.options import MountOptions, XattrPermissions
from unionfs.overlay import rules
from unionfs.overlay.idmap import IdMap

DEFAULT_ACL: Final = b"system.posix_acl_default"
ACL_NAMES: Final = (b"system.posix_acl_access", DEFAULT_ACL)
CAPABILITY: Final = b"security.capability"

_OVERRIDE_NAMES: Final = {
    XattrPermissions.PRIVILEGED: (b"security.fuseoverlayfs.override_stat",),
    XattrPermissions.CONTAINERS: (b"user.containers.override_stat", b"user.fuseoverlayfs.override_stat"),
}

_TYPE_NAMES: Final = {
    stat.S_IFREG: b"file",
    stat.S_IFDIR: b"dir",
    stat.S_IFLNK: b"symlink",
    stat.S_IFIFO: b"pipe",
    stat.S_IFSOCK: b"socket",
}
_TYPES: Final = {name: kind for kind, name in _TYPE_NAMES.items()}

# linux/posix_acl_xattr.h: a version word, then entries of tag, permissions and id.
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER: Final = 0x02
_ACL_GROUP: Final = 0x08


class Attributes(NamedTuple):
    """Attributes of an object of the merged tree, as stat(2) will show them; times in nanoseconds."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Override(NamedTuple):
    """Owner, mode and type kept in an attribute, where the file system below cannot keep them."""

    uid: int
    gid: int
    mode: int  # with the type bits, if the attribute tells the type
    rdev: int = 0


def parse_override(value: bytes) -> Override | None:
    """An override from ``uid:gid:mode[:type]`` (mode in octal; type as containers/storage writes it)."""
    fields = value.rstrip(b"\0").split(b":", 3)
    try:
        uid, gid, mode = int(fields[0]), int(fields[1]), stat.S_IMODE(int(fields[2], 8))
        if len(fields) == 3:
            return Override(uid, gid, mode)
        kind = fields[3]
        if kind in _TYPES:
            return Override(uid, gid, mode | _TYPES[kind])
        device, major, minor = kind.split(b"-")
        file_type = {b"block": stat.S_IFBLK, b"char": stat.S_IFCHR}[device]
        return Override(uid, gid, mode | file_type, os.makedev(int(major), int(minor)))
    except (IndexError, KeyError, ValueError):
        return None


def format_override(override: Override) -> bytes:
    """The inverse of :func:`parse_override`."""
    text = b"%d:%d:%04o" % (override.uid, override.gid, stat.S_IMODE(override.mode))
    kind = stat.S_IFMT(override.mode)
    if kind in (stat.S_IFBLK, stat.S_IFCHR):
        name = b"block" if kind == stat.S_IFBLK else b"char"
        return b"%s:%s-%d-%d" % (text, name, os.major(override.rdev), os.minor(override.rdev))
    return text + b":" + _TYPE_NAMES[kind] if kind in _TYPE_NAMES else text


class Ownership:
    """The mount's view of owners: which ids it shows for those on disk, and stores for those of its callers."""

    def __init__(self, options: MountOptions) -> None:
        self.uid_map: IdMap = options.uid_map
        self.gid_map: IdMap = options.gid_map
        self.squash_uid = options.squash_uid
        self.squash_gid = options.squash_gid
        self.squashed = options.squash_uid is not None or options.squash_gid is not None
        self._override_names = _OVERRIDE_NAMES.get(options.xattr_permissions, ())
        self.overrides = bool(self._override_names)
        """Whether owner and mode are kept in an attribute."""
        self._plain = not (self.uid_map or self.gid_map or self.squashed)
        self.plain = self._plain and not self.overrides
        """Whether owners and modes are shown as they are."""

    def to_mount_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Owner and group to show for those on disk."""
        if self._plain:
            return uid, gid
        uid = self.uid_map.to_mount_id(uid) if self.squash_uid is None else self.squash_uid
        gid = self.gid_map.to_mount_id(gid) if self.squash_gid is None else self.squash_gid
        return uid, gid

    def to_layer_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Owner and group to store for those that a caller has or names; -1 stays -1."""
        if self._plain:
            return uid, gid
        return (
            uid if uid == -1 else self.uid_map.to_layer_id(uid),
            gid if gid == -1 else self.gid_map.to_layer_id(gid),
        )

    def read_override(self, path: bytes, kind: int) -> Override | None:
        """The override of the regular file or directory at ``path``, whose last component is not followed."""
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            return None
        for name in self._override_names:
            value = rules.read_xattr(path, name)
            if value is not None:
                return parse_override(value)
        return None

    def write_override(self, path: bytes, override: Override) -> None:
        """Store an override on the regular file or directory at ``path``."""
        os.setxattr(path, self._override_names[0], format_override(override), follow_symlinks=False)

    def map_acl(self, value: bytes, *, to_disk: bool) -> bytes:
        """An ACL attribute with the ids in it mapped between what is stored and what is shown."""
        if not (self.uid_map or self.gid_map):
            return value
        if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size:
            raise OSError(errno.EINVAL, "malformed ACL attribute")
        mapped = bytearray(value)
        for offset in range(4, len(value), _ACL_ENTRY.size):
            tag, permissions, owner = _ACL_ENTRY.unpack_from(value, offset)
            id_map = {_ACL_USER: self.uid_map, _ACL_GROUP: self.gid_map}.get(tag)
            if id_map is not None:
                owner = id_map.to_layer_id(owner) if to_disk else id_map.to_mount_id(owner)
                _ACL_ENTRY.pack_into(mapped, offset, tag, permissions, owner)
        return bytes(mapped)
