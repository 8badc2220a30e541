"""Bodies of requests and replies as streams, of which never more than a few pieces are in memory.

Drivers read and give plain binary streams in threads; the server works with pieces on the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import BinaryIO

import trio
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unionfs.errors import ArchiveError

_PIECE_BYTES = 1 << 17


class BodyReader:
    """The body of a request, for a driver to read in a thread that trio started.

    Args:
        pieces: the body as it arrives; the connection is not read while nobody asks for more.
    """

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end.

        Raises:
            ArchiveError: the engine broke off.
        """
        if not self._rest:
            self._rest = memoryview(trio.from_thread.run(self._next))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)

    async def drain(self) -> None:
        """Read what is left. An engine that gets its reply before it has sent everything repeats the call."""
        try:
            async for _ in self._pieces:
                pass
        except ClientDisconnect:
            pass

    async def _next(self) -> bytes:
        try:
            async for piece in self._pieces:
                if piece:
                    return piece
        except ClientDisconnect:
            raise ArchiveError(
                "the engine broke off in the middle of the layer; load or pull the image again"
            ) from None
        return b""


class StreamResponse(Response):
    """A reply whose body a driver gives.

    When reading fails, the connection is cut: a body that ended as it should would be taken for the whole.

    Args:
        stream: the body; closed when it is sent, when reading it fails, and when the engine goes away.
        in_thread: runs something in a thread.
        failed: told why reading failed.
    """

    def __init__(
        self,
        stream: BinaryIO,
        in_thread: Callable[[Callable[[], bytes | None]], Awaitable[bytes | None]],
        failed: Callable[[Exception], None],
    ) -> None:
        super().__init__(media_type="application/x-tar")
        del self.headers["content-length"]  # chunked: nobody knows it
        self._stream = stream
        self._in_thread = in_thread
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it (the ASGI interface)."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with_client, receive, nursery.cancel_scope)
                await self._send(send)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(self._stream.close)

    async def _end_with_client(self, receive: Receive, everything: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        everything.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while True:
            try:
                piece = await self._in_thread(lambda: self._stream.read(_PIECE_BYTES))
            except Exception as error:  # whatever a driver raises is for the log
                self._failed(error)
                return  # without the end of the body, for which the server closes the connection
            await send({"type": "http.response.body", "body": piece or b"", "more_body": bool(piece)})
            if not piece:
                return
