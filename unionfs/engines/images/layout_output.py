"""Where the files of an OCI image layout are written: a tar archive or a directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable
from typing import BinaryIO, Protocol

from unionfs.layers.identity import ALGORITHM, digits_of

_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 512
_RECORD_BYTES = 10240  # what tar fills up to


class Output(Protocol):
    """Takes the files of a layout."""

    def add(self, name: str, contents: bytes) -> None:
        """A small file."""

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """A large one, named by its digest; that, and its size in bytes."""


class TarOutput:
    """A tar archive, each of whose bytes follows from what is in it.

    Args:
        file: where it goes.
        spool: makes a temporary file.
        rewritable: ``file`` is a new one that can be written in any order. Otherwise blobs are copied aside first, as
            their digests and sizes come before them. (What can be sought is not enough: ``>>`` writes at the end.)
    """

    def __init__(self, file: BinaryIO, spool: Callable[[], BinaryIO], *, rewritable: bool = False) -> None:
        self._file = file
        self._spool = spool
        self._rewritable = rewritable
        self._written = 0
        for name in ("blobs/", f"blobs/{ALGORITHM}/"):
            self._write(_header(name, 0))

    def add(self, name: str, contents: bytes) -> None:
        """See :class:`Output`."""
        self._write(_header(name, len(contents)))
        self._write(contents)
        self._pad(len(contents), _BLOCK_BYTES)

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """See :class:`Output`."""
        if not self._rewritable:
            with self._spool() as copy:
                digest, size = _copy(stream, copy, progress)
                copy.seek(0)
                self._write(_header(blob_name(digest), size))
                shutil.copyfileobj(copy, self._file, _PIECE_BYTES)
        else:
            start = self._file.tell()
            self._file.write(bytes(_BLOCK_BYTES))
            digest, size = _copy(stream, self._file, progress)
            self._file.seek(start)
            self._write(_header(blob_name(digest), size))
            self._file.seek(size, os.SEEK_CUR)
        self._written += size
        self._pad(size, _BLOCK_BYTES)
        return digest, size

    def finish(self) -> None:
        """Write the end."""
        self._write(bytes(2 * _BLOCK_BYTES))
        self._pad(self._written, _RECORD_BYTES)
        self._file.flush()

    def _write(self, contents: bytes) -> None:
        self._file.write(contents)
        self._written += len(contents)

    def _pad(self, size: int, unit: int) -> None:
        self._write(bytes(-size % unit))


class DirectoryOutput:
    """A directory.

    Args:
        root: exists and is empty.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._blobs = os.path.join(root, "blobs", ALGORITHM)
        os.makedirs(self._blobs)

    def add(self, name: str, contents: bytes) -> None:
        """See :class:`Output`."""
        with open(os.path.join(self._root, name), "xb") as file:
            file.write(contents)

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """See :class:`Output`."""
        begun = os.path.join(self._root, ".blob")
        with open(begun, "xb") as file:
            digest, size = _copy(stream, file, progress)
        os.rename(begun, os.path.join(self._root, blob_name(digest)))
        return digest, size


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    # GNU's form for what has more than 8 GiB: one block always, so it can be written after the contents.
    return info.tobuf(tarfile.GNU_FORMAT)


def blob_name(digest: str) -> str:
    """Where a blob is in a layout."""
    return f"blobs/{ALGORITHM}/{digits_of(digest)}"


def _copy(stream: BinaryIO, file: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
        file.write(piece)
        size += len(piece)
        progress(size)
    return f"{ALGORITHM}:{digest.hexdigest()}", size
