"""A generator of bytes as a readable binary stream."""

from __future__ import annotations

import io
from collections.abc import Iterator


class PieceStream(io.RawIOBase):
    """Reads from an iterator of byte strings; closing it closes the iterator, and with it what that holds open.

    Args:
        pieces: the contents, such as :func:`unionfs.archive.pack.pack_tree` gives. What it raises, a read raises.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the front of ``buffer``; 0 at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        """Release everything; closing twice is harmless."""
        if not self.closed:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()
        super().close()
