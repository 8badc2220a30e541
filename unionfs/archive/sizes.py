"""The size of a layer directory as engines report it."""

from __future__ import annotations

import os
import stat

from unionfs.errors import ArchiveError
from unionfs.host.files import open_tree, walk_tree


def tree_size(root: str | bytes) -> int:
    """Bytes in the files beneath ``root``: lengths, not disk blocks, a file with several names once.

    What Docker's overlay2 reports for a layer after applying it. Directories count nothing,
    and entries that go away meanwhile are left out.

    Args:
        root: the layer directory.

    Raises:
        ArchiveError: ``root`` is missing or is no directory.
    """
    total = 0
    seen: set[tuple[int, int]] = set()

    def measure(fd: int) -> list[bytes]:
        nonlocal total
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            try:
                info = os.lstat(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(info.st_mode):
                directories.append(name)
            elif info.st_nlink == 1:
                total += info.st_size
            elif (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_size
        return directories

    try:
        with open_tree(root) as top:
            walk_tree(top, measure)
    except OSError as error:
        raise ArchiveError(
            f"cannot measure {os.fsdecode(root)}: {error.strerror}; give the path of an existing directory"
        ) from error
    return total
