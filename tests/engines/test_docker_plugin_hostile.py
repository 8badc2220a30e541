"""The graph driver plugin and clients that mean no good: none ends it, or keeps others waiting."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.drivers.plugin_server import served
from tests.engines.hostile_clients import FOES, connect, head, request
from tests.engines.test_docker_plugin import StubDriver
from tests.engines.test_docker_plugin_process import running
from tests.support.mounts import wait_until
from unionfs.archive.tar_reader import Readable
from unionfs.engines.docker_plugin.app import PluginApp
from unionfs.engines.docker_plugin.server import Limits
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.engines.docker_plugin.session import SessionFile
from unionfs.host import sockets

PATIENCE_S = 60.0


class Driver(StubDriver):
    """A driver whose uploads say how they end, and whose ``Diff`` never does.

    Attributes:
        errors: what uploads ended with.
        begun: streams of which something was asked for.
        closed: those that were closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.begun: set[object] = set()
        self.closed: set[object] = set()

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        self.begun.add(stream)
        try:
            return super().apply_diff(layer_id, parent, stream)
        except Exception as error:
            self.errors.append(error)
            raise

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        driver = self

        class Endless(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                driver.begun.add(self)
                return bytes(size)

            def close(self) -> None:
                driver.closed.add(self)
                super().close()

        return Endless()  # type: ignore[return-value]


def init(directory: Path) -> bytes:
    """The call of an engine that starts."""
    return request("GraphDriver.Init", json.dumps({"Home": str(directory / "home")}).encode())


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def path(driver: Driver, limits: Limits, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "p.sock")
    service = GraphDriverService(driver.init, SessionFile(path + ".session"))
    listening = sockets.listen(path)
    try:
        with served(PluginApp(service), listening.socket, limits):
            assert asked(path, init(tmp_path)) == (200, {})
            yield path
    finally:
        listening.close()
        service.close()


def reply(made: socket.socket) -> tuple[int, Any]:
    """The next reply on a connection: status and JSON."""
    made.settimeout(PATIENCE_S)
    with made.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while line := file.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
        return status, json.loads(file.read(length))


def asked(path: str, sent: bytes) -> tuple[int, Any]:
    """The reply to what is sent on a new connection."""
    with connect(path, PATIENCE_S) as made:
        made.sendall(sent)
        return reply(made)


def is_well(path: str) -> bool:
    """Whether a good request gets its answer."""
    return asked(path, request("Plugin.Activate", b"")) == (200, {"Implements": ["GraphDriver"]})


def is_over(made: socket.socket) -> bool:
    """Whether the server has closed a connection."""
    made.settimeout(PATIENCE_S)
    with suppress(ConnectionResetError):
        while made.recv(1 << 16):
            pass
    return True


def is_closed(made: socket.socket) -> bool:
    """Whether the server has closed a connection by now."""
    made.settimeout(0)
    try:
        while made.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


# One by one


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (request("GraphDriver.Get", b"[" * 100_000), 400, "GraphDriver.Get: the request is .* nested too deeply"),
        (request("GraphDriver.Get", b'{"ID":' * 40_000), 400, "nested too deeply"),
        (request("GraphDriver.Init", b'{"Opts":[' + b"1," * 50_000 + b"1]}"), 400, r"opts\.0: .*; and 49998 more$"),
        (request("GraphDriver.Get", b'\xff\xfe{"ID":1}'), 400, "the request is not what the protocol has"),
        (request("GraphDriver.Get", b'{"ID":' + b"9" * 5000 + b"}"), 400, "Exceeds the limit"),
        (request("GraphDriver.Get", b" " * (1 << 18) + b" "), 413, "the body has more than 262144 bytes"),
        (head("GraphDriver.Get", "Content-Length: 99999999999") + bytes(1 << 20), 413, "has more than"),
        (head("GraphDriver.Get", *["A: b"] * 50_000), 431, "the request was refused"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0 is not spoken here, only HTTP/1.1"),
        (head("GraphDriver.Get", "Content-Length: x"), 400, "bad Content-Length"),
        (head("GraphDriver.Get", "Transfer-Encoding: gzip"), 501, "Only Transfer-Encoding: chunked"),
        (head("GraphDriver.Get", "Transfer-Encoding: chunked") + b"zz\r\n", 400, "illegal chunk header"),
        (request("GraphDriver.Diff", b"{}").replace(b"HTTP/1.1", b"HTTP/1.0"), 505, "a stream needs HTTP/1.1"),
        (head("GraphDriver.Get", method="GET"), 405, "Method Not Allowed: not a call"),
    ],
)
def test_bad_requests_get_one_line(path: str, sent: bytes, status: int, said: str) -> None:
    got, answer = asked(path, sent)
    assert got == status
    assert list(answer) == ["Err"]
    assert "\n" not in answer["Err"]
    assert len(answer["Err"]) < 1000
    assert re.search(said, answer["Err"]), answer
    assert is_well(path)


