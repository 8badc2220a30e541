"""The files of an AUFS archive's hard link directory, kept until the entries that need them come.

AUFS kept files with several names in ``.wh..wh.plnk`` and archived the names as hard links to them. Such archives are
still around; what is stashed lies in one unnamed file of the target's file system, so nothing is left behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from unionfs.archive.tar_format import TarEntry

_PIECE_BYTES = 1 << 20


class Stash:
    """Contents by name, in one unnamed temporary file.

    Args:
        dir_fd: a directory of the file system to use.
    """

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        self._fd = -1
        self._end = 0
        self._entries: dict[bytes, tuple[TarEntry, int]] = {}

    def add(self, name: bytes, entry: TarEntry, contents: Iterator[bytes]) -> None:
        """Keep ``contents`` under ``name``; the last of the same name counts."""
        if self._fd < 0:
            self._fd = _unnamed_file(self._dir_fd)
        start = self._end
        for piece in contents:
            view = memoryview(piece)
            while view:
                written = os.pwrite(self._fd, view, self._end)
                self._end += written
                view = view[written:]
        self._entries[name] = entry, start

    def get(self, name: bytes) -> tuple[TarEntry, Iterator[bytes]] | None:
        """The entry kept under ``name`` and its contents."""
        found = self._entries.get(name)
        if found is None:
            return None
        entry, start = found
        return entry, self._read(start, start + entry.stored_size)

    def _read(self, at: int, end: int) -> Iterator[bytes]:
        while at < end:
            piece = os.pread(self._fd, min(_PIECE_BYTES, end - at), at)
            at += len(piece)
            yield piece

    def close(self) -> None:
        """Free the space."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unnamed_file(dir_fd: int) -> int:
    try:
        return os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    except OSError:
        # Not every file system has O_TMPFILE; then the machine's temporary directory has to do.
        fd, path = tempfile.mkstemp(prefix="unionfs-stash-")
        os.unlink(path)
        return fd
