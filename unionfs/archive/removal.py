"""Removing trees through directory descriptors: no symlink is followed, no depth is too much."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Set as AbstractSet

from unionfs.archive.overlay_view import join
from unionfs.archive.rooted import RootedDir

# Somebody who keeps filling a directory while it is removed is not outrun for ever.
_MAX_VISITS = 50


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove the directory ``name`` in ``dir_fd`` with everything in it.

    Raises :class:`OSError` for what cannot be removed: EBUSY for a mount point, ENOTEMPTY when it keeps being filled.
    """
    with RootedDir.at(dir_fd) as top:
        todo = [name]
        visits: dict[bytes, int] = {}
        while todo:
            rel = todo[-1]
            visits[rel] = visits.get(rel, 0) + 1
            if visits[rel] > _MAX_VISITS:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fsdecode(rel))
            inside = _remove_entries(top, rel)
            if inside:
                # These are not empty; once they are, the next visit of this directory takes them away.
                todo += [join(rel, base) for base in inside]
                continue
            todo.pop()
            visits.pop(rel)
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except FileNotFoundError:
            pass


def _remove_entries(top: RootedDir, rel: bytes) -> list[bytes]:
    """Remove what can be at once from the directory ``rel``; the names of directories that are not empty."""
    try:
        fd = top.open_dir(rel)
    except FileNotFoundError:
        return []
    left = []
    try:
        for base in map(os.fsencode, os.listdir(fd)):
            try:
                os.unlink(base, dir_fd=fd)
            except FileNotFoundError:
                pass
            except IsADirectoryError:
                try:
                    os.rmdir(base, dir_fd=fd)
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                    left.append(base)
    finally:
        os.close(fd)
    return left


def remove_all_but(dir_fd: int, keep: AbstractSet[tuple[int, bytes]]) -> None:
    """Remove everything beneath ``dir_fd`` but what ``keep`` names, as (inode of its directory, name).

    A directory that is not kept stays if something in it does.
    """
    with RootedDir.at(dir_fd) as top:
        dirs: list[tuple[bytes, bool]] = []
        todo = [b""]
        while todo:
            rel = todo.pop()
            fd = top.open_dir(rel)
            try:
                inode = os.fstat(fd).st_ino
                for base in map(os.fsencode, os.listdir(fd)):
                    kept = (inode, base) in keep
                    if stat.S_ISDIR(os.lstat(base, dir_fd=fd).st_mode):
                        dirs.append((join(rel, base), kept))
                        todo.append(join(rel, base))
                    elif not kept:
                        os.unlink(base, dir_fd=fd)
            finally:
                os.close(fd)
        # A directory comes after the one it is in, so from the end every one is as empty as it will be.
        for rel, kept in reversed(dirs):
            if not kept:
                _remove_if_empty(top, rel)


def _remove_if_empty(top: RootedDir, rel: bytes) -> None:
    parent, _, base = rel.rpartition(b"/")
    fd = top.open_dir(parent)
    try:
        os.rmdir(base, dir_fd=fd)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
    finally:
        os.close(fd)
