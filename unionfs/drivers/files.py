"""Contents of single files of a tree, found as a process with its root there would find them."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from unionfs.drivers.contract import DiffGetterDriver, Driver, FileGetCloser
from unionfs.host.files import RootedDir, reopen
from unionfs.host.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

# What is longer cannot be handed to the kernel in one piece.
_PATH_MAX = 4095


class TreeFiles:
    """A :class:`FileGetCloser` over a directory.

    Args:
        root: the directory.
        release: called once when it is closed.

    Raises:
        OSError: there is no such directory.
    """

    def __init__(self, root: str, release: Callable[[], None] | None = None) -> None:
        self._release = release
        self._root: RootedDir | None = RootedDir(root)

    def get(self, name: bytes) -> BinaryIO:
        """See :meth:`FileGetCloser.get`."""
        if self._root is None:
            raise ValueError("the tree was closed")
        rel = name.lstrip(b"/")
        if 0 < len(rel) <= _PATH_MAX:
            handle = openat2(self._root.fd, rel, os.O_PATH, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
        else:
            handle = self._root.open(rel, os.O_PATH)
        try:
            # Opening a device or a fifo that took the file's place would have effects, so look first.
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileNotFoundError(errno.ENOENT, "is no regular file; the tree was changed", os.fsdecode(name))
            return io.BufferedReader(io.FileIO(reopen(handle, os.O_RDONLY)))
        finally:
            os.close(handle)

    def close(self) -> None:
        """Release the tree; closing twice is harmless."""
        root, self._root = self._root, None
        if root is not None:
            root.close()
            if self._release is not None:
                self._release()


def file_getter(driver: Driver, layer_id: str) -> FileGetCloser:
    """The files of a layer: by the driver's own means where it has them, otherwise through a mount until closed.

    Raises:
        LayerNotFoundError: there is none of this id.
    """
    if isinstance(driver, DiffGetterDriver):
        return driver.diff_getter(layer_id)
    root = driver.get(layer_id)
    try:
        return TreeFiles(root, lambda: driver.put(layer_id))
    except BaseException:
        driver.put(layer_id)
        raise
