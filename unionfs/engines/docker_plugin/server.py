"""HTTP/1.1 on a listening socket: h11 says what the bytes mean, trio moves them, and no client can do harm to others.

Whatever a client sends, or does not send, ends at most its own connection:

*  A head and a body that is read whole are bounded; other bodies, in and out, pass piece by piece.
*  Connections are bounded. When there is no room for another, one that waits for its client has to go: first those
   between two requests, then those in the middle of one that have waited for long. A client that is waited for longer
   still has to go in any case.
*  An offer to speak another protocol (HTTP/2, WebSocket) is not taken up, as HTTP/1.1 allows.
*  An exception in a connection is logged, and ends that connection.

An idle connection is the client's to close, as long as there is room: Docker repeats a request that was on its way to
a connection just closed here, and without its body.
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
# For a client to notice that its connection ends, and for the rest of a body that nobody wants.
_LINGER_S = 5.0
_WARN_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may take.

    Attributes:
        connections: how many there may be; fewer when the process may not have four times as many files open.
        head_bytes: of a request's first line and headers; what comes in one piece (64 KiB) may be more.
        body_bytes: of a body that is read whole.
        stall_s: how long a client may let us wait in the middle of a request or a reply.
        patience_s: the same when there is no room for others.
    """

    connections: int = 256
    head_bytes: int = 1 << 14
    body_bytes: int = 1 << 18
    stall_s: float = 300.0
    patience_s: float = 30.0


class ConnectionOverError(Exception):
    """The client is gone, or had to go. There is nothing more to say to it."""


class RequestError(Exception):
    """A request that is not HTTP as we speak it.

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
        """The whole body; may be asked for again.

        Raises:
            RequestError: it is too large, or damaged.
            ConnectionOverError: it does not come.
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
        """The next piece of the body, none at its end. The client has to wait while nobody asks.

        Raises:
            RequestError: it is damaged, or ends too early.
            ConnectionOverError: it does not come.
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
            ConnectionOverError: the client does not take it.
        """
        headers = [("Content-Type", media_type), ("Content-Length", str(len(content)))]
        if allow:
            headers.append(("Allow", allow))
        data = [] if self.method == "HEAD" else [h11.Data(data=content)]
        await self._connection.send(self._head(status, headers), *data, h11.EndOfMessage())

    async def send_stream(self, pieces: AsyncIterator[bytes], media_type: str) -> None:
        """Send a reply of which nobody knows the length.

        What ``pieces`` raises passes through, and the connection is then cut: a body that ended as it should would be
        taken for the whole.

        Raises:
            ConnectionOverError: the client does not take it.
        """
        if self._version < b"1.1":  # which has no other sign for the end of a body than that of the connection
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
    """Serve until ``stopping`` returns and all requests that have come are answered.

    Args:
        handler: answers the requests. What it raises is logged, and ends the connection.
        listening: a stream socket, which is not closed.
        stopping: waits for the end.
        limits: of what clients may take.
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
        """Take connections, as many as there is room for, until cancelled."""
        while True:
            try:
                opened, _ = await listener.accept()
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    self._warn(f"cannot take a connection: {error.strerror}")
                    self._cut_one()
                    await trio.sleep(_PAUSE_S)
                continue
            connection = _Connection(trio.SocketStream(opened), self._limits)
            self._all.add(connection)
            nursery.start_soon(self._run, connection, handler)
            while len(self._all) > self._most:
                self._warn(f"{self._most} clients are connected, which is as many as there may be")
                await trio.sleep(0 if self._cut_one() else _PAUSE_S)

    def end_idle(self) -> None:
        """End connections after the request that they are at."""
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
        """Cut the connection that has the least to lose; False when all have something."""
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
        limits: of what the client may take.
        idle: it is between two requests: of the next one there is at most a part of the head.
        last: it ends with the request that it is at.
        since: when it began to wait for the client last.
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
        """End it, now if it waits for its client, otherwise the next time it would."""
        self._cut = True
        if self._wait is not None:
            self._wait.cancel()

    async def run(self, handler: Handler) -> None:
        """Answer requests until the client or we have had enough."""
        while True:
            self.idle = True
            try:
                # One that has come just before the end of the server may have sent its request already.
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
        """What the client sends next; not to be asked for between the end of a request and the next one's begin.

        Args:
            limit_s: how long to wait for a part of it.

        Raises:
            RequestError: it is not HTTP.
            ConnectionOverError: nothing comes.
        """
        while True:
            await trio.lowlevel.checkpoint()  # what has come may be thousands of tiny pieces
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
            ConnectionOverError: the client does not take it.
        """
        data = b"".join(self._http.send(event) or b"" for event in events)
        if data:
            await self._waited(lambda: self._stream.send_all(data), self.limits.stall_s)

    async def close(self) -> None:
        """Close it, without waiting."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)

    async def _waited(self, wait: Callable[[], Awaitable[_T]], limit_s: float) -> _T:
        """What a wait for the client brings."""
        if self._cut:
            raise ConnectionOverError("it had to go")
        self.since = trio.current_time()
        try:
            with trio.move_on_after(limit_s) as self._wait:
                return await wait()
        except trio.BrokenResourceError as error:
            raise ConnectionOverError(f"the client is gone: {error.__cause__ or error}") from None
        finally:
            self._wait = None
        raise ConnectionOverError("it had to go" if self._cut else f"the client let us wait for {limit_s:g} s")

    async def _refuse(self, error: RequestError) -> None:
        """Tell the client what is wrong with its request, if it can still be told."""
        _, closed = self._http.trailing_data
        _log.log(logging.DEBUG if closed else logging.WARNING, "a request was refused: %s", error)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = ErrorReply(err=f"the request was refused: {error}").encode()
            headers = [("Content-Type", JSON), ("Content-Length", str(len(content))), ("Connection", "close")]
            await self.send(_head(error.status, headers), h11.Data(data=content), h11.EndOfMessage())

    async def _finished(self) -> bool:
        """Bring a request to its end after the reply; whether there may be another on this connection."""
        self.idle = True  # nothing is lost any more
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
        """See that the client gets the reply, though it sends on: what it sends then is not looked at."""
        with suppress(ConnectionOverError):
            await self._waited(self._stream.send_eof, _LINGER_S)
            end = trio.current_time() + _LINGER_S
            while (left_s := end - trio.current_time()) > 0:
                if not await self._waited(lambda: self._stream.receive_some(_PIECE_BYTES), left_s):
                    break
