"""docs/library.md's tool of forty lines, and docs/images.md's example, with a real registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import mount_points_below
from tests.e2e.engines.registry import Registry
from tests.e2e.engines.registry_tools import skopeo
from tests.test_examples import blocks

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytest_plugins = ["tests.e2e.engines.registry_fixtures"]

TOOL = Path("docs/examples/build_image.py")


def run(directory: Path, repository: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(repository), "UNIONFS_ROOT": str(directory / "root")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tool_makes_an_image(registry: Registry, tmp_path: Path, repository: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is missing; run scripts/setup --dev"
    for name in ("bin", "etc", "tmp"):
        (tmp_path / "rootfs" / name).mkdir(parents=True)
    shutil.copy(busybox, tmp_path / "rootfs/bin/busybox")
    (tmp_path / "rootfs/etc/old").write_text("old")
    script = "/bin/busybox echo hello > /etc/motd; /bin/busybox rm /etc/old"
    name = f"{registry.address}/app:v1"
    out = run(
        tmp_path, repository, str(repository / TOOL), "rootfs", name, "/bin/busybox", "sh", "-c", script
    ).splitlines()
    assert out[:-1] == ["C /etc", "A /etc/motd", "D /etc/old"]
    assert mount_points_below(tmp_path) == []

    # Others see the image, and the two layers have what they should.
    inspected = json.loads(skopeo("inspect", f"docker://{name}"))
    assert inspected["Digest"] == out[-1]
    skopeo("copy", f"docker://{name}", f"oci:{tmp_path}/layout:v1")
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/layout:v1", f"{tmp_path}/bundle"], check=True)
    unpacked = tmp_path / "bundle/rootfs/etc"
    assert sorted(path.name for path in unpacked.iterdir()) == ["motd"]
    assert (unpacked / "motd").read_text() == "hello\n"
    assert len(inspected["Layers"]) == 2

    (example,) = blocks("docs/images.md")
    assert example.count('"alpine"') == 1
    run(tmp_path, repository, "-c", example.replace('"alpine"', f'"{name}"'))


def test_the_tool_is_short(repository: Path) -> None:
    code = [line for line in (repository / TOOL).read_text().splitlines() if line.strip()]
    assert len(code) <= 40
