"""Contents of the files of a layered driver's layer, from its own directory where they lie there."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from unionfs.archive.overlay_view import overlay_xattrs
from unionfs.archive.rooted import RootedDir, reopen
from unionfs.drivers.files import TreeFiles

_ELSEWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


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
            handle = self._own.open(name.lstrip(b"/"), os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
        else:
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode) and "metacopy" not in overlay_xattrs(handle_path(handle)):
                    return io.BufferedReader(io.FileIO(reopen(handle, os.O_RDONLY)))
            finally:
                os.close(handle)
        return self._through_mount(name)

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


def handle_path(handle: int) -> bytes:
    """A path to what an ``O_PATH`` descriptor refers to; xattr calls do not take such a descriptor itself."""
    return b"/proc/self/fd/%d" % handle
