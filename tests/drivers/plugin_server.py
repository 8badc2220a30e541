"""A small graph driver plugin on a unix socket, which puts any driver behind Docker's protocol (spec section 3)."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from unionfs.archive.idmapping import IdMapping, IdRange
from unionfs.drivers.contract import CreateOptions, Driver, InitFunc

Answer = dict[str, Any]


class PluginServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The plugin; ``calls`` has the name and the arguments of every call that came in."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, init: InitFunc, *, own_home: str | None = None) -> None:
        self.driver: Driver | None = None
        self.init = init
        self.own_home = own_home
        self.calls: list[tuple[str, Answer]] = []
        self.headers: list[dict[str, str]] = []
        self.implements = ["GraphDriver"]
        self.overrides: dict[str, Callable[[PluginHandler, Answer], None]] = {}
        super().__init__(path, PluginHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a line on stderr."""


class PluginHandler(BaseHTTPRequestHandler):
    """One connection of the engine."""

    server: PluginServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing: the calls are recorded."""

    def address_string(self) -> str:
        return "unix"

    def do_POST(self) -> None:
        """Answer one call."""
        url = urlsplit(self.path)
        name = url.path.lstrip("/")
        self.server.headers.append({key.lower(): value for key, value in self.headers.items()})
        if name == "GraphDriver.ApplyDiff":
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            self.server.calls.append((name, dict(query)))
            body = _Body(self)
            self._answer(lambda: self._apply(query, body))
            body.drain()
            return
        raw = _Body(self).read()
        arguments: Answer = json.loads(raw) if raw.strip() else {}
        self.server.calls.append((name, arguments))
        override = self.server.overrides.get(name)
        if override is not None:
            override(self, arguments)
            return
        if name == "GraphDriver.Diff":
            self._diff(arguments)
            return
        handler = getattr(self, "call_" + name.partition(".")[2].lower(), None)
        if handler is None:
            self.reply(404, {"Err": f"no such call: {name}"})
        else:
            self._answer(lambda: handler(arguments))

    def _answer(self, call: Callable[[], Answer | None]) -> None:
        try:
            self.reply(200, call() or {})
        except Exception as error:
            self.reply(200, {"Err": str(error)})

    def reply(self, status: int, fields: Answer) -> None:
        """Send a JSON reply."""
        body = json.dumps(fields).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.docker.plugins.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def driver(self) -> Driver:
        assert self.server.driver is not None, "the plugin was not initialised"
        return self.server.driver

    def call_activate(self, _: Answer) -> Answer:
        return {"Implements": self.server.implements}

    def call_init(self, arguments: Answer) -> None:
        maps = [
            [IdRange(m["container_id"], m["host_id"], m["size"]) for m in arguments.get(key) or []]
            for key in ("UIDMaps", "GIDMaps")
        ]
        home = self.server.own_home or arguments["Home"]
        self.server.driver = self.server.init(home, arguments.get("Opts") or [], IdMapping(*maps))

    def call_capabilities(self, _: Answer) -> Answer:
        return {"Capabilities": {"ReproducesExactDiffs": False}}

    def call_create(self, arguments: Answer) -> None:
        self.driver.create(*_created(arguments))

    def call_createreadwrite(self, arguments: Answer) -> None:
        self.driver.create_read_write(*_created(arguments))

    def call_remove(self, arguments: Answer) -> None:
        self.driver.remove(arguments["ID"])

    def call_get(self, arguments: Answer) -> Answer:
        return {"Dir": self.driver.get(arguments["ID"], arguments.get("MountLabel", ""))}

    def call_put(self, arguments: Answer) -> None:
        self.driver.put(arguments["ID"])

    def call_exists(self, arguments: Answer) -> Answer:
        return {"Exists": self.driver.exists(arguments["ID"])}

    def call_status(self, _: Answer) -> Answer:
        return {"Status": [list(pair) for pair in self.driver.status()]}

    def call_getmetadata(self, arguments: Answer) -> Answer:
        return {"Metadata": self.driver.get_metadata(arguments["ID"])}

    def call_cleanup(self, _: Answer) -> None:
        self.driver.cleanup()

    def call_changes(self, arguments: Answer) -> Answer:
        changes = self.driver.changes(arguments["ID"], arguments.get("Parent", ""))
        return {"Changes": [{"Path": os.fsdecode(c.path), "Kind": c.kind.docker_number} for c in changes]}

    def call_diffsize(self, arguments: Answer) -> Answer:
        return {"Size": self.driver.diff_size(arguments["ID"], arguments.get("Parent", ""))}

    def _apply(self, query: dict[str, str], body: BinaryIO | _Body) -> Answer:
        return {"Size": self.driver.apply_diff(query["id"], query.get("parent", ""), body)}

    def _diff(self, arguments: Answer) -> None:
        try:
            stream = self.driver.diff(arguments["ID"], arguments.get("Parent", ""))
        except Exception as error:
            self.reply(500, {"Err": str(error)})
            return
        with stream:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while piece := stream.read(1 << 16):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            # Not reached when reading fails: then the connection is cut, so that nobody takes the rest for the end.
            self.wfile.write(b"0\r\n\r\n")


def _created(arguments: Answer) -> tuple[str, str, CreateOptions]:
    options = CreateOptions(
        mount_label=arguments.get("MountLabel", ""), storage_options=arguments.get("StorageOpt") or {}
    )
    return arguments["ID"], arguments.get("Parent", ""), options


class _Body:
    """A request's body: of known length, chunked, or none."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._file = handler.rfile
        self._chunked = "chunked" in handler.headers.get("Transfer-Encoding", "")
        self._left = int(handler.headers.get("Content-Length") or 0)
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 16), b""))
        if self._chunked and not self._left and not self._ended:
            self._left = int(self._file.readline().split(b";")[0], 16)
            if not self._left:
                self._ended = True
                while self._file.readline().strip():
                    pass
        piece = self._file.read(min(size, self._left))
        self._left -= len(piece)
        if self._chunked and piece and not self._left:
            self._file.readline()
        return piece

    def drain(self) -> None:
        while self.read(1 << 16):
            pass


@contextmanager
def plugin_server(path: str, init: InitFunc, *, own_home: str | None = None) -> Iterator[PluginServer]:
    """Run a plugin whose socket is at ``path``."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    server = PluginServer(path, init, own_home=own_home)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        os.unlink(path)


def remove_tree(path: str) -> None:
    """Remove a directory and everything in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
