"""Trees of files by directory descriptors: no symbolic link is followed, no depth is too much."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple

from unionfs.host import syscalls

DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

BLOCK_BYTES: Final = 512  # of st_blocks, whatever the file system's own are

# There is no directory of that name: nothing, or something else.
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})

# A path handed to the kernel at once must stay below PATH_MAX (4096); a tree can be deeper than that.
_PIECE_BYTES: Final = 3500

# So many components above a directory far down are kept open too, when some are.
_NEAR: Final = 16

# Somebody who keeps filling a directory while it is removed is not outrun for ever.
_MAX_VISITS: Final = 50


class _Above(NamedTuple):
    """A directory on the way down, whose descriptor is closed while those in it are visited."""

    identity: tuple[int, int]  # device and inode number
    child: bytes  # the directory in it that is being visited
    pending: list[bytes]  # further directories in it


def open_confined(dir_fd: int, path: bytes, flags: int) -> int:
    """Open ``path``, of any length, below the directory ``dir_fd``; returns a descriptor.

    No link is followed, and nothing is opened that is not below: raises ELOOP at a symbolic link in the path and EXDEV
    if the path would lead out of the directory.
    """
    fd = dir_fd
    try:
        while len(path) > _PIECE_BYTES:
            end = path.rfind(b"/", 0, _PIECE_BYTES)
            if end <= 0:
                break  # the kernel says that a component is too long
            below = syscalls.open_beneath(fd, path[:end], _HANDLE)
            if fd != dir_fd:
                os.close(fd)
            fd = below
            path = path[end + 1 :]
        return syscalls.open_beneath(fd, path, flags)
    finally:
        if fd != dir_fd:
            os.close(fd)


class RootedDir:
    """A directory, opened once; relative paths are resolved beneath it without following any symbolic link.

    Everything that reads or writes beneath a directory which someone else may fill (a layer, a container's upper
    directory, the target of an unpack) goes through it: an entry that is swapped for a link at the wrong moment is
    refused instead of followed.

    Args:
        path: the directory. Symbolic links in ``path`` itself are the caller's and are followed.
        keep: how many directories beneath it, those used last, to hold open, so that who walks through a tree of any
            depth does not begin at the top for each. Whoever renames or removes one has to :meth:`forget` them.

    Raises:
        OSError: it does not exist or is no directory.
    """

    __slots__ = ("_keep", "_kept", "fd", "path")

    def __init__(self, path: str | bytes, keep: int = 0) -> None:
        self.path = os.fsencode(path)
        self._keep = keep
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

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
        """Open ``rel`` (``b""`` is the directory itself); no component of it may be a symbolic link or ``..``.

        With directories kept, it must be without empty components and ``.``, as :func:`join` makes it.

        Raises :class:`OSError`, ELOOP when there is a symbolic link on the way.
        """
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW
        above, _, name = rel.rpartition(b"/")
        if above in self._kept and name not in (b"", b".", b".."):
            self._kept.move_to_end(above)
            return os.open(name, flags, dir_fd=self._kept[above])
        if b".." in rel and b".." in rel.split(b"/"):
            raise OSError(errno.EXDEV, "path leads upwards", os.fsdecode(rel))
        if not rel:
            return os.open(b".", flags, dir_fd=self.fd)
        if self._keep and above:
            return os.open(name, flags, dir_fd=self._kept_dir(above))
        return open_confined(self.fd, rel, flags)

    def open_dir(self, rel: bytes) -> int:
        """A readable descriptor of the directory ``rel``."""
        fd = self.open(rel, DIRECTORY_FLAGS)
        if self._keep and rel and rel not in self._kept:
            self._remember(rel, os.dup(fd))
        return fd

    def open_file(self, rel: bytes) -> int:
        """A readable descriptor of the regular file ``rel``, see :func:`open_regular`."""
        parent, _, name = rel.rpartition(b"/")
        dir_fd = self.open(parent, _HANDLE)
        try:
            return open_regular(dir_fd, name)
        finally:
            os.close(dir_fd)

    def _kept_dir(self, rel: bytes) -> int:
        """A descriptor of the directory ``rel`` that belongs to those that are kept, at least until the next call."""
        base, done = self.fd, 0
        for path, fd in self._kept.items():
            if len(path) > done and rel.startswith(path) and rel[len(path) : len(path) + 1] in (b"", b"/"):
                base, done = fd, len(path)
        names = rel[done:].strip(b"/").split(b"/")
        # The last ones of a long way are kept one by one, so that who comes back up finds them.
        first = max(len(names) - min(self._keep, _NEAR), 1)
        for piece in (b"/".join(names[:first]), *names[first:]):
            if piece:
                done += len(piece) + (done > 0)
                base = open_confined(base, piece, _HANDLE)
                self._remember(rel[:done], base)
        return base

    def _remember(self, rel: bytes, fd: int) -> None:
        self._kept[rel] = fd
        if len(self._kept) > self._keep:
            os.close(self._kept.popitem(last=False)[1])


def join(parent: bytes, name: bytes) -> bytes:
    """``parent/name``, with the root as the empty path."""
    return parent + b"/" + name if parent else name


def open_regular(dir_fd: int, name: bytes) -> int:
    """A readable descriptor of the regular file ``name`` in ``dir_fd``, leaving its access time alone where allowed.

    Raises :class:`OSError`, EINVAL when it is something else: opening a device can have effects, so it is looked at
    before it is opened.
    """
    # Through O_PATH, and from there to the very inode that was looked at: nothing can be swapped in between.
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
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


@contextmanager
def open_tree(path: str | bytes) -> Iterator[int]:
    """A readable descriptor of the directory ``path``, symbolic links followed; closed at the end of the block."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(dir_fd: int, name: bytes) -> int:
    """A readable descriptor of the directory ``name``; -1 if there is none any more."""
    try:
        return os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in _GONE:
            return -1
        raise


