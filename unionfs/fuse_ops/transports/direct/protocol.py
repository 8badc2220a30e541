"""The FUSE kernel protocol, 7.45: operation codes, flags, the layout of messages, and a request as it is read.

Source: include/uapi/linux/fuse.h. All numbers are in the machine's byte order without padding.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum, IntFlag
from typing import Final

from unionfs.fuse_ops.requests.job import Waiter
from unionfs.fuse_ops.tree.attributes import Attributes

MAJOR: Final = 7
MINOR: Final = 45


class Opcode(IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51
    STATX = 52


class Init(IntFlag):
    """Capabilities that kernel and server agree on in INIT; from bit 32 on in the second word."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    IOCTL_DIR = 1 << 11
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41


class Open(IntFlag):
    """How the kernel is to treat an open file or directory."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class SetAttr(IntFlag):
    """Which fields of a SETATTR request count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


WRITE_KILL_SUIDGID: Final = 1 << 2
OPEN_KILL_SUIDGID: Final = 1 << 0
FSYNC_FDATASYNC: Final = 1 << 0

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # length, negative errno, unique

ATTR: Final = struct.Struct("=6Q10I")
ENTRY_REPLY: Final = struct.Struct("=IiQ QQQQII")  # followed by attributes, as the next ones are
ENTRY: Final = struct.Struct("=QQQQII")
ATTR_REPLY: Final = struct.Struct("=IiQ QII")
CREATE_REPLY: Final = struct.Struct("=IiQ QQQQII 6Q10I QIi")
OPEN_REPLY: Final = struct.Struct("=IiQ QIi")
WRITE_REPLY: Final = struct.Struct("=IiQ II")
XATTR_SIZE_REPLY: Final = struct.Struct("=IiQ II")
LSEEK_REPLY: Final = struct.Struct("=IiQ Q")
IOCTL_REPLY: Final = struct.Struct("=IiQ iIII")
STATFS_REPLY: Final = struct.Struct("=IiQ 5Q 4I 6I")
NOTIFY_STORE: Final = struct.Struct("=IiQ QQII")  # unasked for: into the page cache of an inode, then the data
NOTIFY_INVAL_INODE: Final = struct.Struct("=IiQ Qqq")  # unasked for: node, offset, length; see Connection.invalidate
STATX_REPLY: Final = struct.Struct("=IiQ QII2Q")  # followed by struct fuse_statx, the layout of statx(2)
INIT_REPLY: Final = struct.Struct("=IiQ IIII HHIIHHIIH11H")

INIT_IN: Final = struct.Struct("=IIIII")
SETATTR_IN: Final = struct.Struct("=IIQQQ3Q3I I I II I")
MKNOD_IN: Final = struct.Struct("=IIII")
MKDIR_IN: Final = struct.Struct("=II")
RENAME2_IN: Final = struct.Struct("=QII")
U64: Final = struct.Struct("=Q")
U32: Final = struct.Struct("=I")
OPEN_IN: Final = struct.Struct("=II")
CREATE_IN: Final = struct.Struct("=IIII")
READ_IN: Final = struct.Struct("=QQIIQII")
WRITE_IN: Final = READ_IN
FSYNC_IN: Final = struct.Struct("=QII")
SETXATTR_IN: Final = struct.Struct("=IIII")
GETXATTR_IN: Final = struct.Struct("=II")
BATCH_FORGET_IN: Final = struct.Struct("=II")
FORGET_ONE: Final = struct.Struct("=QQ")
FALLOCATE_IN: Final = struct.Struct("=QQQII")
LSEEK_IN: Final = struct.Struct("=QQII")
COPY_FILE_RANGE_IN: Final = struct.Struct("=QQQQQQQ")
IOCTL_IN: Final = struct.Struct("=QIIQII")
STATX_IN: Final = struct.Struct("=IIQII")
_STATX: Final = struct.Struct("=IIQIIIHHQQQQ" + "qIi" * 4 + "IIII14Q")  # struct fuse_statx, the layout of statx(2)
DIRENT: Final = struct.Struct("=QQII")

# In the place of an error number:
NOTIFY_INVAL_INODE_CODE: Final = 2
NOTIFY_STORE_CODE: Final = 4

BACKING_OPEN: Final = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
BACKING_CLOSE: Final = 0x4004E502  # _IOW(229, 2, uint32_t)
BACKING_MAP: Final = struct.Struct("=iIQ")


def attr_fields(a: Attributes) -> tuple[int, ...]:
    """The fields of struct fuse_attr (``ATTR``) for attributes."""
    atime, atime_ns = divmod(a.atime_ns, 1_000_000_000)
    mtime, mtime_ns = divmod(a.mtime_ns, 1_000_000_000)
    ctime, ctime_ns = divmod(a.ctime_ns, 1_000_000_000)
    wrap = 0xFFFF_FFFF_FFFF_FFFF  # times before 1970 are negative; the field is not, but the kernel reads it so
    return (
        a.ino,
        a.size,
        a.blocks,
        atime & wrap,
        mtime & wrap,
        ctime & wrap,
        atime_ns,
        mtime_ns,
        ctime_ns,
        a.mode,
        a.nlink,
        a.uid,
        a.gid,
        encode_device(a.rdev) if a.rdev else 0,
        a.blksize,
        0,
    )


def statx_with(stx: bytes, a: Attributes) -> bytes:
    """A struct statx with everything that the mount shows differently put in its place."""
    fields = list(_STATX.unpack(stx))
    fields[3], fields[4], fields[5], fields[6] = a.nlink, a.uid, a.gid, a.mode
    fields[8], fields[9], fields[10] = a.ino, a.size, a.blocks
    fields[18], fields[19] = divmod(a.ctime_ns, 1_000_000_000)
    fields[24], fields[25] = os.major(a.rdev), os.minor(a.rdev)
    return _STATX.pack(*fields)


def encode_device(device: int) -> int:
    """A device number in the kernel's 32 bit form (new_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def decode_device(device: int) -> int:
    """The device number behind the kernel's 32 bit form."""
    return os.makedev((device & 0xFFF00) >> 8, (device & 0xFF) | (device >> 12 & 0xFFF00))


UNKNOWN_ID: Final = 0xFFFF_FFFF
"""In the place of user and group, where the kernel leaves them out (linux/fuse.h: FUSE_INVALID_UIDGID)."""

_OVERFLOW_ID: Final = 65534


class Request(Waiter):
    """One request. ``body`` is what follows the header."""

    __slots__ = ("_gid", "_uid", "body", "node", "unique")

    def __init__(self, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes | memoryview) -> None:
        super().__init__(pid)
        self.unique = unique
        self.node = node
        self._uid = uid
        self._gid = gid
        self.body = body

    @property
    def uid(self) -> int:
        if self._uid == UNKNOWN_ID:
            self._find_caller()
        return self._uid

    @property
    def gid(self) -> int:
        if self._uid == UNKNOWN_ID:
            self._find_caller()
        return self._gid

    def name(self, offset: int = 0) -> bytes:
        """The zero-terminated name at ``offset`` of the arguments."""
        body = self.body
        return bytes(body[offset : bytes(body).index(b"\0", offset)])

    def _find_caller(self) -> None:
        """Set user and group to those of the sending process.

        Of a process that this one cannot see they are those that stand for unknown ones, without privilege.
        """
        self._uid = self._gid = _OVERFLOW_ID
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"Uid:"):
                        self._uid = int(line.split()[4])  # the fourth is that of file accesses
                    elif line.startswith(b"Gid:"):
                        self._gid = int(line.split()[4])
                        break
        except OSError:
            pass  # it has ended
