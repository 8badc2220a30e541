"""A registry for the tests: Debian's docker-registry on the loopback, and a faulty proxy in front of it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER = "somebody"
PASSWORD = "secret word"
# Of the password above; docker-registry takes bcrypt only.
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuuP6/q0obcGuk6SuzN66aTZwHeRCLMzKO\n"

_DEADLINE_S = 60


@dataclass(frozen=True)
class Registry:
    """A running one.

    Attributes:
        address: host and port, as in an image's name.
        data: where it keeps what it has.
    """

    address: str
    data: Path


@contextmanager
def running_registry(directory: Path, *, login: bool = False, certificates: Path | None = None) -> Iterator[Registry]:
    """A registry that lives as long as the block; its files go below ``directory``.

    Args:
        login: it asks for :data:`USER` and :data:`PASSWORD`.
        certificates: it speaks TLS, with ``ca.crt`` and ``key.pem`` in there.
    """
    directory.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}", **_tls(certificates)},
    }
    if login:
        (directory / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", directory / "config.yml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
        )
        try:
            # Over TLS it answers a request without that too, with a refusal.
            _wait_for(f"http://127.0.0.1:{port}/v2/", process, directory / "log")
            yield Registry(f"127.0.0.1:{port}", directory / "data")
        finally:
            process.terminate()
            process.wait(_DEADLINE_S)


def _tls(certificates: Path | None) -> dict[str, object]:
    if certificates is None:
        return {}
    return {"tls": {"certificate": str(certificates / "ca.crt"), "key": str(certificates / "key.pem")}}


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the registry did not start: {log.read_text()}")


@dataclass
class Seen:
    """A request that went through the proxy."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Answer:
    """What the proxy answers; the registry's own words where a test leaves them."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None
    """Bytes of the body after which the connection is cut."""


@dataclass
class FaultyProxy:
    """A proxy that a test makes go wrong.

    Attributes:
        address: host and port, as in an image's name.
        fault: gets each request with the registry's answer, and gives what is answered; None cuts the connection
            without an answer.
        before: gets each request before it is passed on, and may answer by itself.
        seen: all requests so far.
    """

    address: str = ""
    fault: Callable[[Seen, Answer], Answer | None] = lambda request, answer: answer
    before: Callable[[Seen], Answer | None] = lambda request: None
    seen: list[Seen] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, request: Seen) -> None:
        """Remember a request."""
        with self._lock:
            self.seen.append(request)

    def requests(self, method: str, part: str = "") -> list[Seen]:
        """Those of a method whose path has a part."""
        with self._lock:
            return [one for one in self.seen if one.method == method and part in one.path]


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    """A proxy in front of ``target``, a host and a port."""
    proxy = FaultyProxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base
            pass

        def _pass_on(self) -> None:
            request = Seen(self.command, self.path, dict(self.headers.items()))
            proxy.note(request)
            if (answer := proxy.before(request)) is not None:
                self.close_connection = True  # the body was not read
                self._answer(answer)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = http.client.HTTPConnection(target, timeout=_DEADLINE_S)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                connection.request(self.command, self.path, body or None, headers)
                response = connection.getresponse()
                answer = Answer(response.status, dict(response.getheaders()), response.read())
            finally:
                connection.close()
            changed = proxy.fault(request, answer)
            if changed is None:
                self.close_connection = True
                return
            self._answer(changed)

        def _answer(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            if self.command != "HEAD" and "content-length" not in map(str.lower, answer.headers):
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            body = answer.body if answer.cut_after is None else answer.body[: answer.cut_after]
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that has seen enough
                self.wfile.write(body)
                self.wfile.flush()
            if answer.cut_after is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on  # noqa: N815 - as in the base

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