def walk_tree(
    dir_fd: int,
    enter: Callable[[int], list[bytes]],
    leave: Callable[[int, bytes], object] | None = None,
    open_below: Callable[[int, bytes], int] = open_directory,
) -> None:
    """Visit the directory ``dir_fd`` and those below it, at any depth with three descriptors and in linear time.

    It goes down by name and back by ``..``, and looks whether that led to where it came from. What was moved away or
    removed meanwhile is left out; with ``leave``, which then cannot be called in order, it is an error.

    Args:
        dir_fd: where to begin, a readable descriptor.
        enter: called with a readable descriptor of each directory; returns the names of those in it that are to be
            visited, of which the last comes first.
        leave: called when all below the directory ``name`` was visited, with a descriptor of the one that it is in.
        open_below: opens a directory, -1 for none.

    Raises:
        OSError: what the calls raise; a directory that cannot be read; ESTALE for one that was moved away.
    """
    fd = os.dup(dir_fd)
    above: list[_Above] = []
    try:
        pending = enter(fd)
        while pending or above:
            if pending:
                child = pending.pop()
                here = identity(fd)
                below = open_below(fd, child)
                if below >= 0:
                    above.append(_Above(here, child, pending))
                    os.close(fd)
                    fd = below
                    pending = enter(fd)
                continue
            depth = len(above)
            parent = _back(dir_fd, fd, above)
            os.close(fd)
            fd = parent
            moved = len(above) < depth
            _, child, pending = above.pop()
            if leave is not None:
                if moved:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fsdecode(child))
                leave(fd, child)
    finally:
        os.close(fd)


def walk_paths(dir_fd: int, enter: Callable[[int, bytes], list[bytes]]) -> None:
    """As :func:`walk_tree`, where ``enter`` is told the path of each directory below ``dir_fd``, too."""
    path: list[bytes] = []

    def open_below(fd: int, name: bytes) -> int:
        below = open_directory(fd, name)
        if below >= 0:
            path.append(name)
        return below

    walk_tree(dir_fd, lambda fd: enter(fd, b"/".join(path)), lambda fd, name: path.pop(), open_below)


