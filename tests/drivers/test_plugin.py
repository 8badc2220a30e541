"""The plugin client: finding, calling, repeating, and what it understands (moby's plugins tests)."""

from __future__ import annotations

import io
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.drivers.plugin_server import PluginServer, plugin_server, served
from unionfs.archive.changes import ChangeKind
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import plugin, vfs
from unionfs.drivers.contract import Capabilities, CreateOptions
from unionfs.drivers.plugin import (
    PluginAddress,
    PluginDriver,
    PluginTransport,
    PluginUnreachableError,
    connect,
    delay_s,
    find_plugin,
    gives_up,
    list_plugins,
    spec_directories,
)
from unionfs.engines.docker_plugin.app import PluginApp
from unionfs.engines.docker_plugin.server import Exchange
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.engines.docker_plugin.session import SessionFile
from unionfs.errors import ArchiveError, DriverError, NotSupportedError
from unionfs.overlay.idmap import IdRange


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PluginServer]:
    with plugin_server(str(tmp_path / "p.sock"), vfs.init) as running:
        yield running


def address_of(path: Path, name: str = "p") -> PluginAddress:
    found = find_plugin(name, str(path), [])
    assert found is not None
    return found


@pytest.fixture
def driver(server: PluginServer, tmp_path: Path) -> PluginDriver:
    return connect("p", str(tmp_path / "home"), [], IdMapping(), address_of(tmp_path))


# Finding


def bound_socket(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


@pytest.mark.parametrize("where", ["echo.sock", "echo/echo.sock"])
def test_local_socket(tmp_path: Path, where: str) -> None:
    bound_socket(tmp_path / where)
    found = find_plugin("echo", str(tmp_path), [])
    assert found is not None
    assert (found.socket, found.base_url, found.tls) == (str(tmp_path / where), "http://plugin.moby.localhost", None)


def test_socket_has_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "echo.sock").touch()
    (tmp_path / "echo").mkdir()
    assert find_plugin("echo", str(tmp_path), []) is None
    bound_socket(tmp_path / "echo/echo.sock")
    assert address_of(tmp_path, "echo").socket == str(tmp_path / "echo/echo.sock")


@pytest.mark.parametrize("where", ["echo.spec", "echo/echo.spec"])
@pytest.mark.parametrize(
    ("text", "socket_path", "url", "encrypted"),
    [
        ("unix:///var/lib/docker/plugins/echo.sock\n", "/var/lib/docker/plugins/echo.sock", None, False),
        ("  tcp://localhost:8080  ", "", "http://localhost:8080", False),
        ("http://localhost:8080/sub/", "", "http://localhost:8080/sub", False),
        ("https://localhost:8080", "", "https://localhost:8080", True),
    ],
)
def test_file_spec_plugin(
    tmp_path: Path, where: str, text: str, socket_path: str, url: str | None, encrypted: bool
) -> None:
    (tmp_path / "echo").mkdir()
    (tmp_path / where).write_text(text)
    found = find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])
    assert found is not None
    assert found.name == "echo"
    assert found.socket == socket_path
    assert url is None or found.base_url == url
    assert (found.tls is not None) == encrypted
    if found.tls is not None:
        assert found.tls.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("text", ["", "localhost:8080", "/run/echo.sock", "ftp://localhost"])
def test_unknown_protocol(tmp_path: Path, text: str) -> None:
    (tmp_path / "echo.spec").write_text(text)
    with pytest.raises(DriverError, match=r"echo.spec: unknown protocol .*write one of unix://"):
        find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])


def test_file_json_spec_plugin(tmp_path: Path) -> None:
    (tmp_path / "echo.json").write_text(json.dumps({"Name": "other", "Addr": "tcp://example.com:8080"}))
    found = find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])
    assert found is not None
    assert (found.name, found.base_url, found.tls) == ("echo", "http://example.com:8080", None)


