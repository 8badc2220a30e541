"""From a tar-split record and the unpacked files back to the very bytes of the tar stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Protocol

from unionfs.archive.tar_format import show
from unionfs.archive.unpack import clean_name
from unionfs.errors import LayerDamagedError
from unionfs.layers.identity import ALGORITHM
from unionfs.layers.tar_split_format import FILE, Checksum, SplitEntry

_PIECE_BYTES = 1 << 20


class FileSource(Protocol):
    """Where the contents of files are (:class:`unionfs.drivers.contract.FileGetCloser`)."""

    def get(self, name: bytes) -> BinaryIO: ...


def assemble(entries: Iterable[SplitEntry], files: FileSource) -> Iterator[bytes]:
    """The tar stream, in pieces of at most a segment or 1 MiB.

    Args:
        entries: the record (:func:`unionfs.layers.tar_split_format.read_entries`).
        files: the tree that the stream was unpacked into.

    Raises:
        LayerDamagedError: a file is missing, or is not what it was. Pieces of it were given out by then.
        TarSplitError: the record is damaged.
    """
    for entry in entries:
        if entry.kind != FILE:
            yield entry.payload
        elif entry.size:
            yield from _contents(entry, files)


def _contents(entry: SplitEntry, files: FileSource) -> Iterator[bytes]:
    shown = show(entry.name)
    try:
        file = files.get(b"/".join(clean_name(entry.name)))
    except OSError as error:
        raise LayerDamagedError(
            f'file integrity checksum failed for "{shown}": the file is not there any more ({error.strerror}); '
            "pull or register the layer again"
        ) from error
    checksum = Checksum()
    size = 0
    with file:
        # One byte more than there should be, so that a file that grew is noticed before it is given out whole.
        while size <= entry.size and (piece := file.read(min(_PIECE_BYTES, entry.size + 1 - size))):
            size += len(piece)
            checksum.update(piece)
            yield piece
    if size != entry.size or checksum.digest() != entry.payload:
        raise LayerDamagedError(
            f'file integrity checksum failed for "{shown}": its contents were changed in the layer store; '
            "pull or register the layer again"
        )


def verified(pieces: Iterable[bytes], diff_id: str) -> Iterator[bytes]:
    """``pieces``, with an error at the end if their digest is not ``diff_id``.

    Raises:
        LayerDamagedError: after the last piece.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if f"{ALGORITHM}:{digest.hexdigest()}" != diff_id:
        raise LayerDamagedError(
            f"could not verify layer data for: {diff_id}. This may be because internal files in the layer store were "
            "modified. Re-pulling or rebuilding this image may resolve the issue"
        )
