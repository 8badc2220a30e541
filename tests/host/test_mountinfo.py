"""The mount on a path is found, however its name is written in the mount table."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import needs_root
from unionfs.host.mounts import Mount, read_mounts, top_mount

needs_root()


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    """What the test has mounted, to be unmounted after it."""
    made: list[Path] = []
    yield made
    for path in reversed(made):
        subprocess.run(["umount", "--no-canonicalize", path], check=True)


def mount_tmpfs(path: Path, source: str, mounts: list[Path]) -> None:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", source, path], check=True)
    mounts.append(path)


def found(path: Path) -> Mount:
    mount = top_mount(str(path))
    assert mount is not None
    return mount


@pytest.mark.parametrize(
    "name",
    ["plain", "a name", "tab\there", "line\nbreak", "back\\slash", "\\040", "#", "vertical\vtab", "\u00a0", "é", "-"],
)
def test_whatever_its_name(tmp_path: Path, mounts: list[Path], name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    assert top_mount(str(path)) is None
    mount_tmpfs(path, "first", mounts)
    assert (found(path).mount_point, found(path).source, found(path).fs_type) == (str(path), "first", "tmpfs")
    mount_tmpfs(path, "second", mounts)
    assert found(path).source == "second"
    assert [mount.source for mount in read_mounts() if mount.mount_point == str(path)] == ["first", "second"]


def test_others_that_have_the_name_in_them(tmp_path: Path, mounts: list[Path]) -> None:
    path = tmp_path / "plain"
    path.mkdir()
    mount_tmpfs(tmp_path / "source", str(path), mounts)
    mount_tmpfs(tmp_path / "plain more", "longer", mounts)
    assert top_mount(str(path)) is None
    mount_tmpfs(path, "itself", mounts)
    mount_tmpfs(path / "below", "below", mounts)
    assert found(path).source == "itself"


def test_a_name_that_is_not_text(tmp_path: Path, mounts: list[Path]) -> None:
    path = tmp_path / b"\xff".decode("utf-8", "surrogateescape")
    mount_tmpfs(path, "bytes", mounts)
    assert found(path).source == "bytes"
