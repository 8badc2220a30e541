"""Running the application: hypercorn on trio, until a signal, and then until the last call has ended."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from starlette.types import ASGIApp

from unionfs.engines.docker_plugin.app import make_app
from unionfs.engines.docker_plugin.gate import CallGate
from unionfs.engines.docker_plugin.listener import Listener
from unionfs.engines.docker_plugin.service import GraphDriverService

_log = logging.getLogger(__name__)


def run(service: GraphDriverService, listener: Listener) -> None:
    """Serve until SIGTERM or SIGINT; calls that run are finished first. A second signal ends the process at once."""
    trio.run(_run, service, listener)


async def _run(service: GraphDriverService, listener: Listener) -> None:
    gate = CallGate()
    stopping = trio.Event()

    async def watch(signals: AsyncIterator[int]) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if stopping.is_set():
                _log.warning("%s again: ending in the middle of %d calls", name, gate.running)
                os._exit(1)  # a thread in a driver, or an engine that does not read, cannot be ended otherwise
            listener.withdraw()
            running = f" when {gate.running} running call(s) are finished" if gate.running else ""
            _log.info("%s: ending%s", name, running)
            stopping.set()

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, signals)
            await serve(make_app(service, gate), listener.socket, stopping.wait)
            nursery.cancel_scope.cancel()


async def serve(app: ASGIApp, listening: socket.socket, stopping: Callable[[], Awaitable[Any]]) -> None:
    """Serve ``app`` on a listening socket, which is not closed, until ``stopping`` returns and all calls have ended.

    This is hypercorn's own loop (``hypercorn.trio.run``) with another end of connections.
    """
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger(f"{__name__}.hypercorn")
    config.include_server_header = False
    # An idle connection is the engine's to close. If it were closed here while a request is on its way, the engine
    # would repeat the request without its body (spec section 3.2).
    config.keep_alive_timeout = math.inf
    context = WorkerContext(None)
    wrapped = ASGIWrapper(cast(Any, app))
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening.dup()))

    async def connected(stream: trio.SocketStream) -> None:
        await _Connection(wrapped, config, context, ConnectionState(LifespanState({})), cast(Any, stream)).run()

    async with listener, trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(partial(trio.serve_listeners, handler_nursery=connections), connected, [listener])
            await stopping()
            accepting.cancel_scope.cancel()
        await context.terminated.set()  # ends connections that are idle


class _Connection(TCPServer):
    """A connection that ends when the engine closes it. hypercorn's waits for the keep-alive timeout even then."""

    _left = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        if not self._left:
            await super()._idle_timeout()
