"""A small HTTP/1.1 server for a unix socket, on h11 and trio, in which one client cannot harm the others.

*  The size of a request's head is limited, and that of a body that is read whole. Other bodies, in both directions, are
   streamed.
*  The number of connections is limited. To make room for another one, the server closes the connection that has been
   idle longest; without an idle one, the one whose client has kept it waiting longest in the middle of a request.
   A client that keeps it waiting for much longer is disconnected in any case.
*  An upgrade to another protocol (HTTP/2, WebSocket) is ignored, as HTTP/1.1 allows.
*  An exception ends the connection it occurred in, with one line in the log.

While there is room, an idle connection is left to its client to close: if a request is on its way when the server
closes the connection, Docker repeats it without its body.
"""

from __future__ import annotations

import errno
import logging
import math
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import h11
import trio

from unionfs.engines.docker_plugin.messages import ErrorReply

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

JSON = "application/vnd.docker.plugins.v1.2+json"

_PIECE_BYTES = 1 << 16
_PAUSE_S = 0.1
# How long to discard what a client still sends after the reply.
_LINGER_S = 5.0
_WARN_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
        connections: at the same time; at most a quarter of the process' limit of open files.
        head_bytes: of a request's first line and headers; a head that arrives in one piece may have 64 KiB.
        body_bytes: of a body that is read whole.
        stall_s: how long a client may keep the server waiting within a request or a reply, in seconds.
        patience_s: the same while there are more clients than connections.
    """

    connections: int = 256
    head_bytes: int = 1 << 14
    body_bytes: int = 1 << 18
    stall_s: float = 300.0
    patience_s: float = 30.0


class ConnectionOverError(Exception):
    """The client has closed the connection, or the server is about to; no reply can be sent."""


class RequestError(Exception):
    """A request that is refused before it reaches its handler, or while its body is read.

    Attributes:
        status: of the reply.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Exchange:
    """One request, and the reply to it.

    Attributes:
        method: in capitals.
        path: as the client wrote it.
        query: what stands behind the ``?``; of equal keys the last one.
        headers: names in lower case.
    """

    def __init__(self, connection: _Connection, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):
            raise RequestError(505, f"HTTP/{request.http_version.decode()} is not spoken here, only HTTP/1.1")
        target, _, query = request.target.decode("ascii").partition("?")
        self.method = request.method.decode("ascii")
        self.path = target
        self.query = dict(parse_qsl(query, errors="surrogateescape"))
        self.headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
        self._version = request.http_version
        self._connection = connection
        self._body: bytes | None = None
        self._ended = False

    async def body(self) -> bytes:
        """The whole body; a second call returns the same.

        Raises:
            RequestError: it is too large, or damaged.
            ConnectionOverError: the client does not send it.
        """
        if self._body is None:
            limit = self._connection.limits.body_bytes
            parts, size = [], 0
            while piece := await self.piece():
                size += len(piece)
                if size > limit:
                    raise RequestError(413, f"the body has more than {limit} bytes")
                parts.append(piece)
            self._body = b"".join(parts)
        return self._body

    async def piece(self) -> bytes:
        """The next piece of the body, empty at its end. Nothing is read from the client between two calls.

        Raises:
            RequestError: it is damaged, or ends too early.
            ConnectionOverError: the client does not send it.
        """
        while not self._ended:
            event = await self._connection.next_event(self._connection.limits.stall_s)
            if isinstance(event, h11.Data) and event.data:
                return bytes(event.data)
            self._ended = isinstance(event, h11.EndOfMessage)
        return b""

    async def drain(self) -> None:
        """Read what is left of the body."""
        with suppress(RequestError):
            while await self.piece():
                pass

    async def reply(self, status: int, content: bytes, media_type: str = JSON, *, allow: str = "") -> None:
        """Send a whole reply.

        Raises:
            ConnectionOverError: the client does not read it.
        """
        headers = [("Content-Type", media_type), ("Content-Length", str(len(content)))]
        if allow:
            headers.append(("Allow", allow))
        data = [] if self.method == "HEAD" else [h11.Data(data=content)]
        await self._connection.send(self._head(status, headers), *data, h11.EndOfMessage())

    async def send_stream(self, pieces: AsyncIterator[bytes], media_type: str) -> None:
        """Send a reply whose length is not known.

        Exceptions of ``pieces`` pass through. The connection is then closed without the end of the body, so that the
        client does not take a part for the whole.

        Raises:
            RequestError: the client speaks HTTP/1.0, in which a body without a length has no end of its own.
            ConnectionOverError: the client does not read it.
        """
        if self._version < b"1.1":
            raise RequestError(505, "a stream needs HTTP/1.1")
        await self._connection.send(self._head(200, [("Content-Type", media_type)]))
        async for piece in pieces:
            if piece:
                await self._connection.send(h11.Data(data=piece))
        await self._connection.send(h11.EndOfMessage())

    def _head(self, status: int, headers: list[tuple[str, str]]) -> h11.Response:
        if self._connection.last:
            headers.append(("Connection", "close"))
        return _head(status, headers)


