"""Clients of an HTTP server on a unix socket that do all that a client should not: each is one function."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

Foe = Callable[[str, random.Random], "socket.socket | None"]
"""Does something bad to the socket of this path. What it returns is still connected, and to be closed some time."""

FOES: list[Foe] = []

_SETTINGS = b"AAMAAABkAAQAoAAAAAIAAAAA"  # of HTTP/2, in base64, as a client would upgrade with
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CALLS = ("Plugin.Activate", "GraphDriver.Get", "GraphDriver.Diff", "GraphDriver.ApplyDiff?id=x", "GraphDriver.None")
_SHORT_S = 0.2  # for an answer that need not come
_PIECE = 1 << 16


def connect(path: str, patience_s: float = _SHORT_S) -> socket.socket:
    """A connection, whose calls fail after ``patience_s``. It may have to wait until the server takes it."""
    made = socket.socket(socket.AF_UNIX)
    # Not a timeout of Python's, with which a full queue is an error at once.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))
    try:
        made.connect(path)
    except BaseException:
        made.close()
        raise
    made.settimeout(patience_s)
    return made


def head(call: str, *lines: str, method: str = "POST") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{method} /{call} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def request(call: str, body: bytes, *lines: str) -> bytes:
    """A request that is right, unless ``lines`` make it wrong."""
    return head(call, f"Content-Length: {len(body)}", *lines) + body


def foe(function: Foe) -> Foe:
    """Add it to :data:`FOES`."""
    FOES.append(function)
    return function


def _say(path: str, parts: Iterable[bytes], *, listen: bool = True) -> socket.socket:
    """Send all that is taken, and read a little of what is answered."""
    made = connect(path)
    with suppress(OSError):
        for part in parts:
            made.sendall(part)
        if listen:
            made.recv(_PIECE)
    return made


def _bytes(rng: random.Random, most: int) -> bytes:
    return rng.randbytes(rng.randrange(1, most))


@foe
def noise(path: str, rng: random.Random) -> socket.socket | None:
    """No HTTP at all."""
    return _say(path, [_bytes(rng, 5000)])


@foe
def silence(path: str, rng: random.Random) -> socket.socket | None:
    """Nothing is sent."""
    return connect(path)


@foe
def damaged(path: str, rng: random.Random) -> socket.socket | None:
    """A good request with some bytes changed."""
    whole = bytearray(request(rng.choice(_CALLS), b'{"ID":"x"}'))
    for _ in range(rng.randrange(1, 5)):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    return _say(path, [bytes(whole)])


@foe
def cut_short(path: str, rng: random.Random) -> socket.socket | None:
    """A good request whose end does not come; closed, half closed, or left open."""
    whole = request(rng.choice(_CALLS), b'{"ID":"x"}')
    made = _say(path, [whole[: rng.randrange(1, len(whole))]], listen=False)
    return _left(made, rng)


def _left(made: socket.socket, rng: random.Random) -> socket.socket | None:
    match rng.randrange(3):
        case 0:
            made.close()
            return None
        case 1:
            with suppress(OSError):
                made.shutdown(socket.SHUT_WR)
    return made


@foe
def half_closed(path: str, rng: random.Random) -> socket.socket | None:
    """Whole requests, and then the end of what the client sends, or of what it reads."""
    made = _say(path, [request(rng.choice(_CALLS), b'{"ID":"x"}')] * rng.randrange(1, 4), listen=False)
    with suppress(OSError):
        made.shutdown(rng.choice([socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR]))
    return made


@foe
def hasty(path: str, rng: random.Random) -> socket.socket | None:
    """Gone before there can be an answer."""
    _say(path, [request(rng.choice(_CALLS), b'{"ID":"x"}')] * rng.randrange(1, 4), listen=False).close()
    return None


@foe
def upgrading(path: str, rng: random.Random) -> socket.socket | None:
    """Another protocol is wanted."""
    settings = rng.choice([b"AAAA", _SETTINGS, b"", b"\xff", b"A" * 4000]).decode("latin-1")
    lines = {
        "h2c": [f"HTTP2-Settings: {settings}", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"],
        "websocket": ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"],
        "tls": ["Upgrade: TLS/1.0", "Connection: Upgrade"],
    }[rng.choice(["h2c", "websocket", "tls"])]
    body = rng.choice([b"", b"{}"])
    made = _say(path, [request("GraphDriver.Get", body, *lines), _PREFACE, _bytes(rng, 300)])
    return _left(made, rng)


@foe
def http2(path: str, rng: random.Random) -> socket.socket | None:
    """HTTP/2 from the first byte on."""
    frame = rng.randrange(200).to_bytes(3) + rng.randbytes(6)
    return _left(_say(path, [_PREFACE, frame, _bytes(rng, 200)]), rng)


@foe
def other_methods(path: str, rng: random.Random) -> socket.socket | None:
    """No POST."""
    method = rng.choice(["GET", "HEAD", "CONNECT", "OPTIONS", "PUT", "TRACE", "X" * 3000])
    call = rng.choice([*_CALLS, "", "*", "%00", "?", "a" * 9000])
    return _say(path, [head(call, method=method), head(call, "Content-Length: 3", method=method), b"abc"])


@foe
def old_version(path: str, rng: random.Random) -> socket.socket | None:
    """HTTP of another version."""
    version = rng.choice(["0.9", "1.0", "1.2", "2.0", "9.9"])
    return _say(path, [request(rng.choice(_CALLS), b"{}").replace(b"HTTP/1.1", f"HTTP/{version}".encode())])


@foe
def heavy_head(path: str, rng: random.Random) -> socket.socket | None:
    """A head without an end."""
    lines = rng.choice([[b"A: " + b"x" * 3000 + b"\r\n"], [b"A: b\r\n"], [b" folded\r\n"], [b"x" * 4000]])
    return _left(_say(path, [head("GraphDriver.Get")[:-2], *(lines * 200)]), rng)


@foe
def lying_length(path: str, rng: random.Random) -> socket.socket | None:
    """A length that is not that of the body, or none at all."""
    length = rng.choice(["-1", "0x10", "1e3", "99999999999999999999999", "5, 5", "5, 6", "", "700000000", "3"])
    more = rng.choice([[], ["Transfer-Encoding: chunked"], ["Content-Length: 7"], ["Transfer-Encoding: gzip"]])
    made = _say(path, [head(rng.choice(_CALLS), f"Content-Length: {length}", *more), b'{"ID":"x"}'])
    return _left(made, rng)


@foe
def bad_chunks(path: str, rng: random.Random) -> socket.socket | None:
    """A body in pieces that are none."""
    parts = [b"5\r\nhello\r\n", b"5\r\nhel", b"-5\r\n", b"f" * 15 + b"\r\n", b"f" * 30, b"zz\r\n", b"1\r\na\r\n" * 9000]
    parts += [b"5;" + b"x" * 20000 + b"\r\n", b"0\r\nA: " + b"x" * 30000, b"0\r\n\r\n"]
    begun = head(rng.choice(_CALLS), "Transfer-Encoding: chunked")
    return _left(_say(path, [begun, *rng.sample(parts, rng.randrange(1, 4))]), rng)


@foe
def odd_json(path: str, rng: random.Random) -> socket.socket | None:
    """JSON that is too deep, too large, or not for a driver."""
    body = rng.choice(
        [
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"StorageOpt":' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"ID":' + b"9" * 5000 + b"}",
            b'{"ID":"\\ud800\\u0000/../x"}',
            b'\xff\xfe{"ID":1}',
            b"1e400",
            b'{"ID":"' + b"x" * 3_000_000 + b'"}',
            b'{"Opts":[' + b'"x",' * 50_000 + b'"x"]}',
        ]
    )
    call = rng.choice(["GraphDriver.Get", "GraphDriver.Create", "GraphDriver.Diff", "Plugin.Activate"])
    return _say(path, [request(call, body)])


@foe
def large_body(path: str, rng: random.Random) -> socket.socket | None:
    """More than any call has."""
    size = 40 << 20
    begun = head(rng.choice(_CALLS[:3]), f"Content-Length: {size}")
    return _left(_say(path, [begun, *([bytes(1 << 20)] * 40)]), rng)


@foe
def aborted_upload(path: str, rng: random.Random) -> socket.socket | None:
    """A layer that breaks off."""
    begun = head(f"GraphDriver.ApplyDiff?id={rng.choice('xy')}&parent=", "Transfer-Encoding: chunked")
    data = rng.choice([bytes(512), rng.randbytes(512)])
    pieces = [b"200\r\n" + data + b"\r\n"] * rng.randrange(1, 50)
    return _left(_say(path, [begun, *pieces], listen=False), rng)


@foe
def odd_query(path: str, rng: random.Random) -> socket.socket | None:
    """An upload of nothing to nowhere."""
    query = rng.choice(["id=" + "a" * 9000, "id=%ff%00", "&" * 5000, "id=x&id=y&ID=z", "%", "a[]=1", "id=..%2f..%2fx"])
    return _say(path, [request(f"GraphDriver.ApplyDiff?{query}", bytes(1024))])


@foe
def pipeline(path: str, rng: random.Random) -> socket.socket | None:
    """Requests without end, and nobody reads the answers."""
    return _say(path, [request("GraphDriver.Get", b'{"ID":"x"}') * 50] * 40, listen=False)


@foe
def slow_reader(path: str, rng: random.Random) -> socket.socket | None:
    """Takes the first byte of an answer, or none."""
    made = _say(path, [request("GraphDriver.Diff", b'{"ID":"x"}')], listen=False)
    if rng.random() < 0.5:
        with suppress(OSError):
            made.recv(1)
    return _left(made, rng)


@foe
def expecting(path: str, rng: random.Random) -> socket.socket | None:
    """Waits to be asked for its body."""
    what = rng.choice(["100-continue", "100-continue, 100-continue", "nonsense"])
    made = _say(path, [head(rng.choice(_CALLS), f"Expect: {what}", "Content-Length: 10")])
    with suppress(OSError):
        made.sendall(b'{"ID":"x"}')
    return _left(made, rng)


@foe
def flood(path: str, rng: random.Random) -> socket.socket | None:
    """Many connections at once, of which most say nothing."""
    many: list[socket.socket] = []
    with suppress(OSError):
        for _ in range(300):
            many.append(connect(path))
            if rng.random() < 0.3:
                many[-1].sendall(request(rng.choice(_CALLS[:2]), b"{}")[: rng.choice([5, None])])
    rng.shuffle(many)
    for one in many:
        one.close()
    return None
