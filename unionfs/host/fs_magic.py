"""File system types as statfs(2) tells them.

The numbers are the kernel's (linux/magic.h); the names are what Docker shows as "Backing Filesystem".
"""

from __future__ import annotations

import enum
import os

from unionfs.host.syscalls import fs_type


class FsMagic(enum.IntEnum):
    """``f_type`` of statfs(2)."""

    UNSUPPORTED = 0
    AUFS = 0x61756673
    BTRFS = 0x9123683E
    CRAMFS = 0x28CD3D45
    ECRYPTFS = 0xF15F
    EXTFS = 0xEF53
    F2FS = 0xF2F52010
    FUSE = 0x65735546
    GPFS = 0x47504653
    JFFS2 = 0x72B6
    JFS = 0x3153464A
    NFS = 0x6969
    OVERLAYFS = 0x794C7630
    RAMFS = 0x858458F6
    REISERFS = 0x52654973
    SMB = 0x517B
    SQUASHFS = 0x73717368
    TMPFS = 0x01021994
    VXFS = 0xA501FCF5
    XFS = 0x58465342
    ZFS = 0x2FC12FC1


def fs_name(magic: int) -> str:
    """The name of a file system type, ``<unknown>`` for one that is not in the table."""
    if magic == FsMagic.UNSUPPORTED:
        return "unsupported"
    return FsMagic(magic).name.lower() if magic in FsMagic.__members__.values() else "<unknown>"


def fs_magic(path: str) -> int:
    """The type of the file system that holds ``path``, or that its nearest existing parent lies on.

    Raises:
        OSError: the path cannot be asked about.
    """
    while True:
        try:
            return fs_type(path)
        except FileNotFoundError:
            parent = os.path.dirname(path.rstrip("/")) or "/"
            if parent == path:
                raise
            path = parent