def _head(status: int, headers: list[tuple[str, str]]) -> h11.Response:
    headers.append(("Date", formatdate(usegmt=True)))
    return h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode())


Handler = Callable[[Exchange], Awaitable[None]]
"""Answers one request by one reply."""


async def serve(
    handler: Handler,
    listening: socket.socket,
    stopping: Callable[[], Awaitable[Any]],
    limits: Limits | None = None,
) -> None:
    """Serve until ``stopping`` returns and the requests received by then are answered.

    Args:
        handler: answers requests. An exception is logged, and ends the connection.
        listening: a stream socket; it is not closed.
        stopping: returns when the server is to end.
        limits: of the server.
    """
    connections = _Connections(limits or Limits())
    listener = trio.socket.from_stdlib_socket(listening.dup())
    with listener:
        async with trio.open_nursery() as serving:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(connections.accept, listener, serving, handler)
                await stopping()
                accepting.cancel_scope.cancel()
            connections.end_idle()


class _Connections:
    """All connections of one server."""

    def __init__(self, limits: Limits) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = limits.connections if files == resource.RLIM_INFINITY else min(limits.connections, files // 4)
        self._most = max(most, 1)
        self._limits = limits
        self._all: set[_Connection] = set()
        self._warned_at = -math.inf

    async def accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery, handler: Handler) -> None:
        """Accept connections, as many as there is room for, until cancelled."""
        while True:
            try:
                opened, _ = await listener.accept()
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    self._warn(f"cannot accept a connection: {error.strerror}")
                    self._cut_one()
                    await trio.sleep(_PAUSE_S)
                continue
            connection = _Connection(trio.SocketStream(opened), self._limits)
            self._all.add(connection)
            nursery.start_soon(self._run, connection, handler)
            while len(self._all) > self._most:
                self._warn(f"there are {self._most} connections, the most allowed; closing idle ones")
                await trio.sleep(0 if self._cut_one() else _PAUSE_S)

    def end_idle(self) -> None:
        """Close idle connections, and the others after their current request."""
        for connection in self._all:
            connection.last = True
            if connection.idle:
                connection.cut()

    async def _run(self, connection: _Connection, handler: Handler) -> None:
        try:
            await connection.run(handler)
        except ConnectionOverError as error:
            _log.debug("a connection is over: %s", error)
        except Exception as error:
            debug = _log.isEnabledFor(logging.DEBUG)
            _log.error("a connection failed: %s: %s", type(error).__name__, error, exc_info=error if debug else None)
        finally:
            self._all.discard(connection)
            await connection.close()

    def _cut_one(self) -> bool:
        """Cut the connection that loses least; False when none may be cut."""
        waiting = [one for one in self._all if one.may_go()]
        if waiting:
            min(waiting, key=lambda one: (not one.idle, one.since)).cut()
        return bool(waiting)

    def _warn(self, text: str) -> None:
        now = trio.current_time()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            _log.warning("%s", text)


