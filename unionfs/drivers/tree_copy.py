"""A complete copy of a directory tree: contents shared with the original where the file system can, hard links
within the tree, owners, modes, times, xattrs, devices.

Symlinks are copied and never followed; everything goes through directory descriptors, so depth does not matter.
"""

from __future__ import annotations

import contextlib
import os
import stat

from unionfs.archive.rooted import RootedDir, open_regular
from unionfs.archive.unpack import in_user_namespace
from unionfs.fuse_ops.copy_up.copying import copy_attributes, copy_data, copy_times, copy_xattrs


def copy_tree(source: str, target: str) -> None:
    """Make the empty directory ``target`` a copy of the directory ``source``, its root's attributes included.

    Raises:
        OSError: something cannot be read or made; the copy is incomplete then.
    """
    with RootedDir(source) as original, RootedDir(target) as copy:
        _TreeCopy(original, copy).run()


class _TreeCopy:
    def __init__(self, source: RootedDir, target: RootedDir) -> None:
        self._source = source
        self._target = target
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._skip_devices = in_user_namespace()

    def run(self) -> None:
        """Directories get their times last: making what is in them changes these."""
        done: list[tuple[bytes, os.stat_result]] = []
        todo = [b""]
        while todo:
            rel = todo.pop()
            done.append((rel, self._directory(rel, todo)))
        for rel, info in reversed(done):
            fd = self._target.open_dir(rel)
            try:
                copy_times(fd, b".", info)
            finally:
                os.close(fd)

    def _directory(self, rel: bytes, todo: list[bytes]) -> os.stat_result:
        """Copy the entries of the directory ``rel``, which exists; those that are directories go to ``todo``."""
        with contextlib.ExitStack() as stack:
            source = self._source.open_dir(rel)
            stack.callback(os.close, source)
            target = self._target.open_dir(rel)
            stack.callback(os.close, target)
            info = os.fstat(source)
            for name in map(os.fsencode, os.listdir(source)):
                child = os.lstat(name, dir_fd=source)
                path = rel + b"/" + name if rel else name
                if stat.S_ISDIR(child.st_mode):
                    os.mkdir(name, 0o700, dir_fd=target)
                    todo.append(path)
                else:
                    self._entry(source, target, name, path, child)
            copy_attributes(target, b".", info)
            # All of them: in a complete tree, what looks like overlayfs' own belongs to a nested one.
            copy_xattrs(_at(source, b"."), _at(target, b"."))
            return info

    def _entry(self, source: int, target: int, name: bytes, path: bytes, info: os.stat_result) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and self._skip_devices:
            return  # a user namespace may not make them, and what is run in it could not use them
        if info.st_nlink > 1:
            first = self._first_names.setdefault((info.st_dev, info.st_ino), path)
            if first != path:
                self._link(first, target, name)
                return
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


def _at(dir_fd: int, name: bytes) -> bytes:
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)
