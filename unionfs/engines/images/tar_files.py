"""The files in a tar archive, to be read in any order, without unpacking and without trusting it."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

from unionfs.archive.compression import Compression, open_archive
from unionfs.archive.tar_format import BLOCK_BYTES, HARD_LINK, REGULAR, SYMLINK
from unionfs.archive.tar_reader import Readable, TarReader
from unionfs.errors import ArchiveError, ImageFormatError

_HEADER_PIECE_BYTES = 2048
_PIECE_BYTES = 1 << 20
_MAX_MEMBERS = 10_000  # an image has two per layer
_MAX_LINKS = 10


class Region(io.RawIOBase):
    """A part of a file as a file; several of one file do not disturb each other.

    Args:
        fd: stays open as long as the regions are used, and is not closed.
        start, size: in bytes.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        super().__init__()
        self._fd = fd
        self._start = start
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        piece = os.pread(self._fd, wanted, self._start + self._at)
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


@dataclass(frozen=True, slots=True)
class _Member:
    start: int = 0
    size: int = 0
    target: str = ""  # of a link, from the top of the archive


class TarFiles:
    """Regular files of an uncompressed archive.

    Args:
        file: seekable; stays open as long as this is used, and is not closed.

    Raises:
        ArchiveError: it is damaged, or no tar archive.
        ImageFormatError: it has more entries than any image.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._fd = file.fileno()
        self._members: dict[str, _Member] = {}
        total = os.fstat(self._fd).st_size
        at = 0
        seen = 0
        while at < total:
            header = _Counter()
            # A reader of its own for each entry: so the contents are passed over and not read.
            entry = TarReader(_SmallReads(Region(self._fd, at, total - at)), header).next()
            if entry is None:
                break
            seen += 1
            if seen > _MAX_MEMBERS:
                raise ImageFormatError(f"the archive has more than {_MAX_MEMBERS} entries; no image has")
            start = at + header.total
            name = _clean(os.fsdecode(entry.name))
            if entry.kind == REGULAR and entry.stored_size == entry.size:
                if start + entry.stored_size > total:
                    raise ArchiveError(f"the archive is cut off in {name[:100]!r}; fetch or make it again")
                self._members[name] = _Member(start, entry.size)
            elif entry.kind == SYMLINK:
                link = posixpath.join(posixpath.dirname(name), os.fsdecode(entry.linkname))
                self._members[name] = _Member(target=_clean(link))
            elif entry.kind == HARD_LINK:
                self._members[name] = _Member(target=_clean(os.fsdecode(entry.linkname)))
            at = start + entry.stored_size + -entry.stored_size % BLOCK_BYTES

    def __contains__(self, name: str) -> bool:
        return _clean(name) in self._members

    def open(self, name: str) -> BinaryIO:
        """The file ``name``; links are followed in the archive, whose top is their root.

        Raises:
            ImageFormatError: there is none.
        """
        member = self._member(name)
        return cast(BinaryIO, io.BufferedReader(Region(self._fd, member.start, member.size), _PIECE_BYTES))

    def size(self, name: str) -> int:
        """Its size in bytes; raises as :meth:`open`."""
        return self._member(name).size

    def read(self, name: str, limit: int) -> bytes:
        """All of a file of at most ``limit`` bytes; raises as :meth:`open`."""
        return read_limited(self.open, self.size(name), name, limit)

    def _member(self, name: str) -> _Member:
        path = _clean(name)
        for _ in range(_MAX_LINKS):
            found = self._members.get(path)
            if found is not None and not found.target:
                return found
            link, rest = self._first_link(path)
            if link is None:
                break
            path = _clean(posixpath.join(link.target, rest))
        raise ImageFormatError(f"the archive has no file {name[:200]!r}; it is incomplete or none of an image")

    def _first_link(self, path: str) -> tuple[_Member | None, str]:
        """The first link on the way to ``path``, which may be a directory's, and what follows it."""
        parts = path.split("/")
        for number in range(1, len(parts) + 1):
            found = self._members.get("/".join(parts[:number]))
            if found is not None and found.target:
                return found, "/".join(parts[number:])
        return None, ""


def read_limited(opener: Callable[[str], BinaryIO], size: int, name: str, limit: int) -> bytes:
    """A file that must not be large.

    Raises:
        ImageFormatError: it is.
    """
    if size > limit:
        raise ImageFormatError(f"{name[:200]} has {size} bytes, where {limit} are the most")
    with opener(name) as file:
        return file.read(limit)


def plain_file(file: BinaryIO, spool: Callable[[], BinaryIO]) -> BinaryIO:
    """``file`` itself, if it can be read in any order and is not compressed; otherwise an uncompressed copy.

    Args:
        file: an archive, from its start; a stream without a descriptor is copied too.
        spool: makes a temporary file.

    Raises:
        ArchiveError: the compressed data is damaged.
    """
    kind, plain = open_archive(file)
    if kind is Compression.NONE and file.seekable() and _has_descriptor(file):
        return file
    copy = spool()
    try:
        while piece := plain.read1(_PIECE_BYTES):
            copy.write(piece)
        copy.flush()
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _has_descriptor(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:
        return False


def _clean(name: str) -> str:
    """A path from the top of the archive, above which no ``..`` leads: as if it were unpacked and that the root."""
    return posixpath.normpath(f"/{name}").lstrip("/")


class _Counter:
    """Adds up what it is given."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, piece: bytes) -> None:
        self.total += len(piece)


class _SmallReads:
    """Does not read far beyond a header."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, _HEADER_PIECE_BYTES)) or b""
