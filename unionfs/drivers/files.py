"""Contents of single files of a tree, found as a process with its root there would find them, or of a layer."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from unionfs.archive.overlay_view import ALL_SPACES
from unionfs.drivers.contract import DiffGetterDriver, Driver, FileGetCloser
from unionfs.host.files import RootedDir, open_regular, reopen
from unionfs.host.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2
from unionfs.overlay.rules import entry_path, is_metacopy

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


# EINVAL: no regular file, see open_regular.
_ELSEWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL})


class LayerFiles:
    """A :class:`unionfs.drivers.contract.FileGetCloser` over a ``diff`` directory.

    A layer that was filled by applying an archive has everything itself, so nothing is mounted for it. One that was
    written through a mount may have files that were renamed with their directory or changed in owner only, whose
    contents lie in a parent: for these, the layer is mounted until this is closed.

    Args:
        diff: the layer's own directory.
        get: mounts the layer and gives the path.
        put: undoes it.
    """

    def __init__(self, diff: str, get: Callable[[], str], put: Callable[[], None]) -> None:
        self._own: RootedDir | None = RootedDir(diff)
        self._get = get
        self._put = put
        self._mounted: TreeFiles | None = None

    def get(self, name: bytes) -> BinaryIO:
        """See :meth:`FileGetCloser.get`."""
        if self._own is None:
            raise ValueError("the layer was closed")
        try:
            return self._own_file(self._own, name.lstrip(b"/"))
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
        return self._through_mount(name)

    @staticmethod
    def _own_file(own: RootedDir, path: bytes) -> BinaryIO:
        """The file if the layer's own directory has its contents; an error out of ``_ELSEWHERE`` if not."""
        parent, _, base = path.rpartition(b"/")
        dir_fd = own.open(parent, os.O_PATH | os.O_DIRECTORY)
        try:
            if is_metacopy(entry_path(dir_fd, base), ALL_SPACES):
                raise FileNotFoundError(errno.ENOENT, "has only its attributes here", os.fsdecode(path))
            return io.BufferedReader(io.FileIO(open_regular(dir_fd, base)))
        finally:
            os.close(dir_fd)

    def _through_mount(self, name: bytes) -> BinaryIO:
        if self._mounted is None:
            root = self._get()
            try:
                self._mounted = TreeFiles(root, self._put)
            except BaseException:
                self._put()
                raise
        return self._mounted.get(name)

    def close(self) -> None:
        """Release the layer; closing twice is harmless."""
        own, self._own = self._own, None
        if own is not None:
            own.close()
        mounted, self._mounted = self._mounted, None
        if mounted is not None:
            mounted.close()
