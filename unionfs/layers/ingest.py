"""The stream of a layer on its way in: decompressed, hashed, recorded and unpacked, all at the same time.

One thread each reads and decompresses, hashes, and makes the tar-split record; the caller's unpacks. The heavy parts
of all four run outside of Python's lock. At most a few MiB wait between them, whatever the layer's size. The stream of
a tree that is in a driver already is read here too (:func:`read_tree`).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from unionfs.archive.compression import open_archive
from unionfs.archive.stream import PieceStream
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver, FileGetCloser
from unionfs.drivers.files import file_getter
from unionfs.errors import LayerStoreError
from unionfs.layers.identity import ALGORITHM, DiffID
from unionfs.layers.metadata import TarSplitWriter, Transaction
from unionfs.layers.tar_split import (
    FILE,
    Disassembled,
    EntryWriter,
    SplitEntry,
    assemble,
    disassemble,
    gone_from,
    read_entries,
)


class StoppedError(Exception):
    """Another thread failed, and its error is the one to tell."""


class Broadcast:
    """Pieces that one thread puts and every reader gets.

    Args:
        readers: how many readers there are; the slowest one sets the pace.
        depth: how many pieces may wait for the slowest reader.
    """

    def __init__(self, readers: int, depth: int) -> None:
        self._depth = depth
        self._pieces: deque[bytes] = deque()
        self._first = 0  # the number of the oldest piece that is still kept
        self._positions: list[int | None] = [0] * readers
        self._finished = False
        self._stopped = False
        self._changed = threading.Condition()
        self.readers = [PieceReader(self, index) for index in range(readers)]

    def put(self, piece: bytes) -> None:
        """Hand out a piece, which is not empty; waits while the slowest reader is too far behind.

        Raises:
            StoppedError: nobody wants it any more.
        """
        with self._changed:
            while len(self._pieces) >= self._depth and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise StoppedError
            self._pieces.append(piece)
            self._changed.notify_all()

    def finish(self) -> None:
        """There are no more pieces."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake everybody up and give nothing out any more."""
        with self._changed:
            self._stopped = True
            self._pieces.clear()
            self._changed.notify_all()

    def take(self, reader: int) -> bytes:
        """The reader's next piece; empty at the end."""
        with self._changed:
            position = self._positions[reader]
            assert position is not None, "the reader was closed"
            while not self._stopped and position == self._first + len(self._pieces) and not self._finished:
                self._changed.wait()
            if self._stopped:
                raise StoppedError
            if position == self._first + len(self._pieces):
                return b""
            piece = self._pieces[position - self._first]
            self._positions[reader] = position + 1
            self._drop()
            return piece

    def close(self, reader: int) -> None:
        """The reader wants nothing more, and holds nobody up."""
        with self._changed:
            self._positions[reader] = None
            self._drop()

    def _drop(self) -> None:
        """Forget what all readers have."""
        wanted = [position for position in self._positions if position is not None]
        oldest = min(wanted) if wanted else self._first + len(self._pieces)
        if oldest > self._first:
            while self._first < oldest and self._pieces:
                self._pieces.popleft()
                self._first += 1
            self._changed.notify_all()


class PieceReader:
    """One reader's end: a binary stream (:class:`unionfs.archive.tar_reader.Readable`)."""

    def __init__(self, source: Broadcast, index: int) -> None:
        self._source = source
        self._index = index
        self._left = b""

    def read(self, size: int, /) -> bytes:
        """Between 1 and ``size`` bytes; none at the end. Raises :class:`StoppedError` when another thread failed."""
        piece = self._left or self._source.take(self._index)
        self._left = piece[size:]
        return piece[:size] if self._left else piece

    def close(self) -> None:
        """Read nothing more."""
        self._left = b""
        self._source.close(self._index)


_PIECE_BYTES = 1 << 19
_DEPTH = 8

Progress = Callable[[int], None]
"""Called now and then with how many bytes of the uncompressed stream were read so far; on another thread."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What came of a stream.

    Attributes:
        diff_id: the digest of all its bytes, uncompressed.
        length: how many those are.
        size: the layer's size in bytes, as the driver counted it.
    """

    diff_id: DiffID
    length: int
    size: int


class ReplayableStream:
    """A stream that can be read a second time: rewound if it can be, otherwise copied aside as it is read.

    Args:
        stream: read from its current position on; not closed.
        spool: makes the temporary file for the copy, which is of the compressed bytes.
    """

    def __init__(self, stream: Readable, spool: Callable[[], BinaryIO]) -> None:
        self._stream = stream
        self._start = _position(stream)
        self._copy = spool() if self._start is None else None

    def read(self, size: int, /) -> bytes:
        """See :class:`Readable`."""
        piece = self._stream.read(size) or b""
        if self._copy is not None and piece:
            self._copy.write(piece)
        return piece

    def again(self) -> Readable:
        """The stream from its beginning."""
        if self._copy is not None:
            self._copy.seek(0)
            return self._copy
        assert self._start is not None
        self._stream.seek(self._start)  # type: ignore[attr-defined]
        return self._stream

    def close(self) -> None:
        """Drop the copy."""
        if self._copy is not None:
            self._copy.close()


def _position(stream: Readable) -> int | None:
    """Where the stream stands, if it can be put back there."""
    try:
        if stream.seekable():  # type: ignore[attr-defined]
            return int(stream.tell())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        pass
    return None


