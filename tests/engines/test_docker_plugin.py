"""The graph driver plugin's server: the protocol as dockerd speaks it, streams, and what an engine's restart means."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.drivers.plugin_server import PluginServer, plugin_server
from tests.support.mounts import wait_until
from unionfs.archive.changes import Change, ChangeKind
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.tar_reader import Readable
from unionfs.drivers import plugin, vfs
from unionfs.drivers.contract import Capabilities, CreateOptions
from unionfs.drivers.plugin import PluginDriver, find_plugin
from unionfs.errors import ArchiveError, DriverError

PATIENCE_S = 60


class StubDriver:
    """A driver of which a test sees every call; what is not overridden does nothing."""

    name = "stub"

    def __init__(self) -> None:
        self.inits: list[tuple[str, list[str], IdMapping]] = []
        self.seen: list[tuple[Any, ...]] = []

    def init(self, home: str, options: Sequence[str], id_mapping: IdMapping) -> StubDriver:
        self.inits.append((home, list(options), id_mapping))
        return self

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        self.seen.append(("create", layer_id, parent, options))

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        self.seen.append(("create_read_write", layer_id, parent, options))

    def remove(self, layer_id: str) -> None:
        self.seen.append(("remove", layer_id))

    def get(self, layer_id: str, mount_label: str = "") -> str:
        self.seen.append(("get", layer_id, mount_label))
        return f"/mounted/{layer_id}"

    def put(self, layer_id: str) -> None:
        self.seen.append(("put", layer_id))

    def exists(self, layer_id: str) -> bool:
        return layer_id == "there"

    def status(self) -> list[tuple[str, str]]:
        return [("Backing Filesystem", "extfs")]

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        return {"MergedDir": f"/mounted/{layer_id}"}

    def cleanup(self) -> None:
        self.seen.append(("cleanup",))

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        return io.BytesIO(bytes(1024))

    def changes(self, layer_id: str, parent: str = "") -> list[Change]:
        return [
            Change(b"/d", ChangeKind.MODIFY),
            Change(b"/d/caf\xe9", ChangeKind.ADD),
            Change(b"/x", ChangeKind.DELETE),
        ]

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        size = 0
        while piece := stream.read(1 << 16):
            size += len(piece)
        self.seen.append(("apply_diff", layer_id, parent, size))
        return size

    def diff_size(self, layer_id: str, parent: str = "") -> int:
        return 1 << 40


@pytest.fixture
def stub() -> StubDriver:
    return StubDriver()


@pytest.fixture
def server(stub: StubDriver, tmp_path: Path) -> Iterator[PluginServer]:
    with plugin_server(str(tmp_path / "p.sock"), stub.init) as running:
        yield running


@pytest.fixture
def driver(server: PluginServer, tmp_path: Path) -> PluginDriver:
    return connected(tmp_path)


def connected(directory: Path, home: str = "home") -> PluginDriver:
    address = find_plugin("p", str(directory), [])
    return plugin.connect("p", str(directory / home), [], IdMapping(), address)


class Wire:
    """One kept connection, spoken on as dockerd 20.10 does."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(directory / "p.sock"))
        self.file = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def head(self, call: str, more: str) -> None:
        lines = [f"POST /{call} HTTP/1.1", "Host: ", "User-Agent: Go-http-client/1.1", more]
        lines += ["Accept: application/vnd.docker.plugins.v1.2+json", "", ""]
        self.send("\r\n".join(lines).encode())

    def call(self, call: str, body: bytes = b"{}\n") -> tuple[int, Any]:
        self.head(call, f"Content-Length: {len(body)}")
        self.send(body)
        return self.reply()

    def reply(self) -> tuple[int, Any]:
        status = int(self.file.readline().split()[1])
        length = 0
        while line := self.file.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
        return status, json.loads(self.file.read(length))

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def close(self) -> None:
        self.file.close()
        self._socket.close()


@pytest.fixture
def wire(server: PluginServer, tmp_path: Path) -> Iterator[Wire]:
    opened = Wire(tmp_path)
    yield opened
    opened.close()


# The protocol


