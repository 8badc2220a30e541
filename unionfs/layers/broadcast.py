"""One stream read by several threads at once, each at its own pace, with bounded memory."""

from __future__ import annotations

import threading
from collections import deque


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