def test_file_json_spec_plugin_with_tls(tmp_path: Path) -> None:
    settings = {"InsecureSkipVerify": True, "CAFile": "", "CertFile": "", "KeyFile": ""}
    (tmp_path / "echo.json").write_text(json.dumps({"Addr": "tcp://h:1", "TLSConfig": settings}))
    found = find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])
    assert found is not None
    assert found.base_url == "https://h:1"
    assert found.tls is not None
    settings["CAFile"] = str(tmp_path / "missing.pem")
    (tmp_path / "echo.json").write_text(json.dumps({"Addr": "tcp://h:1", "TLSConfig": settings}))
    with pytest.raises(DriverError, match="certificate"):
        find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"Addr": "tcp://"}', "[" * 100_000])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "echo.json").write_text(text)
    with pytest.raises(DriverError, match=r"echo\.json"):
        find_plugin("echo", str(tmp_path / "none"), [str(tmp_path)])


def test_order_of_places(tmp_path: Path) -> None:
    first, second, sockets = tmp_path / "first", tmp_path / "second", tmp_path / "sockets"
    for directory in (first, second):
        directory.mkdir()
    (second / "echo.spec").write_text("tcp://second-spec:1")
    assert found_url(sockets, first, second) == "http://second-spec:1"
    (first / "echo.json").write_text('{"Addr": "tcp://first-json:1"}')
    assert found_url(sockets, first, second) == "http://first-json:1"
    (first / "echo").mkdir()
    (first / "echo/echo.spec").write_text("tcp://first-sub-spec:1")
    assert found_url(sockets, first, second) == "http://first-sub-spec:1"
    (first / "echo.spec").write_text("tcp://first-spec:1")
    assert found_url(sockets, first, second) == "http://first-spec:1"
    bound_socket(sockets / "echo.sock")
    assert found_url(sockets, first, second) == "http://plugin.moby.localhost"


def found_url(sockets: Path, *directories: Path) -> str:
    found = find_plugin("echo", str(sockets), [str(directory) for directory in directories])
    assert found is not None
    return found.base_url