@pytest.mark.parametrize("settings_", ["AAAA", "AAMAAABkAAQAoAAAAAIAAAAA"])
def test_another_protocol_is_not_taken_up(path: str, settings_: str) -> None:
    more = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", f"HTTP2-Settings: {settings_}"]
    with connect(path) as made:
        for _ in range(2):  # it goes on as if nothing had been said
            made.sendall(request("GraphDriver.Get", b'{"ID":"x"}', *more))
            assert reply(made) == (200, {"Dir": "/mounted/x"})


def test_requests_are_answered_in_their_order_also_when_nothing_more_can_come(path: str) -> None:
    with connect(path) as made:
        made.sendall(b"".join(request("GraphDriver.Get", b'{"ID":"%d"}' % number) for number in range(50)))
        made.shutdown(socket.SHUT_WR)
        made.settimeout(PATIENCE_S)
        with made.makefile("rb") as file:
            answers = file.read()
    assert [line for line in answers.splitlines() if line.startswith(b"{")] == [
        b'{"Dir": "/mounted/%d"}' % number for number in range(50)
    ]


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(path: str) -> None:
    with connect(path, PATIENCE_S) as made:
        made.sendall(head("GraphDriver.Get", "Expect: 100-continue", "Content-Length: 10"))
        assert made.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        made.sendall(b'{"ID":"x"}')
        assert reply(made) == (200, {"Dir": "/mounted/x"})
        # It is told at once when nobody wants it.
        made.sendall(head("GraphDriver.None", "Expect: 100-continue", "Content-Length: 700000000"))
        assert reply(made)[0] == 404


def test_a_head_without_a_body(path: str) -> None:
    with connect(path, PATIENCE_S) as made:
        made.sendall(head("GraphDriver.Get", method="HEAD"))
        assert made.recv(1000).endswith(b"\r\n\r\n")
        made.sendall(request("GraphDriver.Get", b'{"ID":"x"}'))
        assert reply(made) == (200, {"Dir": "/mounted/x"})


def test_what_is_sent_during_a_stream_does_no_harm(path: str, driver: Driver) -> None:
    """What had ended the plugin: a damaged request behind one whose reply was being sent."""
    with connect(path) as made:
        made.sendall(request("GraphDriver.Diff", b'{"ID":"x"}') + head("x", "Transfer-Encoding: chunked") + b"no chunk")
        made.recv(1)
        made.shutdown(socket.SHUT_WR)
        assert is_well(path)
    assert wait_until(lambda: len(driver.closed) == 1, PATIENCE_S)
    assert is_well(path)


# Clients that let us wait


