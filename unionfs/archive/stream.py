"""A generator of bytes as a readable binary stream, which may keep what it reads from until it is closed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

_BUFFER_BYTES = 1 << 16


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


def held_stream(pieces: Iterator[bytes], held: ExitStack) -> BinaryIO:
    """A binary stream of ``pieces``; what ``held`` has is released when it is closed, at the latest when collected.

    ``read(n)`` gives ``n`` bytes unless the stream ends before.

    Args:
        pieces: the contents.
        held: left when the stream is closed; its contents are the stream's from now on.
    """
    return io.BufferedReader(_HeldStream(pieces, held), _BUFFER_BYTES)


class _HeldStream(PieceStream):
    def __init__(self, pieces: Iterator[bytes], held: ExitStack) -> None:
        super().__init__(pieces)
        self._held = held.pop_all()

    def close(self) -> None:
        try:
            super().close()
        finally:
            # Also after a constructor that failed, for which __del__ calls this.
            held = getattr(self, "_held", None)
            if held is not None:
                held.close()
