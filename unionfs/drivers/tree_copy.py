"""A complete copy of a directory tree: contents shared with the original where the file system can, hard links
within the tree, owners, modes, times, xattrs, devices.

Symlinks are copied and never followed; everything goes through directory descriptors, so depth does not matter.
"""

from __future__ import annotations

import os
import stat

from unionfs.host.files import DIRECTORY_FLAGS, RootedDir, open_regular, open_tree, walk_tree
from unionfs.host.syscalls import in_user_namespace
from unionfs.overlay.copying import copy_attributes, copy_data, copy_times, copy_xattrs


def copy_tree(source: str, target: str) -> None:
    """Make the empty directory ``target`` a copy of the directory ``source``, its root's attributes included.

    Raises:
        OSError: something cannot be read or made; the copy is incomplete then.
    """
    with open_tree(source) as original, RootedDir(target) as copy:
        _TreeCopy(original, copy).run()


class _TreeCopy:
    """One copy: goes through the source, and in the same steps through the target."""

    def __init__(self, source: int, target: RootedDir) -> None:
        self._source = source
        self._target = target
        self._here = os.dup(target.fd)  # where the walk is
        self._way: list[bytes] = []
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._skip_devices = in_user_namespace()

    def run(self) -> None:
        try:
            walk_tree(self._source, self._directory, self._leave, self._down)
            _finish(self._source, self._here)
        finally:
            os.close(self._here)

    def _down(self, source: int, name: bytes) -> int:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=source)
        try:
            self._move(name)
        except BaseException:
            os.close(fd)
            raise
        self._way.append(name)
        return fd

    def _leave(self, source: int, name: bytes) -> None:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=source)
        try:
            _finish(fd, self._here)
        finally:
            os.close(fd)
        self._move(b"..")  # nobody else writes to the target
        self._way.pop()

    def _move(self, name: bytes) -> None:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=self._here)
        os.close(self._here)
        self._here = fd

    def _directory(self, source: int) -> list[bytes]:
        """Copy what is in a directory, which exists in the target; the names of the directories in it."""
        directories = []
        for name in map(os.fsencode, os.listdir(source)):
            child = os.lstat(name, dir_fd=source)
            if stat.S_ISDIR(child.st_mode):
                os.mkdir(name, 0o700, dir_fd=self._here)
                directories.append(name)
            else:
                self._entry(source, self._here, name, child)
        return directories

    def _entry(self, source: int, target: int, name: bytes, info: os.stat_result) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and self._skip_devices:
            return  # a user namespace may not make them, and what is run in it could not use them
        if info.st_nlink > 1:
            first = self._first_names.get((info.st_dev, info.st_ino))
            if first is not None:
                self._link(first, target, name)
                return
            self._first_names[info.st_dev, info.st_ino] = b"/".join((*self._way, name))
        if kind == stat.S_IFREG:
            reading = open_regular(source, name)
            try:
                writing = os.open(
                    name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target
                )
                try:
                    copy_data(reading, writing, os.fstat(reading).st_size)
                finally:
                    os.close(writing)
            finally:
                os.close(reading)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, kind | 0o600, info.st_rdev, dir_fd=target)
        # Changing the owner clears setuid and capabilities, so it comes first.
        copy_attributes(target, name, info)
        copy_xattrs(_at(source, name), _at(target, name))
        copy_times(target, name, info)

    def _link(self, first: bytes, target: int, name: bytes) -> None:
        parent, _, base = first.rpartition(b"/")
        fd = self._target.open_dir(parent)
        try:
            os.link(base, name, src_dir_fd=fd, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(fd)


def _finish(source: int, target: int) -> None:
    """Give a directory the attributes of its original; its times come last, making what is in it changes them."""
    info = os.fstat(source)
    copy_attributes(target, b".", info)
    # All of them: in a complete tree, what looks like overlayfs' own belongs to a nested one.
    copy_xattrs(source, target)
    copy_times(target, b".", info)


def _at(dir_fd: int, name: bytes) -> bytes:
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)
