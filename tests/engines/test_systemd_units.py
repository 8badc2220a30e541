"""The systemd units: systemd understands them, and what they start exists and can be used as they say."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".socket"], ids=lambda unit: unit.name)
def test_sockets_are_where_they_are_looked_for(unit: Path) -> None:
    sources = [
        ROOT / "unionfs/cli/serve_docker.py",
        ROOT / "unionfs/fuse_ops/supervisor/wire.py",
    ]
    directory, _, name = read(unit)["Socket"]["ListenStream"].rpartition("/")
    assert any(f'"{directory}"' in source.read_text() for source in sources)
    assert name in ("unionfs.sock", "supervisor.sock")
    assert unit.with_suffix(".service") in UNITS


def test_engines_start_after_and_stop_before_what_they_use() -> None:
    before = {unit.name: read(unit)["Unit"].get("Before", "") for unit in UNITS}
    assert before["unionfs-docker-plugin.socket"] == before["unionfs-docker-plugin.service"] == "docker.service"
    assert before["unionfs-snapshotter.service"] == "containerd.service"
