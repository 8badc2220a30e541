"""The contents of small files for the kernel's page cache, given when a file is opened and not when it is read.

Who opens a small file nearly always reads it. What is in the page cache by then is read without a request, and a
read that was none does not make the kernel ask for the access time afterwards.

Only files of lower layers, which never change, and only while nobody else has them open: a page that the kernel reads
is locked until it has the answer, and whoever stores into it waits for that, which must not be the one who answers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.requests.observer import Observer
from unionfs.fuse_ops.speedups.patience import Patience
from unionfs.fuse_ops.speedups.reading_ahead import FileReadAhead
from unionfs.fuse_ops.tree.inodes import Inode, OpenFile

log = logging.getLogger(__name__)

_SMALL_BYTES: Final = 128 * 1024  # what the kernel reads ahead at once


class EarlyPages(Observer):
    """Gives the kernel small files, and reads those ahead that come after one.

    Args:
        store: sends contents to the kernel, as those of an inode from its beginning on.
        read: fills a buffer from an offset of a descriptor and returns how many bytes there are; None where the disk
            would have to be waited for.
        patience: says when it may be waited for; without it, ``read`` never waits.
        ahead: reads files ahead.
    """

    def __init__(
        self,
        store: Callable[[Inode, memoryview], None],
        read: Callable[[int, memoryview, int], int | None],
        patience: Patience | None = None,
        ahead: FileReadAhead | None = None,
    ) -> None:
        self._store = store
        self._read = read
        self._patience = patience
        self._ahead = ahead
        self._buffer: memoryview | None = None

    @property
    def busy(self) -> bool:
        return self._ahead is not None and self._ahead.busy

    def opened(self, file: OpenFile, flags: int) -> None:
        """Put a small file into the kernel's page cache, if reading it now holds nobody up."""
        inode = file.inode
        if (
            inode.kernel.page_cache_primed
            or file.writable
            or (self._patience is not None and not self._patience.may_wait())
        ):
            return
        start = time.perf_counter()
        try:
            size = size_to_give(file, flags)
            if size:
                self._give(file, size)
        except OSError as error:  # whoever reads gets the error, if it is still there
            log.debug("nothing of %#x is given to the kernel: %s", inode.ino, error)
        if self._patience is not None:
            self._patience.waited_since(start)

    def _give(self, file: OpenFile, size: int) -> None:
        if self._ahead is not None:
            self._ahead.opened(file.inode)
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_SMALL_BYTES))
        start = time.perf_counter()
        count = self._read(file.fd, self._buffer[:size], 0)
        if count is None:
            return
        if self._ahead is not None:
            self._ahead.took(time.perf_counter() - start)
        self._store(file.inode, self._buffer[:count])
        file.inode.kernel.page_cache_primed = True

    def reads(self, file: OpenFile, offset: int, size: int) -> None:
        if offset == 0:  # so the kernel no longer has what it was given
            file.inode.kernel.page_cache_primed = False

    def listed(self, directory: Inode, names: list[bytes]) -> None:
        if self._ahead is not None:
            self._ahead.listed(directory, names)


def size_to_give(file: OpenFile, flags: int) -> int:
    """How many bytes of ``file``, opened with the client's ``flags``, the kernel is to be given: all or 0.

    Raises OSError where it is opened for that and cannot be.
    """
    inode = file.inode
    if inode.kernel.page_cache_primed or inode.upper or inode.metacopy or file.writable or flags & os.O_DIRECT:
        return 0
    if inode.handles is None or len(inode.handles) != 1:  # somebody else has it open
        return 0
    size_bytes = os.fstat(file.fd).st_size
    return size_bytes if size_bytes <= _SMALL_BYTES else 0
