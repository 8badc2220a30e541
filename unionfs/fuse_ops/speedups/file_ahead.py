"""Begins to read the file that comes next, where that can be known before it is opened.

The kernel reads ahead within a file only; each small file from the disk costs a wait, one after the other. Who opens
the files of a directory in the order of their listing (tar, cp, grep) has the next ones read while he is busy with
this one.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Final

from unionfs.fuse_ops.speedups.coldness import Coldness
from unionfs.fuse_ops.tree.inodes import Inode

_WARM_S: Final = 40e-6  # for a small file that is in memory
_KEPT: Final = 16  # directories
_SKIPPED: Final = 16  # entries between two opens that may have been something else: directories, links, large files
_AHEAD: Final = 3  # files
_BUSY_S: Final = 10e-3  # after the last that was begun
_BYTES: Final = 128 * 1024  # of each; what the kernel reads ahead at once


class _Walk:
    """The names of a directory, and how far its reader is."""

    __slots__ = ("ahead", "names", "position")

    def __init__(self, names: list[bytes]) -> None:
        self.names = names
        self.position = 0  # of the first name that was not opened yet
        self.ahead = 0  # of the first one that was not read ahead


class FileReadAhead:
    """Who reads which directory's files in order, and whether they come from the disk."""

    def __init__(self) -> None:
        self._coldness = Coldness()
        self._walks: OrderedDict[Inode, _Walk] = OrderedDict()
        self._busy_until = 0.0

    @property
    def busy(self) -> bool:
        """Whether files may be read in the background just now."""
        return time.monotonic() < self._busy_until

    def listed(self, directory: Inode, names: list[bytes]) -> None:
        """All ``names`` of ``directory`` were told, in this order."""
        self._walks[directory] = _Walk(names)
        self._walks.move_to_end(directory)
        if len(self._walks) > _KEPT:
            self._walks.popitem(last=False)

    def took(self, seconds: float) -> None:
        """Reading a small file took ``seconds``."""
        self._coldness.took(seconds, _WARM_S)

    def opened(self, inode: Inode) -> None:
        """A lower file is opened to be read: read those ahead that come after it, if it is their turn."""
        directory = inode.parent
        if directory is None or not self._coldness.is_cold:
            return
        walk = self._walks.get(directory)
        if walk is None:
            return
        try:
            position = walk.names.index(inode.name, walk.position, walk.position + _SKIPPED)
        except ValueError:
            return  # some other order
        walk.position = position + 1
        children = directory.children or {}
        first = max(walk.ahead, position + 1)
        walk.ahead = max(walk.ahead, min(position + 1 + _AHEAD, len(walk.names)))
        self._busy_until = time.monotonic() + _BUSY_S
        for name in walk.names[first : walk.ahead]:
            child = children.get(name)
            if child is not None:
                _begin_to_read(child)


def _begin_to_read(inode: Inode) -> None:
    if inode.lower is None or inode.upper or inode.metacopy or inode.filled or inode.kind != stat.S_IFREG:
        return
    layer, path = inode.lower
    with suppress(OSError):  # whoever opens or reads it is told
        fd = layer.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, _BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
