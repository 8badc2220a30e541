"""The calls of the graph driver plugin protocol: requests in, JSON and streams out, until a signal."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, BinaryIO, TypeVar

import trio

from unionfs.engines.docker_plugin.messages import (
    ActivateReply,
    CreateRequest,
    DifferenceRequest,
    ErrorReply,
    GetRequest,
    InitRequest,
    LayerRequest,
    NothingRequest,
    Reply,
    Request,
)
from unionfs.engines.docker_plugin.server import ConnectionOverError, Exchange, RequestError, serve
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.errors import ArchiveError, UnionfsError
from unionfs.host.sockets import Listener

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_PIECE_BYTES = 1 << 17

Answer = Callable[[Any], Reply]


def run(service: GraphDriverService, listener: Listener) -> None:
    """Serve until SIGTERM or SIGINT; calls that run are finished first. A second signal ends the process at once."""
    trio.run(_run, service, listener)


async def _run(service: GraphDriverService, listener: Listener) -> None:
    app = PluginApp(service)
    stopping = trio.Event()

    async def watch(signals: AsyncIterator[int]) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if stopping.is_set():
                _log.warning("%s again: ending in the middle of %d calls", name, app.running)
                os._exit(1)  # a thread in a driver, or an engine that does not read, cannot be ended otherwise
            listener.withdraw()
            running = f" when {app.running} running call(s) are finished" if app.running else ""
            _log.info("%s: ending%s", name, running)
            stopping.set()

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, signals)
            await serve(app, listener.socket, stopping.wait)
            nursery.cancel_scope.cancel()


class PluginApp:
    """Answers requests (:data:`unionfs.engines.docker_plugin.server.Handler`).

    A driver's work is done in threads, since it waits for disks and mounts.

    Args:
        service: answers the calls.
    """

    def __init__(self, service: GraphDriverService) -> None:
        self._service = service
        self._gate = _CallGate()
        self._threads = trio.CapacityLimiter(float("inf"))  # as many as there are connections
        self._plain: Mapping[str, tuple[type[Request], Answer]] = {
            "Init": (InitRequest, service.init),
            "Capabilities": (NothingRequest, service.capabilities),
            "Create": (CreateRequest, service.create),
            "CreateReadWrite": (CreateRequest, service.create_read_write),
            "Remove": (LayerRequest, service.remove),
            "Get": (GetRequest, service.get),
            "Put": (LayerRequest, service.put),
            "Exists": (LayerRequest, service.exists),
            "Status": (NothingRequest, service.status),
            "GetMetadata": (LayerRequest, service.get_metadata),
            "Cleanup": (NothingRequest, service.cleanup),
            "Changes": (DifferenceRequest, service.changes),
            "DiffSize": (DifferenceRequest, service.diff_size),
        }
        self._calls: Mapping[str, Callable[[Exchange], Awaitable[None]]] = {
            "/Plugin.Activate": self._activate,
            "/GraphDriver.Diff": self._diff,
            "/GraphDriver.ApplyDiff": self._apply_diff,
            **{f"/GraphDriver.{name}": partial(self._answer, name, *call) for name, call in self._plain.items()},
        }

    @property
    def running(self) -> int:
        """How many calls run."""
        return self._gate.running

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        call = self._calls.get(exchange.path)
        if call is None or exchange.method != "POST":
            status, text = (404, "Not Found") if call is None else (405, "Method Not Allowed")
            error = ErrorReply(err=f"{text}: not a call of the graph driver protocol")
            await exchange.reply(status, error.encode(), allow="" if call is None else "POST")
            return
        try:
            await call(exchange)
        except _UnreadableError as error:
            text = f"{exchange.path[1:]}: the request is not what the protocol has: {error}"
            _log.warning("%s", text)
            await exchange.reply(400, ErrorReply(err=text).encode())

    async def _activate(self, exchange: Exchange) -> None:
        await exchange.reply(200, ActivateReply().encode())

    async def _answer(self, name: str, kind: type[Request], answer: Answer, exchange: Exchange) -> None:
        """A call with JSON both ways."""
        request = await self._request(kind, exchange)
        _log.debug("%s %r", name, request)
        async with self._gate.alone() if name == "Init" else self._gate.shared():
            reply = await self._tried(name, request, lambda: answer(request))
        await exchange.reply(200, reply)

    async def _apply_diff(self, exchange: Exchange) -> None:
        """A tar stream comes in."""
        request = DifferenceRequest.model_validate(exchange.query)
        _log.debug("ApplyDiff %r", request)
        body = _BodyReader(exchange)
        async with self._gate.shared():
            reply = await self._tried("ApplyDiff", request, lambda: self._service.apply_diff(request, body))
        # Docker repeats a call that is answered before it has sent the whole body.
        await exchange.drain()
        await exchange.reply(200, reply)

    async def _diff(self, exchange: Exchange) -> None:
        """A tar stream goes out. An error can be told only before the stream begins."""
        request = await self._request(DifferenceRequest, exchange)
        _log.debug("Diff %r", request)
        async with self._gate.shared():
            try:
                stream = await self._in_thread(lambda: self._service.diff(request))
            except Exception as error:
                _log_failure("Diff", request, error)
                await exchange.reply(500, ErrorReply(err=_text(error)).encode())
                return
            try:
                await exchange.send_stream(self._pieces(stream), "application/x-tar")
            except (ConnectionOverError, RequestError):
                raise
            except Exception as error:  # the reply has begun, so the error goes to the log only
                _log_failure("Diff", request, error)
            finally:
                with trio.CancelScope(shield=True):
                    await self._in_thread(stream.close)

    async def _request(self, kind: type[Request], exchange: Exchange) -> Any:
        body = await exchange.body()
        try:
            return await self._in_thread(lambda: kind.decode(body))
        except ValueError as error:
            raise _UnreadableError(str(error)) from None

    async def _tried(self, name: str, request: Request, answer: Callable[[], Reply]) -> bytes:
        """The reply that a call gives, or why it fails: the engine shows the text to whoever asked for it."""
        try:
            return await self._in_thread(lambda: answer().encode())
        except Exception as error:
            _log_failure(name, request, error)
            return ErrorReply(err=_text(error)).encode()

    async def _pieces(self, stream: BinaryIO) -> AsyncIterator[bytes]:
        while piece := await self._in_thread(lambda: stream.read(_PIECE_BYTES)):
            yield piece

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(call, limiter=self._threads)


class _UnreadableError(Exception):
    """A request that is not what the protocol has."""


class _BodyReader:
    """The body of a request as a binary stream, for a driver in one of trio's threads."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; empty at the end.

        Raises:
            ArchiveError: the engine broke off.
        """
        if not self._rest:
            self._rest = memoryview(trio.from_thread.run(self._next))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)

    async def _next(self) -> bytes:
        try:
            return await self._exchange.piece()
        except (RequestError, ConnectionOverError):
            raise ArchiveError(
                "the engine broke off in the middle of the layer; load or pull the image again"
            ) from None


class _CallGate:
    """A lock that calls share, and that ``Init`` holds alone.

    Attributes:
        running: how many calls hold it.
    """

    def __init__(self) -> None:
        self._changed = trio.Condition()
        self._closed = 0
        self.running = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be inside together with others."""
        async with self._changed:
            while self._closed:
                await self._changed.wait()
            self.running += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside when nobody else is."""
        async with self._changed:
            self._closed += 1  # from now on nobody else comes in, so that this does end
            try:
                while self.running:
                    await self._changed.wait()
                self.running += 1
            except BaseException:
                self._closed -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            self._closed -= 1
            await self._leave()

    async def _leave(self) -> None:
        self.running -= 1
        with trio.CancelScope(shield=True):
            async with self._changed:
                self._changed.notify_all()


def _log_failure(name: str, request: Request, error: Exception) -> None:
    about = getattr(request, "id", "")
    if not about.isprintable():
        about = repr(about)  # one line is one call
    debug = _log.isEnabledFor(logging.DEBUG)
    _log.warning("%s%s: %s", name, f" {about}" if about else "", _text(error), exc_info=error if debug else None)


def _text(error: Exception) -> str:
    if isinstance(error, UnionfsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return f"internal error: {type(error).__name__}: {error}; start the plugin with --debug to see where"