def ingest(
    stream: Readable,
    apply: Callable[[Readable], int],
    new_record: Callable[[], TarSplitWriter] | None,
    spool: Callable[[], BinaryIO],
    progress: Progress | None = None,
    tree: Callable[[], FileGetCloser] | None = None,
) -> Ingested:
    """Take in a layer.

    Args:
        stream: the archive, compressed or not; read to its end, not closed.
        apply: unpacks the uncompressed stream it is given, and returns the layer's size in bytes.
        new_record: opens the tar-split record, empty each time; None when none is needed.
        spool: see :class:`ReplayableStream`.
        progress: see :data:`Progress`.
        tree: opens what ``apply`` has unpacked over another layer; None where there is none below.

    Raises:
        ArchiveError: the archive is damaged or hostile.
        OSError: reading or writing failed.
    """
    replayable = ReplayableStream(stream, spool) if new_record is not None else None
    try:
        run = _Run(replayable or stream, apply, new_record, progress, has_parent=tree is not None)
        result = run.run()
        lost = run.split.lost
        if tree is not None and run.split.unsure:
            with contextlib.closing(tree()) as files:
                lost |= gone_from(files, run.split.unsure)
        if lost:
            # A later entry replaced the contents of an earlier one, which the record must hold then.
            assert replayable is not None
            assert new_record is not None
            _record_again(replayable.again(), new_record, lost, result.diff_id)
        return result
    finally:
        if replayable is not None:
            replayable.close()


def _record_again(
    stream: Readable, new_record: Callable[[], TarSplitWriter], lost: frozenset[int], diff_id: DiffID
) -> None:
    _, plain = open_archive(stream)
    hashing = _Hashing(plain)
    record = new_record()
    try:
        found = disassemble(hashing, record.write, embed=lost)
    finally:
        record.close()
    if found.lost or hashing.diff_id() != diff_id:
        raise LayerStoreError("the layer's stream gave other bytes when it was read again; register it from a copy")


class _Hashing:
    """A stream that knows the digest of what was read from it."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size) or b""
        self._digest.update(piece)
        return piece

    def diff_id(self) -> DiffID:
        return DiffID(f"{ALGORITHM}:{self._digest.hexdigest()}")


class _Run:
    """The threads of one layer, and the first error of any of them."""

    def __init__(
        self,
        stream: Readable,
        apply: Callable[[Readable], int],
        new_record: Callable[[], TarSplitWriter] | None,
        progress: Progress | None,
        *,
        has_parent: bool,
    ) -> None:
        self._has_parent = has_parent
        self._stream = stream
        self._apply = apply
        self._new_record = new_record
        self._progress = progress
        self._pieces = Broadcast(2 if new_record is None else 3, _DEPTH)
        self._errors: list[BaseException] = []
        self._digest = hashlib.sha256()
        self._length = 0
        self.split = Disassembled(0, frozenset())

    def run(self) -> Ingested:
        tasks = [self._read, self._hash, *([self._split] if self._new_record is not None else [])]
        threads = [threading.Thread(target=self._guard, args=(task,), name=f"layer{task.__name__}") for task in tasks]
        size = 0
        reader = self._pieces.readers[0]
        for thread in threads:
            thread.start()
        try:
            size = self._apply(reader)
            # The digest covers what follows the archive too, should the driver leave that unread.
            while reader.read(_PIECE_BYTES):
                pass
        except BaseException as error:
            self._failed(error)
        finally:
            reader.close()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return Ingested(DiffID(f"{ALGORITHM}:{self._digest.hexdigest()}"), self._length, size)

    def _guard(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, StoppedError) and all(error is not known for known in self._errors):
            self._errors.append(error)
        self._pieces.stop()

    def _read(self) -> None:
        _, plain = open_archive(self._stream)
        while piece := plain.read1(_PIECE_BYTES):
            self._pieces.put(piece)
        self._pieces.finish()

    def _hash(self) -> None:
        reader = self._pieces.readers[1]
        while piece := reader.read(_PIECE_BYTES):
            self._digest.update(piece)
            self._length += len(piece)
            if self._progress is not None:
                self._progress(self._length)

    def _split(self) -> None:
        assert self._new_record is not None
        record = self._new_record()
        try:
            self.split = disassemble(self._pieces.readers[2], record.write, has_parent=self._has_parent)
        finally:
            record.close()


def read_tree(driver: Driver, tree: str, parent: str, record: Readable | None, transaction: Transaction) -> DiffID:
    """Find the digest of a tree's stream, and write the record of it into ``transaction``.

    Args:
        driver: has the tree.
        tree, parent: the driver's ids of it and of the one below.
        record: of the stream it was unpacked from; None: the driver's ``diff`` is the stream.
        transaction: gets the record.

    Raises:
        LayerDamagedError: the tree is not what the record is of.
    """
    digest = hashlib.sha256()

    def hashed(pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    writer = transaction.tar_split_writer()
    try:
        if record is None:
            with driver.diff(tree, parent) as stream:
                pieces = iter(lambda: stream.read(_PIECE_BYTES), b"")
                disassemble(PieceStream(hashed(pieces)), writer.write)  # what a driver makes has no name twice
        else:
            files = file_getter(driver, tree)
            try:
                for _ in hashed(assemble(_copied(record, EntryWriter(writer.write)), files)):
                    pass
            finally:
                files.close()
    finally:
        writer.close()
    return DiffID(f"{ALGORITHM}:{digest.hexdigest()}")


def _copied(record: Readable, writer: EntryWriter) -> Iterator[SplitEntry]:
    for entry in read_entries(record, "the given tar-split record"):
        if entry.kind == FILE:
            writer.file(entry.name, entry.size, entry.payload)
        else:
            writer.segment(entry.payload)
        yield entry
