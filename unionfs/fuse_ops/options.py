"""The mount options of a union: what they are, and how the text after ``-o`` becomes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

from unionfs.fuse_ops.idmap import IdMap


class RedirectMode(Enum):
    """What a rename does to a directory that a lower layer has too (kernel: ``redirect_dir``)."""

    ON = "on"  # rename them, and follow redirects found in layers
    FOLLOW = "follow"  # EXDEV for renames, redirects found in layers are followed
    NOFOLLOW = "nofollow"  # EXDEV for renames, redirects found in layers are not followed
    OFF = "off"  # the kernel's default: as FOLLOW, because redirect_always_follow is set


class XattrPermissions(IntEnum):
    """Where owner and mode are kept when the layers' file system cannot hold them."""

    OFF = 0  # in the inode
    PRIVILEGED = 1  # security.fuseoverlayfs.override_stat
    CONTAINERS = 2  # user.containers.override_stat


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """One union mount, completely described.

    ``lowerdirs`` and ``datadirs`` are ordered top first. Without ``upperdir`` the mount is read-only.
    """

    lowerdirs: tuple[str, ...]
    datadirs: tuple[str, ...] = ()
    upperdir: str | None = None
    workdir: str | None = None
    uid_map: IdMap = field(default_factory=IdMap)
    gid_map: IdMap = field(default_factory=IdMap)
    squash_uid: int | None = None
    squash_gid: int | None = None
    static_nlink: bool = False
    acl: bool = True
    xattrs: bool = True
    xattr_permissions: XattrPermissions = XattrPermissions.OFF
    volatile: bool = False
    fsync: bool = True
    timeout_s: float = 1e9
    redirect_dir: RedirectMode = RedirectMode.ON
    metacopy: bool = False
    xino: str = "auto"
    userxattr: bool = False
    writeback: bool = True
    read_only: bool = False
    debug: bool = False
    source: str = "unionfs"
    context: str | None = None
    fuse_words: tuple[str, ...] = ()
    """Words handed to the FUSE mount as they are, such as ``nodev`` or ``allow_other``."""
