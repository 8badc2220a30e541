"""A directory held by descriptor, whose paths never lead outside of it.

Everything that reads or writes beneath a directory which someone else may fill (a layer, a container's upper
directory, the target of an unpack) goes through :class:`RootedDir`. The kernel checks each step of a path
while it walks it (openat2(2)), so an entry that is swapped for a symlink at the wrong moment is refused
instead of followed.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import OrderedDict
from types import TracebackType

_SYS_OPENAT2 = 437  # the same number on every architecture: it was added after the tables were unified

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# A path handed to the kernel at once must stay below PATH_MAX (4096); a tree can be deeper than that.
_CHUNK_BYTES = 3500

# So many components above a directory far down are kept open too, when some are.
_NEAR = 16

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open ``path`` relative to ``dir_fd`` under the rules of ``resolve`` (``RESOLVE_*``, openat2(2)).

    Raises :class:`OSError`: ELOOP for a refused symlink, EXDEV for a step out of ``dir_fd``, ENOSYS or EPERM
    where the system call is missing or filtered.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        # EAGAIN: a rename somewhere raced with a "..", the kernel asks to try again.
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), os.fsdecode(path))


def _openat2_works() -> bool:
    try:
        os.close(openat2(-100, b"/", os.O_PATH, 0))
    except OSError:
        return False
    return True


HAVE_OPENAT2 = _openat2_works()


def split_path(rel: bytes) -> list[bytes]:
    """The components of ``rel``; empty ones and ``.`` are dropped, ``..`` is kept for the caller to judge."""
    return [part for part in rel.split(b"/") if part not in (b"", b".")]


class RootedDir:
    """A directory, opened once; relative paths are resolved beneath it without following any symlink.

    Args:
        path: the directory. Symlinks in ``path`` itself are the caller's and are followed.
        keep: how many directories beneath it, those used last, to hold open, so that who walks through a tree of any
            depth does not begin at the top for each. Whoever renames or removes something has to :meth:`forget` them.

    Raises:
        OSError: it does not exist or is no directory.
    """

    __slots__ = ("_keep", "_kept", "fd", "path")

    def __init__(self, path: str | bytes, keep: int = 0) -> None:
        self.path = os.fsencode(path)
        self._keep = keep
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @classmethod
    def at(cls, dir_fd: int) -> RootedDir:
        """The directory that is open as ``dir_fd``, which stays the caller's to close."""
        return cls(b"/proc/self/fd/%d" % dir_fd)

    def __enter__(self) -> RootedDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        self.forget()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def forget(self) -> None:
        """Close the directories that were kept open."""
        while self._kept:
            os.close(self._kept.popitem()[1])

    def open(self, rel: bytes, flags: int) -> int:
        """Open ``rel`` (``b""`` is the directory itself); no component of it may be a symlink or ``..``.

        With directories kept, it must be without empty components and ``.``, as :func:`join` makes it.

        Raises :class:`OSError`, ELOOP when there is a symlink on the way.
        """
        above, _, name = rel.rpartition(b"/")
        if above in self._kept and name not in (b"", b".", b".."):
            self._kept.move_to_end(above)
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._kept[above])
        parts = split_path(rel)
        if b".." in parts:
            raise OSError(errno.EXDEV, "path leads upwards", os.fsdecode(rel))
        top, done = self._nearest(rel)
        todo = parts[done:]
        if not todo:
            return os.open(b".", flags | os.O_CLOEXEC, dir_fd=top)
        base = top
        try:
            while True:
                # The last ones of a long way are kept, so that who comes back up finds them.
                far = len(todo) - _NEAR if self._keep else len(todo)
                piece, count = _take(todo, max(far, 1) if HAVE_OPENAT2 else 1)
                del todo[:count]
                done += count
                step = flags | os.O_NOFOLLOW if not todo else os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
                if HAVE_OPENAT2:
                    fd = openat2(base, piece, step, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
                else:
                    # One component at a time, O_NOFOLLOW on each: the same promise without the system call.
                    fd = os.open(piece, step | os.O_CLOEXEC, dir_fd=base)
                if base != top:
                    os.close(base)
                    base = top
                if not todo:
                    return fd
                base = fd
                if far <= 1:
                    self._remember(b"/".join(parts[:done]), fd)
        finally:
            if base != top:
                os.close(base)

    def _nearest(self, rel: bytes) -> tuple[int, int]:
        """The kept directory that ``rel`` is or is in, and how many components deep that is."""
        above = [path for path in self._kept if rel.startswith(path) and rel[len(path) : len(path) + 1] in (b"", b"/")]
        if not above:
            return self.fd, 0
        path = max(above, key=len)
        return self._kept[path], path.count(b"/") + 1

    def _remember(self, rel: bytes, fd: int) -> None:
        if not self._keep or not rel or rel in self._kept:
            return
        self._kept[rel] = os.dup(fd)
        if len(self._kept) > self._keep:
            os.close(self._kept.popitem(last=False)[1])

    def open_dir(self, rel: bytes) -> int:
        """A readable descriptor of the directory ``rel``."""
        fd = self.open(rel, DIRECTORY_FLAGS)
        self._remember(rel, fd)
        return fd

    def open_file(self, rel: bytes) -> int:
        """A readable descriptor of the regular file ``rel``, leaving its access time alone where allowed.

        Raises :class:`OSError`, EINVAL when it is not a regular file: opening a device can have effects, so it
        is looked at before it is opened.
        """
        parent, _, name = rel.rpartition(b"/")
        dir_fd = self.open(parent, os.O_PATH | os.O_DIRECTORY)
        try:
            return open_regular(dir_fd, name)
        finally:
            os.close(dir_fd)


def open_regular(dir_fd: int, name: bytes) -> int:
    """A readable descriptor of the regular file ``name`` in ``dir_fd``; EINVAL when it is something else."""
    # Through O_PATH, and from there to the very inode that was looked at: nothing can be swapped in between,
    # and a FIFO or device is never opened.
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if (os.fstat(handle).st_mode & 0o170000) != 0o100000:
            raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(name))
        return reopen(handle, os.O_RDONLY)
    finally:
        os.close(handle)


def reopen(handle: int, flags: int) -> int:
    """Open the object behind an ``O_PATH`` descriptor, without touching its access time where allowed."""
    path = f"/proc/self/fd/{handle}"
    try:
        return os.open(path, flags | os.O_NOATIME | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, flags | os.O_CLOEXEC)


def _take(parts: list[bytes], most: int) -> tuple[bytes, int]:
    """At least one and up to ``most`` components from the front of ``parts``, joined; and how many they are."""
    taken = [parts[0]]
    size = len(taken[0])
    for part in parts[1:most]:
        size += 1 + len(part)
        if size > _CHUNK_BYTES:
            break
        taken.append(part)
    return b"/".join(taken), len(taken)