class _Connection:
    """One connection.

    Attributes:
        limits: of the server.
        idle: it is between two requests; a part of the next one's head may have been read.
        last: it is closed after the current request.
        since: when it last began to wait for the client, in trio's time.
    """

    def __init__(self, stream: trio.SocketStream, limits: Limits) -> None:
        self.limits = limits
        self.idle = True
        self.last = False
        self.since = trio.current_time()
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._wait: trio.CancelScope | None = None
        self._cut = False

    def may_go(self) -> bool:
        """Whether it may be cut to make room."""
        waited_s = trio.current_time() - self.since
        return self._wait is not None and not self._cut and (self.idle or waited_s >= self.limits.patience_s)

    def cut(self) -> None:
        """Close it now if it waits for its client, otherwise as soon as it would wait."""
        self._cut = True
        if self._wait is not None:
            self._wait.cancel()

    async def run(self, handler: Handler) -> None:
        """Answer requests until the connection ends."""
        while True:
            self.idle = True
            try:
                # A client that connected just before the server's end may have sent its request already.
                event = await self.next_event(_PAUSE_S if self.last else math.inf)
                if not isinstance(event, h11.Request):
                    return
                self.idle = False
                await handler(Exchange(self, event))
            except RequestError as error:
                await self._refuse(error)
            if not await self._finished():
                return
            self._http.start_next_cycle()

    async def next_event(self, limit_s: float) -> h11.Event:
        """The next part of a request. Not to be called between the end of a request and ``start_next_cycle``.

        Args:
            limit_s: how long to wait for more bytes, in seconds.

        Raises:
            RequestError: it is not HTTP.
            ConnectionOverError: no more bytes arrive.
        """
        while True:
            await trio.lowlevel.checkpoint()  # the bytes received may be thousands of tiny pieces
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise RequestError(error.error_status_hint, str(error)) from None
            if event is not h11.NEED_DATA:
                assert isinstance(event, h11.Event)
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            self._http.receive_data(await self._waited(lambda: self._stream.receive_some(_PIECE_BYTES), limit_s))

    async def send(self, *events: h11.Event) -> None:
        """Send parts of a reply.

        Raises:
            ConnectionOverError: the client does not read them.
        """
        data = b"".join(self._http.send(event) or b"" for event in events)
        if data:
            await self._waited(lambda: self._stream.send_all(data), self.limits.stall_s)

    async def close(self) -> None:
        """Close it, without waiting."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)

    async def _waited(self, wait: Callable[[], Awaitable[_T]], limit_s: float) -> _T:
        """The result of ``wait``, which waits for the client."""
        if self._cut:
            raise ConnectionOverError("closed to make room")
        self.since = trio.current_time()
        try:
            with trio.move_on_after(limit_s) as self._wait:
                return await wait()
        except trio.BrokenResourceError as error:
            raise ConnectionOverError(f"the client is gone: {error.__cause__ or error}") from None
        finally:
            self._wait = None
        raise ConnectionOverError("closed to make room" if self._cut else f"the client stalled for {limit_s:g} s")

    async def _refuse(self, error: RequestError) -> None:
        """Reply with the error, unless a reply has begun."""
        _, closed = self._http.trailing_data
        _log.log(logging.DEBUG if closed else logging.WARNING, "a request was refused: %s", error)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = ErrorReply(err=f"the request was refused: {error}").encode()
            headers = [("Content-Type", JSON), ("Content-Length", str(len(content))), ("Connection", "close")]
            await self.send(_head(error.status, headers), h11.Data(data=content), h11.EndOfMessage())

    async def _finished(self) -> bool:
        """Read the rest of a request after the reply; whether another one may follow on this connection."""
        self.idle = True  # closing it loses nothing any more
        if self._http.our_state is h11.DONE and self._http.their_state is h11.SEND_BODY:
            with suppress(RequestError, ConnectionOverError):
                left = self.limits.body_bytes
                while left > 0 and isinstance(event := await self.next_event(_LINGER_S), h11.Data):
                    left -= len(event.data)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            return not self.last
        if self._http.our_state in (h11.DONE, h11.MUST_CLOSE):
            await self._linger()
        return False

    async def _linger(self) -> None:
        """Let the client read the reply while it still sends: closing the socket at once could discard the reply."""
        with suppress(ConnectionOverError):
            await self._waited(self._stream.send_eof, _LINGER_S)
            end = trio.current_time() + _LINGER_S
            while (left_s := end - trio.current_time()) > 0:
                if not await self._waited(lambda: self._stream.receive_some(_PIECE_BYTES), left_s):
                    break