def test_scan(tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    (specs / "sub").mkdir(parents=True)
    (specs / "not").mkdir()
    bound_socket(tmp_path / "sockets/a.sock")
    bound_socket(tmp_path / "sockets/b/b.sock")
    (specs / "c.spec").write_text("tcp://c:1")
    (specs / "sub/sub.json").write_text('{"Addr": "tcp://d:1"}')
    (specs / "not/other.spec").write_text("tcp://e:1")
    (specs / "readme.txt").touch()
    assert list_plugins(str(tmp_path / "sockets"), [str(specs)]) == ["a", "b", "c", "sub"]
    assert list_plugins(str(tmp_path / "nowhere"), []) == []


def test_rootless_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spec_directories() == ("/etc/docker/plugins", "/usr/lib/docker/plugins")
    monkeypatch.setenv("ROOTLESSKIT_STATE_DIR", "/run/user/1/rk")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/u/.cfg")
    monkeypatch.setenv("HOME", "/home/u")
    assert spec_directories() == ("/home/u/.cfg/docker/plugins", "/home/u/.local/lib/docker/plugins")


# Calling


def test_handshake_and_init_request(server: PluginServer, tmp_path: Path) -> None:
    mapping = IdMapping([IdRange(0, 100000, 65536)], [IdRange(0, 1, 2), IdRange(5, 6, 7)])
    connect("p", str(tmp_path / "home"), ["size=0"], mapping, address_of(tmp_path))
    assert server.calls == [
        ("Plugin.Activate", {}),
        (
            "GraphDriver.Init",
            {
                "Home": str(tmp_path / "home"),
                "Opts": ["size=0"],
                "UIDMaps": [{"container_id": 0, "host_id": 100000, "size": 65536}],
                "GIDMaps": [
                    {"container_id": 0, "host_id": 1, "size": 2},
                    {"container_id": 5, "host_id": 6, "size": 7},
                ],
            },
        ),
        ("GraphDriver.Capabilities", {}),
    ]


def test_headers(server: PluginServer, driver: PluginDriver) -> None:
    driver.create("x")
    driver.apply_diff("x", "", io.BytesIO(bytes(1024)))
    for headers in server.headers:
        assert headers["accept"] == "application/vnd.docker.plugins.v1.2+json"
        assert headers["host"] == "plugin.moby.localhost"
        assert headers["accept-encoding"] == "identity"
        assert "content-type" not in headers
    assert server.headers[0]["content-length"] == "0"
    assert server.headers[-1]["transfer-encoding"] == "chunked"


def test_requests_leave_out_what_is_empty(server: PluginServer, driver: PluginDriver) -> None:
    del server.calls[:]
    driver.create("base")
    driver.create_read_write("x", "base", CreateOptions(mount_label="label"))
    driver.get("x")
    driver.get("x", "label")
    driver.put("x")
    driver.exists("x")
    driver.diff("x", "base").close()
    driver.changes("x", "")
    driver.diff_size("x", "base")
    driver.apply_diff("x", "", io.BytesIO(bytes(1024)))
    driver.get_metadata("x")
    driver.status()
    driver.remove("x")
    driver.cleanup()
    assert server.calls == [
        ("GraphDriver.Create", {"ID": "base"}),
        ("GraphDriver.CreateReadWrite", {"ID": "x", "Parent": "base", "MountLabel": "label"}),
        ("GraphDriver.Get", {"ID": "x"}),
        ("GraphDriver.Get", {"ID": "x", "MountLabel": "label"}),
        ("GraphDriver.Put", {"ID": "x"}),
        ("GraphDriver.Exists", {"ID": "x"}),
        ("GraphDriver.Diff", {"ID": "x", "Parent": "base"}),
        ("GraphDriver.Changes", {"ID": "x"}),
        ("GraphDriver.DiffSize", {"ID": "x", "Parent": "base"}),
        ("GraphDriver.ApplyDiff", {"id": "x"}),
        ("GraphDriver.GetMetadata", {"ID": "x"}),
        ("GraphDriver.Status", {}),
        ("GraphDriver.Remove", {"ID": "x"}),
        ("GraphDriver.Cleanup", {}),
    ]


def test_storage_options_are_sent(server: PluginServer, driver: PluginDriver) -> None:
    with pytest.raises(DriverError, match="size"):
        driver.create_read_write("x", "", CreateOptions(storage_options={"size": "10G"}))
    assert ("GraphDriver.CreateReadWrite", {"ID": "x", "StorageOpt": {"size": "10G"}}) in server.calls


def test_ids_with_special_characters(driver: PluginDriver) -> None:
    for layer_id in ("a b&c=d?e#f%20+", "ü", "k" * 100):
        driver.create(layer_id)
        assert driver.apply_diff(layer_id, "", io.BytesIO(bytes(1024))) == 0
        assert driver.exists(layer_id)
        assert os.path.basename(driver.get(layer_id)) == layer_id


def test_plugin_that_is_no_graph_driver(server: PluginServer, tmp_path: Path) -> None:
    server.answer("Plugin.Activate", 200, {"Implements": ["VolumeDriver"]})
    with pytest.raises(NotSupportedError, match="does not implement the requested driver, it is for VolumeDriver"):
        connect("p", str(tmp_path / "home"), [], IdMapping(), address_of(tmp_path))


def test_missing_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_plugin", lambda name: None)
    with pytest.raises(NotSupportedError, match="driver gone is not one of ours and no plugin of that name is found"):
        connect("gone", str(tmp_path), [], IdMapping())


def answering(server: PluginServer, call: str, status: int, body: Any) -> None:
    server.answer(f"GraphDriver.{call}", status, body)


@pytest.mark.parametrize(
    ("status", "reply", "exact"),
    [
        (200, {"Capabilities": {"ReproducesExactDiffs": True}}, True),
        (200, {"capabilities": {"reproducesexactdiffs": True}}, True),
        (200, {"ReproducesExactDiffs": True}, True),
        (200, {"Capabilities": {"ReproducesExactDiffs": False}}, False),
        (200, {}, False),
        (200, {"Capabilities": None}, False),
        (404, b"404 page not found\n", False),
        (404, {"Err": "no such call"}, False),
    ],
)
def test_capabilities(server: PluginServer, tmp_path: Path, status: int, reply: Any, exact: bool) -> None:
    answering(server, "Capabilities", status, reply)
    driver = connect("p", str(tmp_path / "home"), [], IdMapping(), address_of(tmp_path))
    assert driver.capabilities().reproduces_exact_diffs is exact


def test_capabilities_that_fail_end_the_initialisation(server: PluginServer, tmp_path: Path) -> None:
    answering(server, "Capabilities", 500, {"Err": "out of order"})
    with pytest.raises(DriverError, match=r"plugin p: GraphDriver.Capabilities: out of order"):
        connect("p", str(tmp_path / "home"), [], IdMapping(), address_of(tmp_path))


@pytest.mark.parametrize(
    ("status", "reply", "said"),
    [
        (200, {"Err": "broken"}, "broken"),
        (200, {"err": "broken"}, "broken"),
        (500, {"Err": "broken"}, "broken"),
        (500, b"plain text\n", "plain text"),
        (500, b"", "Internal Server Error"),
        (200, b"no json", "the reply is no JSON object"),
        (200, b"[]", "the reply is no JSON object"),
        (200, b"[" * 100_000, "the reply is no JSON object"),
    ],
)
def test_errors_of_the_plugin(server: PluginServer, driver: PluginDriver, status: int, reply: Any, said: str) -> None:
    driver.create("x")
    for call in ("Get", "Remove", "GetMetadata", "Changes", "DiffSize"):
        answering(server, call, status, reply)
    for name, ask in (
        ("Get", lambda: driver.get("x")),
        ("Remove", lambda: driver.remove("x")),
        ("GetMetadata", lambda: driver.get_metadata("x")),
        ("Changes", lambda: driver.changes("x", "")),
        ("DiffSize", lambda: driver.diff_size("x", "")),
    ):
        with pytest.raises(DriverError, match=f"^plugin p: GraphDriver.{name}: {said}"):
            ask()


@pytest.mark.parametrize("reply", [b"", b"{}\n", {"Err": ""}])
def test_empty_replies_are_fine(server: PluginServer, driver: PluginDriver, reply: Any) -> None:
    answering(server, "Remove", 200, reply)
    driver.remove("x")


def test_status_and_exists_of_a_plugin_in_trouble(server: PluginServer, driver: PluginDriver) -> None:
    for call in ("Status", "Exists"):
        answering(server, call, 500, {"Err": "broken"})
    assert driver.status() == []
    assert driver.exists("x") is False


def test_changes_with_odd_fields(server: PluginServer, driver: PluginDriver) -> None:
    driver.create("x")
    listed = [{"Path": "/b", "Kind": 2}, {"path": "/a", "kind": 1}, {"Path": "/c"}]
    answering(server, "Changes", 200, {"Changes": listed})
    assert [(c.path, c.kind) for c in driver.changes("x", "")] == [
        (b"/a", ChangeKind.ADD),
        (b"/b", ChangeKind.DELETE),
        (b"/c", ChangeKind.MODIFY),
    ]
    answering(server, "Changes", 200, {"Changes": None})
    assert driver.changes("x", "") == []
    answering(server, "Changes", 200, {"Changes": [{"Path": "/b", "Kind": 9}]})
    with pytest.raises(DriverError, match="unknown kind"):
        driver.changes("x", "")


def test_diff_that_breaks_off(server: PluginServer, driver: PluginDriver) -> None:
    driver.create("x")

    async def broken(exchange: Exchange) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"abc"
            raise OSError("the disk is gone")

        await exchange.send_stream(pieces(), "application/x-tar")

    server.overrides["GraphDriver.Diff"] = broken
    with driver.diff("x", "") as stream:
        assert stream.read(3) == b"abc"
        with pytest.raises(ArchiveError, match="broke off"):
            stream.read()


def test_apply_is_streamed(server: PluginServer, driver: PluginDriver) -> None:
    """The plugin has begun before all of the stream exists."""
    driver.create("x")
    begun = threading.Event()
    whole = bytes(1024 * 1024)

    class Slow(io.RawIOBase):
        at = 0

        def read(self, size: int = -1) -> bytes:
            if self.at > len(whole) // 2:
                assert begun.wait(10)
            if any(name == "GraphDriver.ApplyDiff" for name, _ in server.calls):
                begun.set()
            piece = whole[self.at : self.at + size]
            self.at += len(piece)
            return piece

    assert driver.apply_diff("x", "", Slow()) == 0
    assert begun.is_set()


# Repeating


@pytest.mark.parametrize(("attempt", "delay"), [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16), (5, 30), (6, 30), (1000, 30)])
def test_backoff(attempt: int, delay: int) -> None:
    assert delay_s(attempt) == delay


