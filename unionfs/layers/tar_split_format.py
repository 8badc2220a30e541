"""tar-split's entries and their lines: a recorded tar stream without the contents of its files.

One JSON object a line. Type 2 is a segment: bytes of the stream as they are (headers, padding, the end). Type 1 is a
file: its name, its size, and the checksum of contents that lie elsewhere. Docker keeps one such record for each layer,
as ``tar-split.json.gz``. Source: github.com/vbatts/tar-split, ``tar/storage``; spec appendix A.
"""

from __future__ import annotations

import binascii
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from fastcrc import crc64

from unionfs.archive.tar_reader import Readable
from unionfs.errors import TarSplitError

FILE = 1
SEGMENT = 2

_PIECE_BYTES = 1 << 18
# Old versions of tar-split wrote whatever followed an archive as one segment, so lines may be long; but a line that
# takes the machine's memory is an attack (CVE-2017-14992).
_MAX_LINE_BYTES = 1 << 28

# Go's JSON encoder writes these so that the text can stand in HTML; doing the same gives the same record.
_GO_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class SplitEntry:
    """One line.

    Attributes:
        kind: :data:`FILE` or :data:`SEGMENT`.
        payload: a segment's bytes, or the eight bytes of a file's checksum; empty for a file without contents.
        name: a file's name as in its header.
        size: a file's length in bytes.
    """

    kind: int
    payload: bytes = b""
    name: bytes = b""
    size: int = 0


class Checksum:
    """CRC-64 with the ISO 3309 polynomial, as Go's ``hash/crc64`` computes it."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = crc64.go_iso(data, self._value)

    def digest(self) -> bytes:
        """The checksum of everything so far, most significant byte first."""
        return self._value.to_bytes(8, "big")


class EntryWriter:
    """Writes entries as lines, numbering them.

    Args:
        write: gets the encoded lines.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._position = 0

    def segment(self, payload: bytes) -> None:
        """Record bytes of the stream as they are; nothing for none."""
        if payload:
            self._line(b'{"type":2,"payload":"%s"' % _base64(payload))

    def file(self, name: bytes, size: int, checksum: bytes) -> None:
        """Record that the contents of ``name`` follow here: ``size`` bytes, with this checksum."""
        try:
            shown = b'"name":%s' % encode_basestring(name.decode()).translate(_GO_ESCAPES).encode()
        except UnicodeDecodeError:
            shown = b'"name_raw":"%s"' % _base64(name)
        if not name:
            shown = b""
        middle = b',"size":%d,"payload":"%s"' % (size, _base64(checksum)) if size else b',"payload":null'
        self._line(b'{"type":1%s%s%s' % (b"," if shown else b"", shown, middle))

    def end(self) -> None:
        """End the record. Of a stream without a single byte tar-split records one segment without any."""
        if not self._position:
            self._line(b'{"type":2,"payload":""')

    def _line(self, start: bytes) -> None:
        self._write(b'%s,"position":%d}\n' % (start, self._position))
        self._position += 1


def _base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)


def read_entries(stream: Readable, where: str) -> Iterator[SplitEntry]:
    """The entries of a record, gzip or plain.

    Args:
        stream: the record, from its start.
        where: the file's name for messages.

    Raises:
        TarSplitError: while iterating, when the record is damaged or cut off.
    """
    position = 0
    for line in _lines(_unzipped(stream, where), where):
        if not line.strip():
            continue
        entry, number = _decode(line, where)
        if number != position:
            raise _damaged(where, f"entry {position} has the number {number}")
        position += 1
        yield entry


def _decode(line: bytes, where: str) -> tuple[SplitEntry, int]:
    try:
        fields: dict[str, Any] = json.loads(line)
        kind = fields["type"]
        payload = binascii.a2b_base64(fields.get("payload") or "", strict_mode=True)
        raw = fields.get("name_raw")
        name = binascii.a2b_base64(raw, strict_mode=True) if raw else fields.get("name", "").encode()
        size, position = fields.get("size", 0), fields.get("position", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(where, f"a line is not an entry ({error})") from error
    if kind not in (FILE, SEGMENT) or not isinstance(size, int) or size < 0 or not isinstance(position, int):
        raise _damaged(where, "a line has values out of range")
    if kind == FILE and size and len(payload) != 8:
        raise _damaged(where, "a file has no checksum")
    return SplitEntry(kind, payload, name, size), position


def _unzipped(stream: Readable, where: str) -> Iterator[bytes]:
    first = stream.read(_PIECE_BYTES) or b""
    if not first:
        raise _damaged(where, "it is empty")
    if not first.startswith(b"\x1f\x8b"):
        while first:
            yield first
            first = stream.read(_PIECE_BYTES) or b""
        return
    decompressor = zlib.decompressobj(wbits=31)
    data = first
    while data:
        try:
            piece = decompressor.decompress(data, _PIECE_BYTES)
        except zlib.error as error:
            raise _damaged(where, str(error)) from error
        if piece:
            yield piece
        data = decompressor.unconsumed_tail or stream.read(_PIECE_BYTES) or b""
        if decompressor.eof:
            return
    if not decompressor.eof:
        raise _damaged(where, "it is cut off")


def _lines(pieces: Iterable[bytes], where: str) -> Iterator[bytes]:
    begun: list[bytes] = []
    size = 0
    for piece in pieces:
        head, *rest = piece.split(b"\n")
        begun.append(head)
        size += len(head)
        if size > _MAX_LINE_BYTES:
            raise _damaged(where, "a line is longer than 256 MiB")
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
            size = len(rest[-1])
    yield b"".join(begun)


def _damaged(where: str, what: str) -> TarSplitError:
    return TarSplitError(f"{where}: the tar-split record is damaged: {what}; remove the layer and register it again")
