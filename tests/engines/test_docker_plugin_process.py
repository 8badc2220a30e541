"""``unionfs serve docker-plugin`` as a process: its socket, signals, what it says, and mounts that outlive it."""

from __future__ import annotations

import io
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import is_mounted, is_running, servers_of, take_down, wait_until
from tests.support.sandbox import needs_root
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import plugin
from unionfs.drivers.plugin import PluginAddress, PluginDriver, PluginTransport, find_plugin
from unionfs.errors import DriverError
from unionfs.testing.trees import write

needs_root()

UNIONFS = os.path.join(os.path.dirname(sys.executable), "unionfs")
PATIENCE_S = 60
ANOTHER = "name another socket with --socket"
ENDING = "unionfs docker-plugin: SIGTERM: ending"


class Plugin:
    """A running plugin."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path

    def connect(self, home: Path) -> PluginDriver:
        """The plugin, initialised as by an engine."""
        return plugin.connect("p", str(home), [], IdMapping(), find_plugin("p", str(self.path.parent), []))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, list[str]]:
        """Send a signal; the exit status and what was logged."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said.splitlines()


@contextmanager
def running(directory: Path, *options: str) -> Iterator[Plugin]:
    path = directory / "p.sock"
    command = [UNIONFS, "serve", "docker-plugin", "--socket", str(path), *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: _answers(path) or process.poll() is not None, PATIENCE_S)
        assert process.poll() is None, process.communicate()[1]
        yield Plugin(process, path)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _answers(path: Path) -> bool:
    """Whether it has come as far as serving, when signals do what they should."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
            probe.settimeout(PATIENCE_S)
            probe.sendall(b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\n\r\n")
            return probe.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


def refused(*options: str) -> tuple[int, str]:
    """Exit status and the one line of a plugin that does not start."""
    done = subprocess.run(
        [UNIONFS, "serve", "docker-plugin", *options], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def test_socket_is_roots_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    with running(tmp_path / "new") as here:
        info = here.path.lstat()
        assert (stat.S_ISSOCK(info.st_mode), stat.S_IMODE(info.st_mode), info.st_uid) == (True, 0o600, os.geteuid())
        status, said = here.end()
        assert (status, here.path.exists()) == (0, False)
        assert said == [
            f"unionfs docker-plugin: serving driver unionfs on {here.path}",
            ENDING,
        ]


def test_second_instance_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as here:
        status, said = refused("--socket", str(here.path))
        assert (status, said) == (
            1,
            f"unionfs: process {here.process.pid} listens on {here.path} already; end it, or {ANOTHER}",
        )
        assert here.connect(tmp_path / "home").status()
        assert here.end()[0] == 0


def test_socket_of_a_killed_plugin_is_taken_over(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        first.end(signal.SIGKILL)
        assert first.path.exists()
    with running(tmp_path) as second:
        assert second.connect(tmp_path / "home").status()


def test_socket_of_the_successor_is_left_alone(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        first.path.unlink()
        with running(tmp_path) as second:
            assert first.end()[0] == 0
            assert second.connect(tmp_path / "home").status()


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--driver", "nonsense"), 2, "there is no driver nonsense; use one of overlay2, unionfs, vfs; see unionfs"),
        (("--storage-opt", "nonsense"), 2, "unable to parse storage-opt key/value: nonsense"),
        (("--home", "relative"), 2, "--home relative is not an absolute path"),
        (("--name", "a/b"), 2, "--name 'a/b' is not a name for a file"),
        (("--socket", "/proc/nonsense/p.sock"), 1, "directory /proc/nonsense cannot be used: "),
        (
            ("--socket", "/tmp/" + "x" * 120),
            1,
            f"is longer than the 107 bytes a socket's path may have; {ANOTHER}",
        ),
    ],
)
def test_what_cannot_be_served(options: tuple[str, ...], status: int, said: str) -> None:
    got, line = refused(*options)
    assert got == status
    assert line.startswith("unionfs: ")
    assert said in line


@pytest.mark.parametrize("kind", ["file", "directory", "link", "datagram"])
def test_only_a_socket_is_ever_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            (tmp_path / "precious").write_text("precious")
            path.symlink_to("precious")
        case "datagram":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.bind(str(path))
                status, line = refused("--socket", str(path))
                assert (status, "is another kind of socket" in line) == (1, True), line
                return
    before = path.lstat()
    status, line = refused("--socket", str(path))
    assert (status, line) == (1, f"unionfs: {path} exists and is no socket; remove it, or {ANOTHER}")
    assert path.lstat() == before


def test_options_and_home(tmp_path: Path) -> None:
    with running(tmp_path, "--driver", "vfs", "--home", str(tmp_path / "mine"), "--storage-opt", "size=0") as here:
        driver = here.connect(tmp_path / "engines")
        driver.create("x")
        assert driver.get("x") == f"{tmp_path}/mine/dir/x"
        assert not (tmp_path / "engines").exists()
    with running(tmp_path, "--driver", "vfs", "--storage-opt", "no=thing") as here:
        with pytest.raises(DriverError, match="no"):
            here.connect(tmp_path / "engines")
        assert here.end()[1][1].startswith("unionfs docker-plugin: Init: ")


def test_debug_shows_calls_and_where_errors_come_from(tmp_path: Path) -> None:
    with running(tmp_path, "--driver", "vfs", "--debug") as here:
        driver = here.connect(tmp_path / "home")
        with pytest.raises(DriverError):
            driver.get("x")
        said = "\n".join(here.end()[1])
        assert "Get GetRequest(id='x'" in said
        assert "Traceback" in said


def upload(path: Path, call: str) -> socket.socket:
    """A call with a body that does not end by itself, begun."""
    opened = socket.socket(socket.AF_UNIX)
    opened.settimeout(PATIENCE_S)
    opened.connect(str(path))
    opened.sendall(f"POST /{call} HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    opened.sendall(b"200\r\n" + bytes(512) + b"\r\n")
    return opened


@contextmanager
def ending_in_a_call(directory: Path) -> Iterator[tuple[Plugin, socket.socket]]:
    """A plugin that has got SIGTERM in the middle of an upload."""
    with running(directory, "--driver", "vfs", "--debug") as here:
        here.connect(directory / "home").create("x")
        opened = upload(here.path, "GraphDriver.ApplyDiff?id=x&parent=")
        log = here.process.stderr
        assert log is not None
        while "ApplyDiff" not in log.readline():
            pass
        here.process.send_signal(signal.SIGTERM)
        while "SIGTERM: ending when 1 running" not in log.readline():
            pass
        with opened:
            yield here, opened


def test_call_that_runs_is_finished_before_the_end(tmp_path: Path) -> None:
    with ending_in_a_call(tmp_path) as (here, opened):
        assert not here.path.exists()
        assert here.process.poll() is None
        opened.sendall(b"200\r\n" + bytes(512) + b"\r\n0\r\n\r\n")
        with opened.makefile("rb") as reply:
            assert b'{"Size": 0}' in reply.read()
        assert here.process.wait(PATIENCE_S) == 0


def test_second_signal_does_not_wait(tmp_path: Path) -> None:
    with ending_in_a_call(tmp_path) as (here, _):
        here.process.send_signal(signal.SIGTERM)
        assert here.process.wait(PATIENCE_S) == 1


def test_socket_from_systemd(tmp_path: Path) -> None:
    """As sd_listen_fds(3) has it: descriptor 3, and calls wait in the socket while nobody serves it."""
    path = tmp_path / "p.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        waiting = PluginTransport(_address(tmp_path))
        script = f'exec 3<&{listening.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        command = ["bash", "-c", script, "bash", UNIONFS, "serve", "docker-plugin", "--driver", "vfs"]
        for _ in range(2):
            process = subprocess.Popen(command, pass_fds=[listening.fileno()], stderr=subprocess.PIPE, text=True)
            try:
                assert waiting.call("Plugin.Activate") == {"implements": ["GraphDriver"]}
            finally:
                process.terminate()
                _, said = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
            assert f"serving driver vfs on {path}" in said
            assert path.exists()  # systemd's
        waiting.close()


def _address(directory: Path) -> PluginAddress:
    found = find_plugin("p", str(directory), [])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("before", "count", "said"),
    [
        ("exec 3</dev/null", 1, "descriptor 3 is not a socket: Socket operation on non-socket; see LISTEN_FDS"),
        ("exec 3<&-", 1, "descriptor 3 is not a socket: Bad file descriptor; see LISTEN_FDS"),
        ("true", 2, "2 sockets were passed; the unit needs exactly one ListenStream="),
    ],
)
def test_what_systemd_may_not_pass(before: str, count: int, said: str) -> None:
    script = f'{before}; LISTEN_PID=$$ LISTEN_FDS={count} exec "$@"'
    command = ["bash", "-c", script, "bash", UNIONFS, "serve", "docker-plugin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (1, f"unionfs: {said}\n")


# Mounts


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    yield home
    if home.exists():
        for name in os.listdir(home):
            merged = str(home / name / "merged")
            if is_mounted(merged):
                take_down(merged, servers_of(merged))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["unionfs", "overlay2"])
def test_mounts_outlive_the_plugin(tmp_path: Path, home: Path, kind: str, number: int) -> None:
    with running(tmp_path, "--driver", kind) as first:
        driver = first.connect(home)
        driver.create("base")
        driver.apply_diff("base", "", io.BytesIO(bytes(1024)))
        for name in ("one", "two"):
            driver.create_read_write(name, "base")
        one, two = driver.get("one"), driver.get("two")
        write(one, "before", b"1")
        first.end(number)
    write(one, "meanwhile", b"2")
    with running(tmp_path, "--driver", kind) as second:
        # The engine goes on without another Init. It copies from a container that runs, ...
        assert driver.get("one") == one
        driver.put("one")
        assert sorted(os.listdir(one)) == ["before", "meanwhile"]
        assert [str(change) for change in driver.changes("one", "base")] == ["A /before", "A /meanwhile"]
        # ... stops it, and removes the other while it is still mounted.
        servers = [*servers_of(one), *servers_of(two)]
        driver.put("one")
        assert not is_mounted(one)
        driver.remove("two")
        assert not is_mounted(two)
        assert wait_until(lambda: not any(is_running(pid) for pid in servers), PATIENCE_S)
        driver.remove("one")
        driver.remove("base")
        assert os.listdir(home) == ["l"]
        assert second.end()[0] == 0


@pytest.mark.parametrize("kind", ["unionfs", "overlay2", "vfs"])
def test_mount_that_is_held_twice_outlives_the_first_put(tmp_path: Path, home: Path, kind: str) -> None:
    """A plugin that dies in the middle of a ``docker cp`` does not take the container's tree with it."""
    with running(tmp_path, "--driver", kind) as first:
        driver = first.connect(home)
        driver.create("base")
        for name in ("one", "two"):
            driver.create_read_write(name, "base")
        one = driver.get("one")
        driver.get("one")
        driver.get("one")
        driver.put("one")
        driver.get("two")
        driver.remove("two")
        driver.create_read_write("two", "base")
        first.end(signal.SIGKILL)
    with running(tmp_path, "--driver", kind) as second:
        driver.put("one")
        assert is_mounted(one) or kind == "vfs"
        write(one, "file", b"1")
        driver.put("one")
        assert not is_mounted(one)
        assert not is_mounted(str(home / "two/merged"))
        assert second.end() == (0, [f"unionfs docker-plugin: serving driver {kind} on {second.path}", ENDING])


