"""Compressing a layer so that the same layer gives the same bytes each time.

zlib and not ISA-L, which unpacks here: ISA-L finds other matches on other processors, so that the digest of a layer
would depend on the machine that pushes it.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol, cast

import zstandard

from unionfs.archive.stream import PieceStream

_PIECE_BYTES = 1 << 20
_GZIP_LEVEL = 6
_GZIP_WINDOW = 15 + 16  # 16: with gzip's header, whose time zlib leaves 0
_ZSTD_LEVEL = 3


class LayerCompression(enum.Enum):
    """How layers are compressed; the value is the name for people and the suffix of the media type."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"

    @property
    def suffix(self) -> str:
        """Of an OCI media type."""
        return "" if self is LayerCompression.NONE else f"+{self.value}"


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def compressed(stream: BinaryIO, how: LayerCompression) -> BinaryIO:
    """``stream``, which is closed with the result, compressed while it is read."""
    if how is LayerCompression.NONE:
        return stream
    return cast(BinaryIO, PieceStream(_pieces(stream, how)))


def _pieces(stream: BinaryIO, how: LayerCompression) -> Iterator[bytes]:
    compressor: _Compressor
    if how is LayerCompression.GZIP:
        compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    else:
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    with stream:
        while piece := stream.read(_PIECE_BYTES):
            if out := compressor.compress(piece):
                yield out
        yield compressor.flush()
