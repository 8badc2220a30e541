"""Trees of files by directory descriptors: no symbolic link is followed, no depth is too much."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NamedTuple

_READABLE: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Somebody who keeps filling a directory while it is removed is not outrun for ever.
_MAX_VISITS: Final = 50


class _Above(NamedTuple):
    """A directory on the way down, whose descriptor is closed while those in it are emptied."""

    identity: tuple[int, int]  # device and inode number
    child: bytes  # the directory in it that is being emptied
    pending: list[bytes]  # further directories in it


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove ``name`` in the directory ``dir_fd`` with everything in it; missing is fine.

    Works at any depth with three descriptors and in linear time: it goes down by name and back by ``..``, and looks
    whether that led to where it came from. A directory of this user's whose mode forbids that is made accessible.

    Raises :class:`OSError` for what cannot be removed: EBUSY for a mount point, in which nothing is touched; ENOTEMPTY
    for a directory that keeps being filled.
    """
    for _ in range(_MAX_VISITS):
        if _is_gone(dir_fd, name):
            return
        _empty(dir_fd, name)
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fsdecode(name))


def _is_gone(dir_fd: int, name: bytes) -> bool:
    """Remove ``name`` unless it is a directory with something in it."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        pass
    else:
        return True
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    except NotADirectoryError:  # somebody has put another object there meanwhile
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _empty(dir_fd: int, name: bytes) -> None:
    """Remove what is in the directory ``name``. Where somebody interferes, something may be left."""
    fd = _open(dir_fd, name)
    if fd < 0:
        return
    above: list[_Above] = []
    try:
        pending = _remove_entries(fd)
        while True:
            if pending:
                child = pending.pop()
                below = _open(fd, child)
                if below < 0:
                    continue
                above.append(_Above(_identity(fd), child, pending))
                os.close(fd)
                fd = below
                pending = _remove_entries(fd)
            elif above:
                identity, child, pending = above.pop()
                parent = os.open(b"..", _READABLE, dir_fd=fd)
                os.close(fd)
                fd = parent
                if _identity(fd) != identity:
                    return  # it was moved: whatever is here, it is not ours to remove
                _is_gone(fd, child)
            else:
                return
    finally:
        os.close(fd)


def _open(dir_fd: int, name: bytes) -> int:
    """A readable descriptor of the directory ``name``; -1 if it is none any more."""
    try:
        try:
            return os.open(name, _READABLE, dir_fd=dir_fd)
        except PermissionError:
            make_accessible(dir_fd, name)
            return os.open(name, _READABLE, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as error:
        if error.errno == errno.ELOOP:
            return -1
        raise


def _remove_entries(fd: int) -> list[bytes]:
    """Remove what can be at once from the directory ``fd``; the names of directories that are not empty."""
    names = [os.fsencode(name) for name in os.listdir(fd)]
    try:
        return [name for name in names if not _is_gone(fd, name)]
    except PermissionError:
        if os.fstat(fd).st_mode & stat.S_IRWXU == stat.S_IRWXU:
            raise
        os.chmod(fd, stat.S_IRWXU)
    return [name for name in names if not _is_gone(fd, name)]


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def make_accessible(dir_fd: int, name: bytes) -> None:
    """Let a user without privilege look into the directory ``name`` of his, change what is in it, and move it."""
    fd = os.open(name, _HANDLE, dir_fd=dir_fd)
    try:
        os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IRWXU)
    finally:
        os.close(fd)