def test_every_call_on_one_connection(wire: Wire, stub: StubDriver) -> None:
    assert wire.call("Plugin.Activate", b"") == (200, {"Implements": ["GraphDriver"]})
    maps = [{"container_id": 0, "host_id": 100000, "size": 65536}]
    init = {"Home": "/tmp/unionfs-test-home-that-is-stubbed", "Opts": ["a=b"], "UIDMaps": maps, "GIDMaps": maps}
    try:
        assert wire.call("GraphDriver.Init", json.dumps(init).encode()) == (200, {})
    finally:
        os.rmdir(init["Home"])  # type: ignore[arg-type]
    home, options, mapping = stub.inits[0]
    assert (home, options, mapping.root()) == (init["Home"], ["a=b"], (100000, 100000))
    exact = {"ReproducesExactDiffs": False}
    assert wire.call("GraphDriver.Capabilities") == (200, {**exact, "Capabilities": exact})
    status, reply = wire.call("GraphDriver.Status")
    assert status == 200
    assert ["Driver", "stub"] in reply["Status"]
    assert reply["Status"][-1] == ["Backing Filesystem", "extfs"]
    assert wire.call("GraphDriver.Create", b'{"ID":"a"}\n') == (200, {})
    request = b'{"ID":"b","Parent":"a","MountLabel":"label","StorageOpt":{"size":"10G"}}\n'
    assert wire.call("GraphDriver.CreateReadWrite", request) == (200, {})
    assert wire.call("GraphDriver.Get", b'{"ID":"b","MountLabel":"label"}\n') == (200, {"Dir": "/mounted/b"})
    assert wire.call("GraphDriver.Put", b'{"ID":"b"}\n') == (200, {})
    assert wire.call("GraphDriver.Exists", b'{"ID":"there"}\n') == (200, {"Exists": True})
    assert wire.call("GraphDriver.Exists", b'{"ID":"b"}\n') == (200, {"Exists": False})
    assert wire.call("GraphDriver.GetMetadata", b'{"ID":"b"}\n') == (200, {"Metadata": {"MergedDir": "/mounted/b"}})
    assert wire.call("GraphDriver.DiffSize", b'{"ID":"b","Parent":"a"}\n') == (200, {"Size": 1 << 40})
    status, reply = wire.call("GraphDriver.Changes", b'{"ID":"b","Parent":"a"}\n')
    assert [(change["Path"], change["Kind"]) for change in reply["Changes"]] == [
        ("/d", 0),
        ("/d/caf\udce9", 1),
        ("/x", 2),
    ]
    wire.head("GraphDriver.ApplyDiff?id=a&parent=", "Transfer-Encoding: chunked")
    for _ in range(3):
        wire.chunk(b"x" * 1000)
    wire.send(b"0\r\n\r\n")
    assert wire.reply() == (200, {"Size": 3000})
    assert wire.call("GraphDriver.Remove", b'{"ID":"b"}\n') == (200, {})
    assert wire.call("GraphDriver.Cleanup") == (200, {})
    assert stub.seen == [
        ("create", "a", "", CreateOptions()),
        ("create_read_write", "b", "a", CreateOptions(mount_label="label", storage_options={"size": "10G"})),
        ("get", "b", "label"),
        ("put", "b"),
        ("apply_diff", "a", "", 3000),
        ("remove", "b"),
        ("cleanup",),
    ]


@pytest.mark.parametrize(
    ("call", "body", "status", "said"),
    [
        ("GraphDriver.Nonsense", b"{}", 404, "Not Found: not a call of the graph driver protocol"),
        ("VolumeDriver.Mount", b"{}", 404, "not a call"),
        ("GraphDriver.Get", b"{", 400, "GraphDriver.Get: the request is not what the protocol has: Expecting"),
        ("GraphDriver.Get", b"[]", 400, "Input should be"),
        ("GraphDriver.Get", b'{"ID":3}', 400, "id: Input should be a valid string"),
        ("GraphDriver.Diff", b"{", 400, "GraphDriver.Diff: the request"),
        ("GraphDriver.Init", b'{"Home":"relative"}', 200, "Home is 'relative'; it has to be an absolute path"),
        ("GraphDriver.Init", b"", 200, "Home is ''"),
        ("GraphDriver.Get", b'{"ID":"x"}', 200, "no engine has called GraphDriver.Init yet; restart the engine"),
        ("GraphDriver.Diff", b'{"ID":"x"}', 500, "no engine has called"),
        ("GraphDriver.ApplyDiff?id=x", b"0" * 100, 200, "no engine has called"),
    ],
)
def test_what_cannot_be_answered(wire: Wire, call: str, body: bytes, status: int, said: str) -> None:
    got, reply = wire.call(call, body)
    assert (got, said in reply["Err"]) == (status, True), reply
    # The connection can be used on.
    assert wire.call("Plugin.Activate", b"")[0] == 200


