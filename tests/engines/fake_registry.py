"""A registry in memory on the loopback that a test makes answer as it likes; without TLS and without logins."""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.engines.image_archives import Made, sha256, to_json

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass
class Request:
    """What was asked; the names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def query(self) -> dict[str, str]:
        """The parameters of the path."""
        return dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))


@dataclass
class Answer:
    """What is answered."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body after which the connection is cut."""


@dataclass
class FakeRegistry:
    """A registry of one repository, whatever it is called.

    Attributes:
        address: host and port, as in an image's name.
        hook: gets each request first; what it gives is the answer.
        blobs: by their digests.
        manifests: with their media types, by tag and by digest.
        seen: all requests so far.
    """

    address: str = ""
    hook: Callable[[Request], Answer | None] = lambda request: None
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    _uploads: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, *blobs: bytes) -> None:
        """Store blobs."""
        self.blobs |= {sha256(blob): blob for blob in blobs}

    def tag(self, name: str, manifest: bytes, media_type: str = OCI_MANIFEST) -> None:
        """Store a manifest."""
        self.manifests[name] = self.manifests[sha256(manifest)] = (manifest, media_type)

    def give(
        self, made: Made, tag: str = "v1", *, config_type: str = OCI_CONFIG, layer_type: str = OCI_LAYER, **more: object
    ) -> bytes:
        """Store an image; its manifest, into which ``more`` goes."""
        blobs = [gzip.compress(layer, mtime=0) for layer in made.layers]
        self.put(made.config_bytes, *blobs)
        manifest = to_json(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": describe(made.config_bytes, config_type),
                "layers": [describe(blob, layer_type) for blob in blobs],
                **more,
            }
        )
        self.tag(tag, manifest)
        return manifest

    def requests(self, method: str, part: str = "") -> list[Request]:
        """Those of a method whose path has a part."""
        with self._lock:
            return [one for one in self.seen if one.method == method and part in one.path]

    def answer(self, request: Request) -> Answer:
        """To a request; for hooks that change it, too."""
        path = request.path.partition("?")[0]
        found = re.fullmatch(r"/v2/.+/(blobs|manifests)/([^/]+|uploads/[^/]*)", path)
        if found is None:
            return Answer(200 if path == "/v2/" else 404)
        kind, name = found.groups()
        if request.method in ("GET", "HEAD"):
            return self._get(kind, name, request)
        if kind == "manifests":
            self.tag(name, request.body, request.headers["content-type"])
            return Answer(201, b"", {"Docker-Content-Digest": sha256(request.body)})
        return self._upload(path, name.removeprefix("uploads/"), request)

    def _get(self, kind: str, name: str, request: Request) -> Answer:
        if kind == "manifests" and name in self.manifests:
            body, media_type = self.manifests[name]
            return Answer(200, body, {"Content-Type": media_type, "Docker-Content-Digest": sha256(body)})
        if kind == "blobs" and name in self.blobs:
            body = self.blobs[name]
            if (wanted := request.headers.get("range")) is not None:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                return Answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            return Answer(200, body)
        return Answer(404, to_json({"errors": [{"code": "NOT_FOUND", "message": "not found"}]}))

    def _upload(self, path: str, session: str, request: Request) -> Answer:
        if request.method == "POST":
            session = str(len(self._uploads) + 1)
            self._uploads[session] = b""
            return Answer(202, b"", {"Location": f"{path.rstrip('/')}/{session}?state=a%2Bb"})
        if session not in self._uploads or request.query.get("state") != "a+b":
            return Answer(404)
        self._uploads[session] += request.body
        if request.method == "PATCH":
            return Answer(202, b"", {"Location": f"{path}?state=a%2Bb"})
        blob = self._uploads.pop(session)
        if request.query.get("digest") != f"sha256:{hashlib.sha256(blob).hexdigest()}":
            return Answer(400, to_json({"errors": [{"code": "DIGEST_INVALID"}]}))
        self.put(blob)
        return Answer(201)


def describe(blob: bytes, media_type: str, **more: object) -> dict[str, object]:
    """A descriptor of a blob."""
    return {"mediaType": media_type, "digest": sha256(blob), "size": len(blob), **more}


@contextmanager
def fake_registry() -> Iterator[FakeRegistry]:
    """A registry that lives as long as the block."""
    registry = FakeRegistry()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base
            pass

        def _handle(self) -> None:
            request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            if request.headers.get("transfer-encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    request.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                request.body = self.rfile.read(int(request.headers.get("content-length", 0)))
            with registry._lock:
                registry.seen.append(request)
            answer = registry.hook(request) or registry.answer(request)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                with suppress(BrokenPipeError, ConnectionResetError):  # a client that has seen enough
                    self.wfile.write(answer.body[: answer.cut_after])
            self.close_connection = self.close_connection or answer.cut_after is not None

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815 - as in the base

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    registry.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
