"""A tar stream that keeps the trees it reads from until it is closed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from unionfs.archive.stream import PieceStream

_BUFFER_BYTES = 1 << 16


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
