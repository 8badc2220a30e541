"""A tar stream that keeps the trees it reads from until it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from unionfs.archive.stream import PieceStream


class HeldStream(PieceStream):
    """As :class:`PieceStream`, and what ``held`` has is released when the stream is closed, at the latest when it is
    collected.

    Args:
        pieces: the contents.
        held: left when the stream is closed; it is the stream's from now on.
    """

    def __init__(self, pieces: Iterator[bytes], held: ExitStack) -> None:
        super().__init__(pieces)
        self._held = held.pop_all()

    def close(self) -> None:
        """Release everything; closing twice is harmless."""
        try:
            super().close()
        finally:
            # Also after a constructor that failed, for which __del__ calls this.
            held = getattr(self, "_held", None)
            if held is not None:
                held.close()