@pytest.mark.parametrize(
    ("elapsed", "gives"), [(1, False), (2, False), (10, False), (29.5, True), (30, True), (40, True)]
)
def test_abort_retry(elapsed: float, gives: bool) -> None:
    assert gives_up(elapsed, 1) is gives


def test_connection_that_is_refused_is_tried_again(tmp_path: Path) -> None:
    bound_socket(tmp_path / "p.sock")  # nobody listens
    slept: list[float] = []
    transport = PluginTransport(address_of(tmp_path), sleep=slept.append)
    with pytest.raises(PluginUnreachableError, match=r"plugin p: Plugin.Activate: no answer .*check that the plugin"):
        transport.call("Plugin.Activate")
    assert slept == [1, 2, 4, 8, 16]


def test_plugin_that_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "p.sock"
    bound_socket(path)
    transport = PluginTransport(address_of(tmp_path), sleep=lambda _: start())
    running: list[Any] = []

    def start() -> None:
        path.unlink()
        context = plugin_server(str(path), vfs.init)
        context.__enter__()
        running.append(context)

    try:
        assert transport.call("Plugin.Activate") == {"implements": ["GraphDriver"]}
        assert len(running) == 1
    finally:
        for context in running:
            context.__exit__(None, None, None)


def test_call_that_was_sent_is_not_repeated(tmp_path: Path) -> None:
    """It may have been carried out."""
    seen: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "p.sock"))
        listening.listen()

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    seen.append(connection.recv(1 << 16).split()[1])

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        driver = PluginDriver("p", PluginTransport(address_of(tmp_path)), Capabilities())
        with pytest.raises(PluginUnreachableError, match=r"GraphDriver.Create: no answer"):
            driver.create("x")
        driver.cleanup()  # who is gone has nothing mounted for us
        thread.join(10)
    assert seen == [b"/GraphDriver.Create", b"/GraphDriver.Cleanup"]


