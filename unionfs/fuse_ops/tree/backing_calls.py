"""System calls on the layers' files that only the direct transport has requests for."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys
from typing import Final

from unionfs.fuse_ops.tree.attributes import Attributes
from unionfs.host import syscalls
from unionfs.host.syscalls import AT_FDCWD, AT_SYMLINK_NOFOLLOW

_STATX_BASIC_AND_BTIME: Final = 0xFFF

# linux/fs.h. The kernel translates these on its side of FUSE to its own file attributes.
_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_GETVERSION: Final = 0x80087601
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_KNOWN: Final = frozenset({_GETFLAGS, _SETFLAGS, _GETVERSION, _FSGETXATTR, _FSSETXATTR})
_PROTECTED: Final = 0x30
_PROJECT_INHERIT: Final = 0x20000000
_XFLAG_PROJECT_INHERIT: Final = 0x200

# struct statx of statx(2), which is also struct fuse_statx.
_STATX: Final = struct.Struct("=IIQIIIHHQQQQ" + "qIi" * 4 + "IIII14Q")


def has_writers(path: bytes, *, follow: bool) -> bool:
    """Whether somebody has the file ``path`` open for writing, or mapped so; True where that cannot be found out.

    A lease for reading is granted only where nobody does (fcntl(2), F_SETLEASE). It ends when the descriptor is
    closed. Who wants to write meanwhile waits for that, and we would be told by a signal that could end us.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError:
        return True
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def statx(path: bytes, *, follow: bool) -> bytes:
    """The struct statx of ``path``, with the time of birth where the file system has it."""
    return syscalls.statx(AT_FDCWD, path, 0 if follow else AT_SYMLINK_NOFOLLOW, _STATX_BASIC_AND_BTIME)


def statx_with(stx: bytes, a: Attributes) -> bytes:
    """A struct statx with everything that the mount shows differently put in its place."""
    fields = list(_STATX.unpack(stx))
    fields[3], fields[4], fields[5], fields[6] = a.nlink, a.uid, a.gid, a.mode
    fields[8], fields[9], fields[10] = a.ino, a.size, a.blocks
    fields[18], fields[19] = divmod(a.ctime_ns, 1_000_000_000)
    fields[24], fields[25] = os.major(a.rdev), os.minor(a.rdev)
    return _STATX.pack(*fields)


def knows_ioctl(command: int) -> bool:
    """Whether :func:`inode_ioctl` does it."""
    return command in _KNOWN


def changes_inode(command: int) -> bool:
    """Whether an ioctl that :func:`inode_ioctl` knows changes the file."""
    return command in (_SETFLAGS, _FSSETXATTR)


def inode_ioctl(path: bytes, command: int, data: bytes, out_size: int, protection: int) -> tuple[bytes, int]:
    """The ioctls behind lsattr(1) and chattr(1); ENOTTY for others.

    The flags "immutable" and "append-only" are not on disk (:mod:`unionfs.fuse_ops.tree.protection`): ``protection``
    says which there are, the result which there are to be, beside the output. Raises EPERM for another project: the
    quota that it stands for is the host's.
    """
    if command not in _KNOWN:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    shift = 0 if command in (_GETFLAGS, _SETFLAGS) else 1  # how the flags of struct fsxattr are shifted
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not changes_inode(command):
            buffer = bytearray(max(len(data), out_size))
            buffer[: len(data)] = data
            fcntl.ioctl(fd, command, buffer)
            if command != _GETVERSION:
                buffer[0] |= protection >> shift
            return bytes(buffer[:out_size]), protection
        wanted = bytearray(data)
        mask = _PROTECTED >> shift
        protection = (wanted[0] & mask) << shift
        wanted[0] &= ~mask & 0xFF
        now = bytearray(len(data))
        fcntl.ioctl(fd, _FSGETXATTR if shift else _GETFLAGS, now)
        inherits = int.from_bytes(wanted[:4], sys.byteorder) ^ int.from_bytes(now[:4], sys.byteorder)
        # struct fsxattr: flags, extent size, extents, project.
        if inherits & (_XFLAG_PROJECT_INHERIT if shift else _PROJECT_INHERIT) or wanted[12:16] != now[12:16]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if wanted != now:
            fcntl.ioctl(fd, command, wanted)
        return b"", protection
    finally:
        os.close(fd)
