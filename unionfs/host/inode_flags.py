"""The flags and the project of a file or directory: ioctl_iflags(2), ioctl_xfs_fsgetxattr(2), linux/fs.h.

Every function takes an open descriptor, and raises OSError: ENOTTY or EOPNOTSUPP where the file system has no such
thing, EPERM for what may not be changed.
"""

from __future__ import annotations

import fcntl
import struct
from typing import Final, NamedTuple

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_FLAGS: Final = struct.Struct("=I")
_FSXATTR: Final = struct.Struct("=5I8x")

# Letters of chattr(1), of which what is made in a directory gets a copy: s u c S d A X j t D C x P F.
INHERITED: Final = (
    0x1 | 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x400 | 0x4000 | 0x8000 | 0x10000 | 0x80_0000 | 0x200_0000
    | 0x2000_0000 | 0x4000_0000
)  # fmt: skip
_PROJECT_INHERIT: Final = 0x200


class Extended(NamedTuple):
    """struct fsxattr."""

    flags: int
    extent_size: int
    extents: int
    project: int
    cow_extent_size: int


def get_flags(fd: int) -> int:
    """What lsattr(1) shows."""
    value = bytearray(_FLAGS.size)
    fcntl.ioctl(fd, _GETFLAGS, value)
    return int(_FLAGS.unpack(value)[0])


def set_flags(fd: int, flags: int) -> None:
    """Change all of them."""
    fcntl.ioctl(fd, _SETFLAGS, _FLAGS.pack(flags))


def get_extended(fd: int) -> Extended:
    """The other flags, and the project."""
    return Extended(*_FSXATTR.unpack(fcntl.ioctl(fd, _FSGETXATTR, bytes(_FSXATTR.size))))


def set_project(fd: int, project: int, *, inherit: bool) -> None:
    """Put the object into a project, as what is made in it if it is to ``inherit`` that."""
    now = get_extended(fd)
    flags = now.flags | _PROJECT_INHERIT if inherit else now.flags & ~_PROJECT_INHERIT
    fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(*now._replace(flags=flags, project=project)))


def inherit_alike(fd: int, other_fd: int) -> None:
    """Have what is made in the directory ``fd`` inherit what is made in ``other_fd`` inherits."""
    now, wanted = get_flags(fd), get_flags(other_fd)
    changed = (now ^ wanted) & INHERITED
    if changed:
        set_flags(fd, now ^ changed)
    present, other = get_extended(fd), get_extended(other_fd)
    if present.project != other.project:
        set_project(fd, other.project, inherit=bool(other.flags & _PROJECT_INHERIT))