@pytest.mark.parametrize("limits", [Limits(stall_s=0.2)])
def test_a_client_is_not_waited_for_for_ever(path: str, driver: Driver, tmp_path: Path) -> None:
    upload, download, call = (connect(path) for _ in range(3))
    upload.sendall(head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
    download.sendall(request("GraphDriver.Diff", b'{"ID":"x"}'))
    call.sendall(head("GraphDriver.Get", "Content-Length: 10") + b"{")
    assert wait_until(lambda: len(driver.begun) == 2, PATIENCE_S)
    # Nobody else runs when this does, so they have to be over.
    assert asked(path, init(tmp_path)) == (200, {})
    assert [str(error) for error in driver.errors] == [
        "the engine broke off in the middle of the layer; load or pull the image again"
    ]
    assert len(driver.closed) == 1
    for made in (upload, download, call):
        assert is_over(made)
        made.close()


@pytest.mark.parametrize("limits", [Limits(stall_s=0.2)])
def test_between_requests_the_client_may_wait(path: str) -> None:
    with connect(path) as made:
        made.sendall(request("Plugin.Activate", b""))
        assert reply(made)[0] == 200
        time.sleep(1)
        made.sendall(request("Plugin.Activate", b""))
        assert reply(made)[0] == 200


# More clients than there is room for


@pytest.mark.parametrize("limits", [Limits(connections=4)])
@pytest.mark.parametrize("said", [b"", b"POST /Plugin", request("Plugin.Activate", b"")])
def test_the_idle_make_room_for_others(path: str, driver: Driver, said: bytes) -> None:
    with ExitStack() as opened:
        upload = opened.enter_context(connect(path))
        upload.sendall(head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked"))
        assert wait_until(lambda: len(driver.begun) == 1, PATIENCE_S)
        idle = []
        for _ in range(20):
            idle.append(opened.enter_context(connect(path)))
            with suppress(OSError):  # it may have had to go at once
                idle[-1].sendall(said)
        assert is_well(path)
        # Those stay that were idle last, which need not be those that connected last.
        assert wait_until(lambda: sum(map(is_closed, idle)) >= len(idle) - 3, PATIENCE_S)
        upload.sendall(b"3\r\nabc\r\n0\r\n\r\n")
        assert reply(upload) == (200, {"Size": 3})


@pytest.mark.parametrize("limits", [Limits(connections=4, patience_s=0.5)])
def test_those_who_let_us_wait_make_room_when_nobody_is_idle(path: str, driver: Driver) -> None:
    upload = head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n"
    with ExitStack() as opened:
        for number, sent in enumerate([upload, request("GraphDriver.Diff", b'{"ID":"x"}')] * 2, 1):
            opened.enter_context(connect(path)).sendall(sent)
            assert wait_until(lambda number=number: len(driver.begun) == number, PATIENCE_S)  # type: ignore[misc]
        assert is_well(path)


def test_a_server_without_descriptors_goes_on_when_it_has_some(tmp_path: Path) -> None:
    with running(tmp_path, "--driver", "vfs") as here:
        before = resource.prlimit(here.process.pid, resource.RLIMIT_NOFILE)
        kept = connect(str(here.path), PATIENCE_S)
        kept.sendall(request("Plugin.Activate", b""))
        assert reply(kept)[0] == 200
        waiting = len(os.listdir(f"/proc/{here.process.pid}/fd"))
        resource.prlimit(here.process.pid, resource.RLIMIT_NOFILE, (waiting, before[1]))
        flood = [connect(str(here.path)) for _ in range(20)]
        for made in flood:
            made.sendall(request("Plugin.Activate", b""))
        time.sleep(1)  # long enough for many attempts
        resource.prlimit(here.process.pid, resource.RLIMIT_NOFILE, before)
        assert [reply(made)[0] for made in flood] == [200] * 20
        status, said = here.end()
        assert (status, [line for line in said if "Too many open files" in line]) == (
            0,
            ["unionfs docker-plugin: cannot accept a connection: Too many open files"],
        )
        assert len(said) == 3
        for made in (kept, *flood):
            made.close()


# All together

_FRAGMENTS = [
    b"POST /GraphDriver.Get HTTP/1.1\r\n",
    b"POST /GraphDriver.Diff HTTP/1.1\r\n",
    b"POST /GraphDriver.ApplyDiff?id=x HTTP/1.1\r\n",
    b"GET / HTTP/1.0\r\n",
    b"Host: \r\n",
    b"Content-Length: 10\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n",
    b"\r\n",
    b'{"ID":"x"}',
    b"a\r\n",
    b"0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\0" * 100,
]


@given(
    parts=st.lists(st.sampled_from(_FRAGMENTS) | st.binary(min_size=1, max_size=30), min_size=1, max_size=14),
    end=st.sampled_from(["read", "half", "close"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_do_harm(path: str, caplog: pytest.LogCaptureFixture, parts: list[bytes], end: str) -> None:
    with connect(path, 5) as made, suppress(OSError):
        for part in parts:
            made.sendall(part)
        match end:
            case "half":
                made.shutdown(socket.SHUT_WR)
            case "read":
                made.settimeout(0.01)
                made.recv(1000)
    assert is_well(path)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("seed", range(3))
def test_no_client_ends_the_plugin(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with running(tmp_path, "--driver", "vfs", "--home", str(tmp_path / "home")) as here:
        path = str(here.path)
        assert asked(path, request("GraphDriver.Init", b"{}")) == (200, {})
        assert asked(path, request("GraphDriver.Create", b'{"ID":"x"}')) == (200, {})
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(here.process.stderr or ()), daemon=True)
        reader.start()
        open_: list[socket.socket] = []
        foes = [*FOES, *rng.choices(FOES, k=100)]
        rng.shuffle(foes)
        for number, foe in enumerate(foes):
            with suppress(OSError):
                made = foe(path, rng)
                if made is not None:
                    open_.append(made)
            if len(open_) > 60:
                open_.pop(rng.randrange(60)).close()
            if number % 20 == 0:
                assert here.process.poll() is None, f"ended by {foe.__name__}: {said[-30:]}"
                assert is_well(path)
        assert is_well(path)
        assert asked(path, request("GraphDriver.Exists", b'{"ID":"x"}')) == (200, {"Exists": True})
        for made in open_:
            made.close()
        here.process.terminate()
        assert here.process.wait(PATIENCE_S) == 0
        reader.join()
        assert [line for line in said if "Traceback" in line or "failed" in line or "internal" in line] == []
