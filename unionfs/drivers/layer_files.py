"""Contents of the files of a layered driver's layer, from its own directory where they lie there."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import BinaryIO

from unionfs.archive.overlay_view import ALL_SPACES
from unionfs.drivers.files import TreeFiles
from unionfs.host.files import RootedDir, open_regular
from unionfs.overlay.rules import entry_path, is_metacopy

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
