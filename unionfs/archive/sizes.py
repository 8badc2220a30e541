"""The size of a layer directory as engines report it."""

from __future__ import annotations

import errno
import os
import stat

from unionfs.archive.overlay_view import join
from unionfs.archive.rooted import RootedDir
from unionfs.errors import ArchiveError

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def tree_size(root: str | bytes) -> int:
    """Bytes in the files beneath ``root``: lengths, not disk blocks, a file with several names once.

    What Docker's overlay2 reports for a layer after applying it. Directories count nothing,
    and entries that go away meanwhile are left out.

    Args:
        root: the layer directory.

    Raises:
        ArchiveError: ``root`` is missing or is no directory.
    """
    try:
        top = RootedDir(root)
    except OSError as error:
        raise ArchiveError(
            f"cannot measure {os.fsdecode(root)}: {error.strerror}; give the path of an existing directory"
        ) from error
    total = 0
    seen: set[tuple[int, int]] = set()
    with top:
        todo = [b""]
        while todo:
            rel = todo.pop()
            try:
                fd = top.open_dir(rel)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            try:
                for base in map(os.fsencode, os.listdir(fd)):
                    try:
                        info = os.lstat(base, dir_fd=fd)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        todo.append(join(rel, base))
                    elif info.st_nlink == 1:
                        total += info.st_size
                    elif (info.st_dev, info.st_ino) not in seen:
                        seen.add((info.st_dev, info.st_ino))
                        total += info.st_size
            finally:
                os.close(fd)
    return total
