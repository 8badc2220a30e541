"""The systemd units: systemd understands them, and what they start exists and can be used as they say."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.mounts import wait_until
from unionfs.fuse_ops.session.supervisor import client

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted((ROOT / "packaging/systemd").iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
PROGRAM = "/usr/local/bin/unionfs"
OURS = ROOT / ".venv/bin/unionfs"
# What makes a mount namespace of a service's own, systemd.exec(5). The mounts in it would be seen by nobody else.
NAMESPACES = {
    "PrivateTmp",
    "PrivateDevices",
    "PrivateMounts",
    "PrivateUsers",
    "ProtectSystem",
    "ProtectHome",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectControlGroups",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "InaccessiblePaths",
    "BindPaths",
    "TemporaryFileSystem",
    "MountFlags",
    "RootDirectory",
    "DynamicUser",
    "RuntimeDirectory",  # removed when the service stops, with what others keep in /run/unionfs
}


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # upper case counts
    parser.read(unit)
    return parser


def test_systemd_understands_them(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    assert program is not None, "run scripts/setup --dev"
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, str(OURS)))
    done = subprocess.run(
        [program, "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_what_they_start_exists(unit: Path) -> None:
    words = shlex.split(read(unit)["Service"]["ExecStart"])
    assert words[0] == PROGRAM
    command = [word for word in words[1:] if not word.startswith("/")]
    options = [word for word in command if word.startswith("-")]
    command = [word for word in command if not word.startswith("-")]
    done = subprocess.run([OURS, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: unionfs {' '.join(command)} " in done.stdout
    for option in options:
        assert option in done.stdout.split(), f"there is no {option}"


@pytest.mark.parametrize("unit", [unit for unit in SERVICES if "serve" in unit.read_text()], ids=lambda unit: unit.name)
def test_mounts_outlive_a_service_and_are_seen(unit: Path) -> None:
    service = read(unit)["Service"]
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert not NAMESPACES & set(service)


def socket_of(name: str) -> str:
    return read(ROOT / "packaging/systemd" / name)["Socket"]["ListenStream"]


@pytest.mark.skipif(os.geteuid() != 0, reason="these are root's")
def test_sockets_are_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(client.SWITCH, raising=False)
    assert socket_of("unionfs-supervisor.socket") == os.fsdecode(client.socket_paths(os.environb)[0])
    told = subprocess.run([OURS, "serve", "docker-plugin", "--help"], capture_output=True, text=True, check=True)
    assert socket_of("unionfs-docker-plugin.socket").replace("unionfs.sock", "NAME.sock") in told.stdout
    assert {unit.with_suffix(".service") for unit in UNITS if unit.suffix == ".socket"} <= set(SERVICES)


def test_the_first_call_starts_the_docker_plugin(tmp_path: Path) -> None:
    path = tmp_path / "unionfs.sock"
    activate = shutil.which("systemd-socket-activate")
    assert activate is not None, "run scripts/setup --dev"
    words = shlex.split(read(ROOT / "packaging/systemd/unionfs-docker-plugin.service")["Service"]["ExecStart"])
    with ended(subprocess.Popen([activate, f"--listen={path}", OURS, *words[1:]])):
        assert wait_until(path.exists, 30)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
            assert client.post("http://plugin/Plugin.Activate").json() == {"Implements": ["GraphDriver"]}


def test_the_snapshotter_tells_when_it_is_ready(tmp_path: Path) -> None:
    service = read(ROOT / "packaging/systemd/unionfs-snapshotter.service")["Service"]
    assert service["Type"] == "notify"
    words = [
        word.replace("/var/lib/unionfs/snapshotter", f"{tmp_path}/root").replace("/run/unionfs", str(tmp_path))
        for word in shlex.split(service["ExecStart"])[1:]
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(60)
        with ended(subprocess.Popen([OURS, *words], env=os.environ | {"NOTIFY_SOCKET": f"{tmp_path}/notify"})):
            assert manager.recv(100) == b"READY=1"
            assert (tmp_path / "snapshotter.sock").is_socket()


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """The process is ended after the block, in order."""
    try:
        yield
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_engines_start_after_and_stop_before_what_they_use() -> None:
    before = {unit.name: read(unit)["Unit"].get("Before", "") for unit in UNITS}
    assert before["unionfs-docker-plugin.socket"] == before["unionfs-docker-plugin.service"] == "docker.service"
    assert before["unionfs-snapshotter.service"] == "containerd.service"
