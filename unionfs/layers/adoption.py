"""The stream of a tree that is in a driver already, and its record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from unionfs.archive.stream import PieceStream
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver
from unionfs.drivers.files import file_getter
from unionfs.layers.assemble import assemble
from unionfs.layers.disassemble import disassemble
from unionfs.layers.identity import ALGORITHM, DiffID
from unionfs.layers.metadata import Transaction
from unionfs.layers.tar_split_format import FILE, EntryWriter, SplitEntry, read_entries

_PIECE_BYTES = 1 << 20


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