class TreeSize(NamedTuple):
    """What a tree holds; an object with several names counts once."""

    objects: int
    """Directories too, the tree's own among them."""
    length_bytes: int
    """The lengths of what is no directory: what Docker's overlay2 reports as a layer's size."""
    disk_bytes: int
    """What is allocated for all of them, as du(1) counts it."""


def measure_tree(path: str | bytes, enter: Callable[[int], object] | None = None) -> TreeSize:
    """Measure the tree at ``path``. What goes away meanwhile is left out.

    Args:
        path: a directory; symbolic links are followed on the way to it.
        enter: called with a readable descriptor of each directory.

    Raises:
        OSError: it is missing or no directory, or one in it cannot be read.
    """
    objects = length = blocks = 0
    seen: set[tuple[int, int]] = set()

    def measure(fd: int) -> list[bytes]:
        nonlocal objects, length, blocks
        if enter is not None:
            enter(fd)
        objects += 1
        blocks += os.fstat(fd).st_blocks
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            try:
                info = os.lstat(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(info.st_mode):
                directories.append(name)
                continue
            if info.st_nlink > 1:
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
            objects += 1
            length += info.st_size
            blocks += info.st_blocks
        return directories

    with open_tree(path) as top:
        walk_tree(top, measure)
    return TreeSize(objects, length, blocks * BLOCK_BYTES)


def _back(top_fd: int, fd: int, above: list[_Above]) -> int:
    """A descriptor of the last directory of ``above``; those that are not where they were are taken from it first."""
    try:
        parent = os.open(b"..", DIRECTORY_FLAGS, dir_fd=fd)
    except FileNotFoundError:  # the directory was removed
        pass
    else:
        if _is_or_close(parent, above[-1].identity):
            return parent
    found = os.dup(top_fd)
    try:
        for i in range(1, len(above)):
            below = open_directory(found, above[i - 1].child)
            if below < 0 or not _is_or_close(below, above[i].identity):
                del above[i:]
                break
            os.close(found)
            found = below
    except BaseException:
        os.close(found)
        raise
    return found


def _is_or_close(fd: int, wanted: tuple[int, int]) -> bool:
    """Whether ``fd`` is of the object with the identity ``wanted``; if not, also when that cannot be told, close it."""
    is_it = False
    try:
        is_it = identity(fd) == wanted
    finally:
        if not is_it:
            os.close(fd)
    return is_it


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove ``name`` in the directory ``dir_fd`` with everything in it; missing is fine.

    Works as :func:`walk_tree` does. A directory of this user's whose mode forbids that is made accessible.

    Raises :class:`OSError` for what cannot be removed: EBUSY for a mount point, in which nothing is touched; ENOTEMPTY
    for a directory that keeps being filled.
    """
    for _ in range(_MAX_VISITS):
        if _is_gone(dir_fd, name):
            return
        fd = _open(dir_fd, name)
        if fd >= 0:
            try:
                walk_tree(fd, _remove_entries, _is_gone, _open)
            except OSError as error:
                if error.errno != errno.ESTALE:  # somebody interferes: see what is left
                    raise
            finally:
                os.close(fd)
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


def _open(dir_fd: int, name: bytes) -> int:
    """As :func:`open_directory`, for one that forbids it to its owner too."""
    try:
        return open_directory(dir_fd, name)
    except PermissionError:
        make_accessible(dir_fd, name)
        return open_directory(dir_fd, name)


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


def identity(fd: int) -> tuple[int, int]:
    """Device and inode number of what is open as ``fd``."""
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def make_accessible(dir_fd: int, name: bytes) -> None:
    """Let a user without privilege look into the directory ``name`` of his, change what is in it, and move it."""
    fd = os.open(name, _HANDLE, dir_fd=dir_fd)
    try:
        os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IRWXU)
    finally:
        os.close(fd)