def test_layers_can_be_removed_when_everything_was_killed(tmp_path: Path, home: Path) -> None:
    with running(tmp_path) as first:
        driver = first.connect(home)
        driver.create("base")
        for name in ("one", "two"):
            driver.create_read_write(name, "base")
            driver.get(name)
        servers = [pid for name in ("one", "two") for pid in servers_of(str(home / name / "merged"))]
        assert len(servers) == 2
        first.end(signal.SIGKILL)
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(is_running(pid) for pid in servers), PATIENCE_S)
    with running(tmp_path) as second:
        driver.put("one")
        driver.remove("one")
        driver.remove("two")
        driver.create_read_write("three", "base")
        write(driver.get("three"), "works", b"1")
        driver.put("three")
        driver.remove("three")
        driver.remove("base")
        assert os.listdir(home) == ["l"]
        assert second.end()[0] == 0


def test_engine_that_died_and_comes_back(tmp_path: Path, home: Path) -> None:
    """It says Init, and then one Put for each container that ran, however often it had asked for the mount."""
    with running(tmp_path) as here:
        driver = here.connect(home)
        driver.create("base")
        driver.create_read_write("one", "base")
        merged = driver.get("one")
        driver.get("one")
        again = here.connect(home)
        assert is_mounted(merged)
        again.put("one")
        assert not is_mounted(merged)
