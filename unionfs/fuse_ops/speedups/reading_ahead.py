"""Reads directories and files of lower layers before they are asked for, and gives small files to the page cache.

A cold walk through layers waits for the disk once for each directory of each layer, one after the other: longer than
all the rest takes. What will be wanted is known: the same directory in the layers below, and the directories in one
that was just looked at. When directories turn out to come from the disk, the kernel reads them in the background; when
they come from memory nothing is done.

The kernel reads ahead within a file only; each small file from the disk costs a wait. A program that opens the files of
a directory in the order of their listing (tar, cp, grep) has the next ones read while it is busy with this one.

A program that opens a small file nearly always reads it. What is in the page cache by then is read without a request,
and the kernel does not ask for the access time afterwards. Pages are given only of files of lower layers, which never
change, and only while nobody else has them open: a page that the kernel reads is locked until it has the answer, and a
store into it waits for that, so the thread that answers must not be the one that stores.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from unionfs.fuse_ops.requests.union_requests import Observer
from unionfs.fuse_ops.speedups.waiting import InlineWaitPolicy
from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.fuse_ops.stack.lower_stack import DirIndex, LowerDir, StackObserver
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, OpenFile
from unionfs.host.io_uring import LookupRing

log = logging.getLogger(__name__)

_COLD_WEIGHT: Final = 16  # so many reads from memory make up for one from the disk: reading ahead makes them fast
_ACTIVE_FROM: Final = 2 * _COLD_WEIGHT  # one slow read may be an accident
_MOST: Final = 4 * _COLD_WEIGHT


class CacheMisses:
    """Counts slow reads against fast ones."""

    __slots__ = ("_score",)

    def __init__(self) -> None:
        self._score = 0

    @property
    def is_cold(self) -> bool:
        """Whether the disk was waited for lately, so that reading ahead may save something."""
        return self._score >= _ACTIVE_FROM

    def record_latency(self, seconds: float, warm_s: float) -> None:
        """A read took ``seconds``; from memory it takes ``warm_s`` at most."""
        if seconds > warm_s:
            self._score = min(self._score + _COLD_WEIGHT, _MOST)
        elif self._score:
            self._score -= 1


_DIRECTORY_S: Final = 50e-6  # from memory it takes a third of it
_ENTRY_S: Final = 1e-6  # for each name in it
_BUSY_S: Final = 10e-3  # after the last that was wanted
_MANY: Final = 8  # directories to merge, for which it pays to have them read in the background
_WANTED_MAX: Final = 1024
_REMEMBERED_MAX: Final = 1024
_PATH_MAX: Final = 4096  # what the kernel takes at once; deeper directories are not read ahead
_NAME: Final = b"/.wh..wh..opq"  # to look up; a name that is hardly ever there, in a directory that is

Place = tuple[LayerDir, bytes]  # a directory of a layer


class DirectoryReadAhead(StackObserver):
    """What is wanted next, and whether the disk is slow enough to bother."""

    def __init__(self) -> None:
        self._misses = CacheMisses()
        self._asked: set[Place] = set()  # of late: what is wanted twice is read once
        self._wanted: deque[Place] = deque(maxlen=_WANTED_MAX)
        self._ring: LookupRing | None = None
        self._owner = 0  # the process that has the ring: a fork must not use it
        self._usable = True
        self._busy_until = 0.0
        self._started = 0.0

    @property
    def wants_more(self) -> bool:
        """Whether directories came from the disk lately."""
        return self._misses.is_cold and self._usable

    @property
    def busy(self) -> bool:
        """Whether something may be read in the background just now."""
        return time.monotonic() < self._busy_until

    def reads(self, stack: Sequence[LowerDir]) -> None:
        """All directories of ``stack`` are about to be read."""
        self._started = time.perf_counter()
        if len(stack) > _MANY and self.wants_more:
            self.will_be_read(stack[1:])

    def has_read(self, index: DirIndex) -> None:
        """They have been read."""
        self.record_latency(time.perf_counter() - self._started, index.depth, len(index.names))

    def will_be_read(self, directories: Sequence[LowerDir]) -> None:
        """These directories will probably be read next, the first ones first."""
        self.prefetch([(entry.layer, entry.path) for entry in directories])

    def record_latency(self, seconds: float, directories: int, names: int) -> None:
        """Reading ``directories`` with ``names`` in them took ``seconds``."""
        self._misses.record_latency(seconds, _DIRECTORY_S * directories + _ENTRY_S * names)

    def prefetch(self, places: Iterable[Place]) -> None:
        """Read these directories soon, the first ones first, before those that were wanted earlier."""
        new = [place for place in places if place not in self._asked and len(place[1]) + len(_NAME) < _PATH_MAX]
        if not new:
            return
        if len(self._asked) > _REMEMBERED_MAX:
            self._asked.clear()
        self._asked.update(new)
        self._wanted.extendleft(reversed(new))
        self._go_on()

    def _go_on(self) -> None:
        wanted = self._wanted
        try:
            ring = self._ring
            if ring is None or self._owner != os.getpid():
                ring = self._ring = LookupRing()
                self._owner = os.getpid()
            while wanted:
                layer, path = wanted[0]
                if not ring.add(layer.fd, path + _NAME):
                    break
                wanted.popleft()
            ring.submit()
            self._busy_until = time.monotonic() + _BUSY_S
        except OSError as error:
            log.debug("directories are not read ahead: %s", error)
            self._usable = False
            wanted.clear()

    def close(self) -> None:
        """Read nothing any more."""
        if self._ring is not None and self._owner == os.getpid():
            self._ring.close()
        self._ring = None
        self._usable = False


_WARM_S: Final = 40e-6  # for a small file that is in memory
_KEPT: Final = 16  # directories
_SKIPPED: Final = 16  # entries between two opens that may have been something else: directories, links, large files
_AHEAD: Final = 3  # files
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
        self._misses = CacheMisses()
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

    def record_latency(self, seconds: float) -> None:
        """Reading a small file took ``seconds``."""
        self._misses.record_latency(seconds, _WARM_S)

    def opened(self, inode: Inode) -> None:
        """A lower file is opened to be read: read those ahead that come after it, if it is their turn."""
        directory = inode.parent
        if directory is None or not self._misses.is_cold:
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
    if not isinstance(inode, FileInode) or inode.kind != stat.S_IFREG:
        return
    if inode.lower is None or inode.upper or inode.metacopy or inode.kernel.page_cache_primed:
        return
    layer, path = inode.lower
    with suppress(OSError):  # whoever opens or reads it is told
        fd = layer.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, _BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


log = logging.getLogger(__name__)

_SMALL_BYTES: Final = 128 * 1024  # what the kernel reads ahead at once


class EarlyPages(Observer):
    """Gives the kernel small files, and reads those ahead that come after one.

    Args:
        store: sends contents to the kernel, as those of an inode from its beginning on.
        read: fills a buffer from an offset of a descriptor and returns how many bytes there are; None where the disk
            would have to be waited for.
        inline_waits: says when it may be waited for; without it, ``read`` never waits.
        ahead: reads files ahead.
    """

    def __init__(
        self,
        store: Callable[[Inode, memoryview], None],
        read: Callable[[int, memoryview, int], int | None],
        inline_waits: InlineWaitPolicy | None = None,
        ahead: FileReadAhead | None = None,
    ) -> None:
        self._store = store
        self._read = read
        self._inline_waits = inline_waits
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
            or (self._inline_waits is not None and not self._inline_waits.may_wait())
        ):
            return
        start = time.perf_counter()
        try:
            size = size_to_give(file, flags)
            if size:
                self._give(file, size)
        except OSError as error:  # whoever reads gets the error, if it is still there
            log.debug("nothing of %#x is given to the kernel: %s", inode.ino, error)
        if self._inline_waits is not None:
            self._inline_waits.waited_since(start)

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
            self._ahead.record_latency(time.perf_counter() - start)
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
