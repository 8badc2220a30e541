"""From a tar stream to its tar-split record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unionfs.archive.tar_reader import Readable, TarReader
from unionfs.layers.payloads import PayloadTracker
from unionfs.layers.tar_split_format import Checksum, EntryWriter

_SEGMENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Disassembled:
    """What came of it.

    Attributes:
        entries: how many entries the stream has.
        lost: numbers of entries that the record names as files although their contents are gone from the tree, because
            a later entry replaced them. If there are any, the record must be made again with them in ``embed``.
    """

    entries: int
    lost: frozenset[int]


def disassemble(
    stream: Readable, write: Callable[[bytes], object], *, embed: frozenset[int] = frozenset()
) -> Disassembled:
    """Read a tar stream to its end and write its record: everything but the contents of files.

    Memory does not grow with what the stream holds, only with the number of its names.

    Args:
        stream: the archive, uncompressed.
        write: gets the record, uncompressed.
        embed: numbers of entries whose contents go into the record, see :class:`Disassembled`.

    Raises:
        ArchiveError: the archive is damaged or hostile.
    """
    entries = EntryWriter(write)
    segment = _Segment(entries)
    reader = TarReader(stream, raw=segment.add)
    tracker = PayloadTracker(embed)
    index = -1
    for entry in reader:
        index += 1
        if tracker.must_embed(index, entry):
            for piece in reader.contents():
                segment.add(piece)
            continue
        segment.flush()
        checksum = Checksum()
        for piece in reader.contents():
            checksum.update(piece)
        entries.file(entry.name, entry.stored_size, checksum.digest())
    segment.flush()
    reader.drain()
    segment.flush()
    entries.end()
    return Disassembled(index + 1, frozenset(tracker.late))


class _Segment:
    """Collects bytes that stand in the record as they are."""

    def __init__(self, entries: EntryWriter) -> None:
        self._entries = entries
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        while self._size + len(piece) > _SEGMENT_BYTES:
            fits = _SEGMENT_BYTES - self._size
            self._pieces.append(piece[:fits])
            piece = piece[fits:]
            self.flush()
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)

    def flush(self) -> None:
        self._entries.segment(b"".join(self._pieces))
        self._pieces = []
        self._size = 0
