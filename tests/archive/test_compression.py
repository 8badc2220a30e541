"""Opening compressed archives: recognition, whole and damaged streams, bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.archive.tars import archive, entry
from unionfs.archive.compression import Compression, detect, open_archive
from unionfs.archive.unpacking import unpack
from unionfs.errors import ArchiveError

COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.GZIP: lambda data: gzip.compress(data, 1),
    Compression.BZIP2: lambda data: bz2.compress(data, 1),
    Compression.XZ: lambda data: lzma.compress(data, preset=0),
    Compression.ZSTD: lambda data: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
}
CONTENTS = archive(entry("random", os.urandom(400_000)), entry("zeros", bytes(3_000_000)), entry("end", b"x"))


class Trickle:
    """At most three bytes at a time, and no seeking."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self.stream.read(min(size, 3))


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_round_trip(kind: Compression) -> None:
    found, reader = open_archive(io.BytesIO(COMPRESSORS[kind](CONTENTS)))
    assert found is kind
    assert reader.read() == CONTENTS


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_several_streams_end_to_end(kind: Compression) -> None:
    compress = COMPRESSORS[kind]
    _, reader = open_archive(io.BytesIO(compress(b"one ") + compress(b"") + compress(b"two")))
    assert reader.read() == b"one two"


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_slow_stream(kind: Compression) -> None:
    found, reader = open_archive(Trickle(COMPRESSORS[kind](b"contents" * 100)))
    assert found is kind
    assert reader.read() == b"contents" * 100


def test_plain_and_empty(tmp_path: Path) -> None:
    found, reader = open_archive(Trickle(CONTENTS[:5000]))
    assert found is Compression.NONE
    assert reader.read() == CONTENTS[:5000]
    for short in (b"", b"\x1f", b"BZ"):
        found, reader = open_archive(io.BytesIO(short))
        assert (found, reader.read()) == (Compression.NONE, short)


def test_a_plain_archive_whose_first_name_looks_like_bzip2(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    (tmp_path / "BZh9 notes").write_text("plain")
    subprocess.run(["tar", "-cf", archive, "-C", tmp_path, "BZh9 notes"], check=True)
    assert detect(archive.read_bytes()[:512]) is Compression.NONE
    assert detect(bz2.compress(b"x")) is Compression.BZIP2
    assert detect(bz2.compress(b"")) is Compression.BZIP2


def test_zstd_stream_that_begins_with_a_skippable_frame() -> None:
    for low in range(16):
        frame = bytes([0x50 + low]) + b"\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
        found, reader = open_archive(io.BytesIO(frame + COMPRESSORS[Compression.ZSTD](b"contents")))
        assert (found, reader.read()) == (Compression.ZSTD, b"contents")
    assert detect(b"\x60\x2a\x4d\x18") is Compression.NONE


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("cut", [1, 4, 9, 1000])
def test_cut_off_stream(kind: Compression, cut: int) -> None:
    _, reader = open_archive(io.BytesIO(COMPRESSORS[kind](CONTENTS)[:-cut]))
    with pytest.raises(ArchiveError, match=rf"{kind.value} stream is damaged or cut off"):
        reader.read()


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_damaged_stream(kind: Compression) -> None:
    data = bytearray(COMPRESSORS[kind](CONTENTS))
    for at in range(len(data) // 2, len(data) // 2 + 64):
        data[at] ^= 0x5A
    _, reader = open_archive(io.BytesIO(bytes(data)))
    with pytest.raises(ArchiveError, match=rf"{kind.value} stream is damaged or cut off"):
        reader.read()


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_what_expands_enormously_needs_little_memory(kind: Compression) -> None:
    bomb = COMPRESSORS[kind](bytes(100 << 20))
    tracemalloc.start()
    try:
        _, reader = open_archive(io.BytesIO(bomb))
        total = 0
        while piece := reader.read(1 << 16):
            total += len(piece)
        assert total == 100 << 20
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


def test_window_and_dictionary_are_limited() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    big = compressor.compress(os.urandom(1 << 20)) + compressor.flush()
    _, reader = open_archive(io.BytesIO(big))
    with pytest.raises(ArchiveError, match="zstd"):
        reader.read()
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29, "preset": 0}]
    _, reader = open_archive(io.BytesIO(lzma.compress(b"x" * 1000, filters=filters)))
    with pytest.raises(ArchiveError, match=r"xz.*[Mm]emory"):
        reader.read()


def test_error_of_the_stream_itself_passes() -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        open_archive(Broken())


def test_unpacking_a_compressed_archive(tmp_path: Path) -> None:
    unpack(open_archive(io.BytesIO(gzip.compress(CONTENTS, 1)))[1], str(tmp_path))
    assert (tmp_path / "zeros").stat().st_size == 3_000_000
