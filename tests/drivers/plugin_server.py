"""Our graph driver plugin in a thread of the test, which records the calls and replies as the test wants."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl

import trio
from starlette.types import ASGIApp, Receive, Scope, Send

from unionfs.drivers.contract import InitFunc
from unionfs.engines.docker_plugin import listener
from unionfs.engines.docker_plugin.app import make_app
from unionfs.engines.docker_plugin.server import serve
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.engines.docker_plugin.session_file import SessionFile

Answer = dict[str, Any]
Override = Callable[[Send, Answer], Awaitable[None]]


class PluginServer:
    """What the plugin was asked.

    Attributes:
        calls: the name and the arguments of every call that came in.
        headers: of every call.
        overrides: answers to calls, by their names, that the plugin is not asked for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.calls: list[tuple[str, Answer]] = []
        self.headers: list[dict[str, str]] = []
        self.overrides: dict[str, Override] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = scope["path"].lstrip("/")
        self.headers.append({key.decode().lower(): value.decode() for key, value in scope["headers"]})
        if name == "GraphDriver.ApplyDiff":
            self.calls.append((name, dict(parse_qsl(scope["query_string"].decode()))))
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        arguments: Answer = {}
        with suppress(ValueError):  # for the plugin to refuse
            arguments = json.loads(body) if body.strip() else {}
        self.calls.append((name, arguments))
        if name in self.overrides:
            await self.overrides[name](send, arguments)
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return first.pop() if first else await receive()

        await self._app(scope, replayed, send)

    def answer(self, name: str, status: int, body: bytes | Answer | list[Any] | None) -> None:
        """Have the call ``name`` answered with these bytes, or this as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def override(send: Send, _: Answer) -> None:
            length = (b"content-length", str(len(content)).encode())
            await send({"type": "http.response.start", "status": status, "headers": [length]})
            await send({"type": "http.response.body", "body": content})

        self.overrides[name] = override


async def _whole(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message: dict[str, Any] = dict(await receive())
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


@contextmanager
def plugin_server(path: str, init: InitFunc) -> Iterator[PluginServer]:
    """Run the plugin with its socket at ``path``."""
    service = GraphDriverService(init, SessionFile(path + ".session"))
    listening = listener.listen(path)
    server = PluginServer(make_app(service))
    try:
        with served(server, listening.socket):
            yield server
    finally:
        listening.close()
        service.close()


@contextmanager
def served(app: ASGIApp, listening: socket.socket) -> Iterator[None]:
    """Serve an application in a thread; at the end it waits for the calls that run."""
    stop: list[Callable[[], None]] = []
    ready = threading.Event()

    async def main() -> None:
        stopping = trio.Event()
        token = trio.lowlevel.current_trio_token()
        stop.append(lambda: token.run_sync_soon(stopping.set))
        ready.set()
        await serve(app, listening, stopping.wait)

    thread = threading.Thread(target=trio.run, args=(main,), name=f"plugin-{os.getpid()}", daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield
    finally:
        stop[0]()
        thread.join()
