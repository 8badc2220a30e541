"""What a union mount is told: :class:`MountOptions`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from unionfs.overlay.idmap import IdMap


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


SPEEDUPS = frozenset({"inline", "late-sync", "pages", "placement", "polling", "readahead"})
"""What may be left out without another answer (docs/design/speedups.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """One union mount, completely described.

    ``lowerdirs`` and ``datadirs`` are ordered top first. Without ``upperdir`` the mount is read-only.
    """

    lowerdirs: tuple[str, ...]
    datadirs: tuple[str, ...] = ()
    upperdir: str | None = None
    workdir: str | None = None
    quota_bytes: int = 0
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
    passthrough: bool = True
    transport: str = "auto"
    speedups: frozenset[str] = SPEEDUPS
    read_only: bool = False
    debug: bool = False
    exclusive: bool = False
    """Whether the mount is refused when another one uses the upper or the work directory, in place of a warning."""
    source: str = "unionfs"
    context: str | None = None
    fuse_options: tuple[str, ...] = ()
    """Options handed to the FUSE mount as they are, such as ``nodev`` or ``allow_other``."""


def default_fuse_options(privileged: bool | None = None) -> tuple[str, ...]:
    """What a mount is given unless its options say otherwise.

    An unprivileged user may neither mount with ``suid`` nor, unless /etc/fuse.conf allows it, with
    ``allow_other``.
    """
    if privileged is None:
        privileged = os.geteuid() == 0
    if privileged:
        return ("default_permissions", "allow_other", "suid", "noatime")
    return ("default_permissions", "noatime")