def test_restarted_plugin_is_used_on(tmp_path: Path) -> None:
    path, home = str(tmp_path / "p.sock"), str(tmp_path / "home")
    with plugin_server(path, vfs.init):
        driver = connect("p", home, [], IdMapping(), address_of(tmp_path))
        driver.create("x")
    with plugin_server(path, vfs.init):
        assert driver.exists("x")
        driver.remove("x")


def test_no_descriptor_is_left(driver: PluginDriver) -> None:
    driver.create("x")
    time.sleep(0.1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        driver.status()
        driver.diff("x", "").close()
        driver.diff("x", "").read()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.05)  # the server's side is closed by its threads
    assert len(os.listdir("/proc/self/fd")) <= before


def test_over_tcp(tmp_path: Path) -> None:
    app = PluginApp(GraphDriverService(vfs.init, SessionFile(str(tmp_path / "session"))))
    with socket.create_server(("127.0.0.1", 0)) as listening, served(app, listening):
        (tmp_path / "net.spec").write_text(f"tcp://127.0.0.1:{listening.getsockname()[1]}")
        found = find_plugin("net", str(tmp_path / "none"), [str(tmp_path)])
        assert found is not None
        assert PluginTransport(found).call("Plugin.Activate") == {"implements": ["GraphDriver"]}
