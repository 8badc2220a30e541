"""Opening compressed archives: which compression a stream has, and a reader of what is inside.

Memory stays bounded whatever the stream says: output is asked for in pieces, so a small input cannot expand at
once, and what the dictionary of a frame may need is limited.

gzip is read with ISA-L (``isal``), about three times as fast as zlib, and is what nearly all layers are; zstd with
``zstandard``. xz and bzip2 are rare here, the standard library's modules do. Magic numbers: RFC 1952, RFC 8878, the
.xz format specification, bzip2's header.
"""

from __future__ import annotations

import bz2
import enum
import io
import lzma
from collections.abc import Callable
from typing import Protocol, cast

import zstandard
from isal import igzip, isal_zlib

from unionfs.archive.tar_reader import Readable
from unionfs.errors import ArchiveError

_PIECE_BYTES = 1 << 18
_MAGIC_BYTES = 10
# ``zstd --long=27`` and ``xz -9`` fit; more would let an archive take the machine's memory.
_MAX_WINDOW_BYTES = 1 << 27
# A block of 4 bytes can stand for 128 KiB, and a step's output comes at once: 16 MiB at the worst.
_ZSTD_STEP_BYTES = 1 << 9
_MAX_XZ_MEMORY_BYTES = 1 << 28


class Compression(enum.Enum):
    """How a stream is compressed; the value is the name for people."""

    NONE = "plain"
    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    ZSTD = "zstd"


_BZIP2_BLOCK = bytes.fromhex("314159265359")
_BZIP2_END = bytes.fromhex("177245385090")  # of a stream without any block


def detect(start: bytes) -> Compression:
    """The compression of a stream that starts with ``start`` (10 bytes are enough)."""
    if start.startswith(b"\x1f\x8b\x08"):
        return Compression.GZIP
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return Compression.ZSTD
    # A zstd stream may begin with a skippable frame: 0x184D2A50 to 0x184D2A5F, little-endian.
    if len(start) >= 4 and start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:
        return Compression.ZSTD
    if start.startswith(b"\xfd7zXZ\0"):
        return Compression.XZ
    # With the block after it: a plain archive may well begin with a file whose name starts with BZh.
    if start[:3] == b"BZh" and start[4:10] in (_BZIP2_BLOCK, _BZIP2_END):
        return Compression.BZIP2
    return Compression.NONE


def open_archive(stream: Readable) -> tuple[Compression, io.BufferedReader]:
    """Recognise the compression of ``stream`` and return a reader of its uncompressed contents.

    Args:
        stream: read from its current position on; it is not closed, and need not be seekable.

    Returns:
        The compression found, and a reader that raises :class:`ArchiveError` for damaged or cut off data.
    """
    start = b""
    while len(start) < _MAGIC_BYTES and (piece := stream.read(_MAGIC_BYTES - len(start))):
        start += piece
    kind = detect(start)
    whole = _Rejoined(start, stream)
    raw: io.RawIOBase = whole if kind is Compression.NONE else _Checked(kind, _opened(kind, whole))
    return kind, io.BufferedReader(raw, _PIECE_BYTES)


class _Rejoined(io.RawIOBase):
    """A stream with the bytes that were looked at put back in front."""

    def __init__(self, start: bytes, stream: Readable) -> None:
        super().__init__()
        self._start = start
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._start:
            piece, self._start = self._start[: len(buffer)], self._start[len(buffer) :]
        else:
            piece = self._stream.read(len(buffer)) or b""
        buffer[: len(piece)] = piece
        return len(piece)


class _Sized(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _opened(kind: Compression, stream: io.RawIOBase) -> _Sized:
    if kind is Compression.GZIP:
        return _IGZIP_FILE(fileobj=io.BufferedReader(stream, _PIECE_BYTES), mode="rb")
    if kind is Compression.ZSTD:
        return _WholeFrames(stream)
    if kind is Compression.XZ:
        return _Stepwise(stream, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY_BYTES))
    return _Stepwise(stream, bz2.BZ2Decompressor)


# The library's own type information leaves these two open.
_IGZIP_FILE = cast(Callable[..., _Sized], igzip.IGzipFile)
_ISAL_ERROR = cast(type[Exception], isal_zlib.error)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Stepwise:
    """One or more compressed streams end to end, through a standard library decompressor."""

    def __init__(self, stream: io.RawIOBase, new: Callable[[], _Decompressor]) -> None:
        self._stream = stream
        self._new = new
        self._current: _Decompressor | None = new()

    def read(self, size: int, /) -> bytes:
        while self._current is not None:
            if self._current.eof:
                # .xz allows zeros between streams and after the last.
                rest = self._current.unused_data.lstrip(b"\0")
                while not rest and (piece := self._stream.read(_PIECE_BYTES)):
                    rest = piece.lstrip(b"\0")
                self._current = self._new() if rest else None
                if self._current is None:
                    break
                found = self._current.decompress(rest, size)
            else:
                fresh = self._stream.read(_PIECE_BYTES) or b"" if self._current.needs_input else b""
                if self._current.needs_input and not fresh:
                    raise EOFError("it is cut off")
                found = self._current.decompress(fresh, size)
            if found:
                return found
        return b""


class _WholeFrames:
    """zstd frames end to end.

    The library's stream reader takes a cut off frame for a short one, so each frame is followed to its end here.
    """

    def __init__(self, stream: io.RawIOBase) -> None:
        self._stream = stream
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._at = 0
        self._output = b""
        self._given = 0

    def read(self, size: int, /) -> bytes:
        while self._given == len(self._output):
            if not self._more():
                return b""
        piece = self._output[self._given : self._given + size]
        self._given += len(piece)
        return piece

    def _more(self) -> bool:
        """Decompress the next step into the output, which may stay empty; False at the end."""
        if self._at == len(self._input):
            self._input = self._stream.read(_PIECE_BYTES) or b""
            self._at = 0
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends inside of a frame")
                return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        step = self._input[self._at : self._at + _ZSTD_STEP_BYTES]
        self._output = self._frame.decompress(step)
        self._given = 0
        self._at += len(step)
        if self._frame.eof:
            self._at -= len(self._frame.unused_data)
            self._frame = None
        return True


class _Checked(io.RawIOBase):
    """Turns what the libraries raise into an error for people."""

    def __init__(self, kind: Compression, inner: _Sized) -> None:
        super().__init__()
        self._kind = kind
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            piece = self._inner.read(len(buffer))
        except (EOFError, lzma.LZMAError, zstandard.ZstdError, _ISAL_ERROR, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # reading the stream itself failed
            raise ArchiveError(
                f"the {self._kind.value} stream is damaged or cut off: {error}; fetch or make it again"
            ) from error
        buffer[: len(piece)] = piece
        return len(piece)
