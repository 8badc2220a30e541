"""Our graph driver plugin in a thread of the test, which records the calls and replies as the test wants."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import trio

from unionfs.drivers.contract import InitFunc
from unionfs.engines.docker_plugin.app import PluginApp
from unionfs.engines.docker_plugin.server import Exchange, Handler, Limits, serve
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.engines.docker_plugin.session import SessionFile
from unionfs.host import sockets

Answer = dict[str, Any]
Override = Callable[[Exchange], Awaitable[None]]


class PluginServer:
    """What the plugin was asked.

    Attributes:
        calls: the name and the arguments of every call that came in.
        headers: of every call.
        overrides: answers to calls, by their names, that the plugin is not asked for.
    """

    def __init__(self, app: Handler) -> None:
        self._app = app
        self.calls: list[tuple[str, Answer]] = []
        self.headers: list[dict[str, str]] = []
        self.overrides: dict[str, Override] = {}

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        name = exchange.path.lstrip("/")
        self.headers.append(exchange.headers)
        if name == "GraphDriver.ApplyDiff":
            self.calls.append((name, dict(exchange.query)))
        else:
            body = await exchange.body()
            arguments: Answer = {}
            with suppress(ValueError, RecursionError):  # for the plugin to refuse
                arguments = json.loads(body) if body.strip() else {}
            self.calls.append((name, arguments))
        await self.overrides.get(name, self._app)(exchange)

    def answer(self, name: str, status: int, body: bytes | Answer | list[Any] | None) -> None:
        """Have the call ``name`` answered with these bytes, or this as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def override(exchange: Exchange) -> None:
            await exchange.reply(status, content)

        self.overrides[name] = override


@contextmanager
def plugin_server(path: str, init: InitFunc, limits: Limits | None = None) -> Iterator[PluginServer]:
    """Run the plugin with its socket at ``path``."""
    service = GraphDriverService(init, SessionFile(path + ".session"))
    listening = sockets.listen(path)
    server = PluginServer(PluginApp(service))
    try:
        with served(server, listening.socket, limits):
            yield server
    finally:
        listening.close()
        service.close()


@contextmanager
def served(app: Handler, listening: socket.socket, limits: Limits | None = None) -> Iterator[None]:
    """Serve an application in a thread; at the end it waits for the calls that run."""
    stop: list[Callable[[], None]] = []
    ready = threading.Event()
    failed: list[BaseException] = []

    async def main() -> None:
        stopping = trio.Event()
        token = trio.lowlevel.current_trio_token()
        stop.append(lambda: token.run_sync_soon(stopping.set))
        ready.set()
        await serve(app, listening, stopping.wait, limits)

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=f"plugin-{os.getpid()}", daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield
    finally:
        with suppress(trio.RunFinishedError):
            stop[0]()
        thread.join()
        assert not failed, failed