def test_keys_are_read_as_go_reads_them(wire: Wire, stub: StubDriver, tmp_path: Path) -> None:
    maps = [{"ContainerID": 0, "HostID": 7, "Size": 1}]
    init = {"home": str(tmp_path / "h"), "OPTS": None, "UidMaps": maps, "GIDMaps": None, "New": {"a": 1}}
    assert wire.call("GraphDriver.Init", json.dumps(init).encode()) == (200, {})
    assert stub.inits[0][2].to_host(0, 5) == (7, 5)
    assert wire.call("GraphDriver.Get", b'{"id":"x","MountLabel":null}') == (200, {"Dir": "/mounted/x"})


def test_any_failure_of_a_driver_is_told_and_logged_in_one_line(
    driver: PluginDriver, stub: StubDriver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(layer_id: str) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(stub, "remove", fail)
    with pytest.raises(DriverError, match="internal error: KeyError: 'odd'; start the plugin with --debug"):
        driver.remove("x")
    (record,) = [one for one in caplog.records if one.name.startswith("unionfs.engines")]
    assert record.getMessage().startswith("Remove x: internal error")
    assert record.exc_info is None


# Streams


class Source(io.RawIOBase):
    """A stream that tells how much of it was read, and fails in the end."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        self.given = 0
        self._size = size
        self._error = error

    def read(self, size: int = -1) -> bytes:
        if self.given >= self._size:
            if self._error is not None:
                raise self._error
            return b""
        piece = bytes(min(size, self._size - self.given))
        self.given += len(piece)
        return piece


def test_diff_is_read_only_as_fast_as_the_engine_reads(
    driver: PluginDriver, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(1 << 30)
    monkeypatch.setattr(stub, "diff", lambda layer_id, parent: source)
    stream = driver.diff("x")
    assert stream.read(1 << 20) == bytes(1 << 20)
    # Steady: the engine does not read, so nothing moves, whatever fits into sockets and hands.
    assert wait_until(lambda: _steady(lambda: source.given), PATIENCE_S)
    assert source.given < 4 << 20
    stream.close()
    assert wait_until(lambda: source.closed, PATIENCE_S)
    assert source.given < 8 << 20


def _steady(value: Callable[[], int]) -> bool:
    before = value()
    threading.Event().wait(0.3)
    return value() == before


def test_diff_that_fails_on_the_way_is_cut(
    driver: PluginDriver, stub: StubDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(3 << 20, ArchiveError("a file vanished; try again"))
    monkeypatch.setattr(stub, "diff", lambda layer_id, parent: source)
    stream = driver.diff("x")
    with pytest.raises(ArchiveError, match="broke off"):
        while stream.read(1 << 16):
            pass
    assert wait_until(lambda: source.closed, PATIENCE_S)
    assert "Diff x: a file vanished; try again" in caplog.text


def test_apply_diff_is_taken_only_as_fast_as_the_driver_reads(
    wire: Wire, driver: PluginDriver, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(layer_id: str, parent: str, stream: Readable) -> int:
        assert go_on.wait(PATIENCE_S)
        return StubDriver.apply_diff(stub, layer_id, parent, stream)

    monkeypatch.setattr(stub, "apply_diff", slow)
    sent = [0]
    total = 64

    def send() -> None:
        wire.head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked")
        for _ in range(total):
            wire.chunk(bytes(1 << 20))
            sent[0] += 1
        wire.send(b"0\r\n\r\n")

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert wait_until(lambda: _steady(lambda: sent[0]), PATIENCE_S)
    assert sent[0] < 8
    assert driver.get("other") == "/mounted/other"  # nobody else waits
    go_on.set()
    assert wire.reply() == (200, {"Size": total << 20})
    sender.join()


def test_engine_may_send_everything_also_when_the_driver_has_given_up(
    wire: Wire, driver: PluginDriver, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is dropped in the middle makes dockerd send the rest of the stream as a whole one."""

    def refuse(layer_id: str, parent: str, stream: Readable) -> int:
        raise ArchiveError("the archive is damaged; load it again")

    monkeypatch.setattr(stub, "apply_diff", refuse)
    wire.head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked")
    for _ in range(20):
        wire.chunk(bytes(1 << 20))
    wire.send(b"0\r\n\r\n")
    assert wire.reply() == (200, {"Err": "the archive is damaged; load it again"})
    assert wire.call("Plugin.Activate", b"")[0] == 200


@pytest.mark.parametrize("end", ["closed", "damaged"])
def test_apply_diff_that_breaks_off_is_an_error_for_the_driver(
    wire: Wire, driver: PluginDriver, stub: StubDriver, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    errors: list[Exception] = []

    def watched(layer_id: str, parent: str, stream: Readable) -> int:
        try:
            return StubDriver.apply_diff(stub, layer_id, parent, stream)
        except Exception as error:
            errors.append(error)
            raise

    monkeypatch.setattr(stub, "apply_diff", watched)
    wire.head("GraphDriver.ApplyDiff?id=x", "Transfer-Encoding: chunked")
    wire.chunk(bytes(1 << 20))
    if end == "damaged":
        wire.send(b"no chunk\r\n")
    else:
        wire.close()
    assert wait_until(lambda: bool(errors), PATIENCE_S)
    assert isinstance(errors[0], ArchiveError)
    assert driver.get("other") == "/mounted/other"


def test_connections_that_the_engine_closes_are_closed(wire: Wire, tmp_path: Path) -> None:
    assert wire.call("Plugin.Activate", b"")[0] == 200  # the server has all that it needs
    before = _descriptors()
    opened = [Wire(tmp_path) for _ in range(20)]
    for one in opened:
        assert one.call("Plugin.Activate", b"")[0] == 200
    # They are idle when they are closed, not in the middle of a reply.
    assert wait_until(lambda: _steady(_descriptors), PATIENCE_S)
    for one in opened:
        one.close()
    assert wait_until(lambda: _descriptors() <= before, 10)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# The engine's restarts, and ours


def test_init_waits_for_calls_of_an_engine_that_is_gone(
    server: PluginServer,
    wire: Wire,
    driver: PluginDriver,
    stub: StubDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(layer_id: str) -> None:
        inside.set()
        assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(stub, "put", slow)
    wire.head("GraphDriver.Put", "Content-Length: 10")
    wire.send(b'{"ID":"x"}')
    assert inside.wait(PATIENCE_S)
    second = Wire(tmp_path)
    init = json.dumps({"Home": str(tmp_path / "home")}).encode()
    second.head("GraphDriver.Init", f"Content-Length: {len(init)}")
    second.send(init)
    assert wait_until(lambda: len([name for name, _ in server.calls if name == "GraphDriver.Init"]) == 2, PATIENCE_S)
    assert _steady(lambda: len(stub.inits))
    assert len(stub.inits) == 1
    go_on.set()
    assert wire.reply() == (200, {})
    assert second.reply() == (200, {})
    assert len(stub.inits) == 2
    second.close()


def test_second_engine_is_refused_until_the_first_has_ended(driver: PluginDriver, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"serves .*/home already; give each engine a plugin of its own"):
        connected(tmp_path, "other")
    connected(tmp_path)  # the same one, restarted
    driver.cleanup()
    connected(tmp_path, "other")


def test_home_has_one_server(driver: PluginDriver, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with plugin_server(str(tmp_path / "second/p.sock"), vfs.init):
        address = find_plugin("p", str(tmp_path / "second"), [])
        with pytest.raises(DriverError, match="is served by another process"):
            plugin.connect("p", str(tmp_path / "home"), [], IdMapping(), address)


def test_plugin_that_starts_under_a_running_engine_knows_the_home(stub: StubDriver, tmp_path: Path) -> None:
    path = str(tmp_path / "p.sock")
    mapping = IdMapping()
    with plugin_server(path, stub.init):
        address = find_plugin("p", str(tmp_path), [])
        driver = plugin.connect("p", str(tmp_path / "home"), ["size=1"], mapping, address)
    assert not os.path.exists(path)
    assert stat.S_IMODE(os.stat(path + ".session").st_mode) == 0o600
    with plugin_server(path, stub.init):
        assert len(stub.inits) == 1  # not before there is a call
        assert driver.get("x") == "/mounted/x"
        assert driver.get("y") == "/mounted/y"
    assert [(home, options) for home, options, _ in stub.inits] == [(str(tmp_path / "home"), ["size=1"])] * 2
    with plugin_server(path, stub.init):
        driver.cleanup()
    with plugin_server(path, stub.init), pytest.raises(DriverError, match="no engine has called"):
        driver.get("x")


@pytest.mark.parametrize("damaged", ['{"Home": 3}', "", "[" * 100_000])
def test_session_file_that_is_damaged(stub: StubDriver, tmp_path: Path, damaged: str) -> None:
    (tmp_path / "p.sock.session").write_text(damaged)
    with plugin_server(str(tmp_path / "p.sock"), stub.init):
        wire = Wire(tmp_path)
        _, reply = wire.call("GraphDriver.Get", b'{"ID":"x"}')
        assert "p.sock.session: does not say which home to serve" in reply["Err"]
        # An engine's start repairs it.
        assert wire.call("GraphDriver.Init", json.dumps({"Home": str(tmp_path / "home")}).encode()) == (200, {})
        assert wire.call("GraphDriver.Get", b'{"ID":"x"}') == (200, {"Dir": "/mounted/x"})
        wire.close()
