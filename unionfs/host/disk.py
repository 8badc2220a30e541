"""Changes on disk with the syncs that make them last.

A directory entry is on stable storage only when its directory was synced, a file's contents when the file was; the
functions here do both, so that what follows one of them may rely on it after a loss of power.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from unionfs.host.files import remove_tree
from unionfs.host.syscalls import AT_FDCWD, RENAME_NOREPLACE, renameat2


def sync_dir(path: str) -> None:
    """Bring the entries of the directory to stable storage."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ensure_dir(path: str, mode: int) -> None:
    """Make the directory and its parents where they are missing, so that they stay.

    Raises:
        OSError: something else has the name.
    """
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return
    except FileNotFoundError:
        ensure_dir(os.path.dirname(path), 0o711)
        os.mkdir(path, mode)
    os.chmod(path, mode)
    sync_dir(os.path.dirname(path) or ".")


def new_dir(parent: str, prefix: str) -> str:
    """A new directory of a name that starts with ``prefix``, open to its owner only."""
    return tempfile.mkdtemp(prefix=prefix, dir=parent)


def write_file(path: str, contents: bytes) -> None:
    """Write a file of mode 0644 and bring its contents to stable storage; the name needs a :func:`sync_dir`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)
        view = memoryview(contents)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: str, contents: bytes, mode: int = 0o600) -> None:
    """Write a file, which takes its name when it is on stable storage.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    with replacing(path, mode) as file:
        file.write(contents)


@contextmanager
def replacing(path: str, mode: int | None = None) -> Iterator[BinaryIO]:
    """A file to write and read, which takes the name ``path`` after the block, when it is on stable storage.

    Args:
        path: the name; what it stood for is replaced, links too.
        mode: of the file; None for what open(2) would give it.

    Raises:
        OSError: it could not be written. Then, and if the block raises, what was there before still is.
    """
    parent = os.path.dirname(path) or "."
    try:
        # Docker's name for such a file, which it ignores where it reads a directory.
        fd, begun = tempfile.mkstemp(prefix=".tmp-", dir=parent)
    except OSError as error:
        error.filename = path
        raise
    try:
        with os.fdopen(fd, "w+b") as file:
            os.fchmod(fd, 0o666 & ~current_umask() if mode is None else mode)
            yield file
            file.flush()
            os.fsync(fd)
        os.replace(begun, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(begun)
        raise
    sync_dir(parent)


def current_umask() -> int:
    """The permissions that this process takes from what it makes."""
    mask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(mask)
    return mask


def move(old: str, new: str) -> None:
    """Rename without replacing anything, and make that last. Both paths are on one file system.

    Raises:
        FileExistsError: ``new`` exists, an empty directory included.
        OSError: it failed, and ``old`` is where it was.
    """
    try:
        renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from error
        error.filename = new
        raise
    try:
        sync_dir(os.path.dirname(new))
        if os.path.dirname(old) != os.path.dirname(new):
            sync_dir(os.path.dirname(old))
    except BaseException:
        # Whoever is told that it failed removes what the name stands for; the name must not stay behind.
        with suppress(OSError):
            os.rename(new, old)
        raise


def delete(path: str) -> None:
    """Delete a file, or a directory with all that is in it. Absent is fine."""
    with suppress(FileNotFoundError, NotADirectoryError):
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(parent, os.fsencode(os.path.basename(path)))
        finally:
            os.close(parent)
