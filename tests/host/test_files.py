"""Measuring and removing trees: any depth with few descriptors, nothing followed, nothing outside touched."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.users import as_user, in_child
from unionfs.host.files import BLOCK_BYTES, TreeSize, measure_tree, remove_tree

NOBODY = 65534


@pytest.fixture
def top(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def make_deep(top: int, depth: int) -> None:
    """``tree/d/d/d...`` with a file and an empty directory in each."""
    os.mkdir("tree", dir_fd=top)
    fd = os.open("tree", os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("e", dir_fd=fd)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_a_deep_tree_needs_no_stack_and_few_descriptors(tmp_path: Path, top: int) -> None:
    make_deep(top, 1500)

    def remove() -> None:
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, used + 4))
        remove_tree(top, b"tree")

    in_child(remove)
    assert os.listdir(tmp_path) == []


def test_what_is_missing_is_fine(top: int) -> None:
    remove_tree(top, b"nothing")


def test_links_are_removed_and_not_followed(tmp_path: Path, top: int) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("../kept")
    (tmp_path / "link").symlink_to("kept")
    for name in (b"tree", b"link"):
        remove_tree(top, name)
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert (tmp_path / "kept" / "file").exists()


def test_what_is_mounted_in_it_stays(tmp_path: Path, top: int) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "tree" / "a" / "point").mkdir(parents=True)
    subprocess.run(["mount", "--bind", tmp_path / "kept", tmp_path / "tree/a/point"], check=True)
    try:
        with pytest.raises(OSError) as caught:
            remove_tree(top, b"tree")
        assert caught.value.errno == errno.EBUSY
        assert (tmp_path / "kept" / "file").exists()
    finally:
        subprocess.run(["umount", tmp_path / "tree/a/point"], check=True)
    remove_tree(top, b"tree")
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("mode", [0, 0o100, 0o400, 0o500, 0o600])
def test_a_user_removes_what_forbids_it(tmp_path: Path, top: int, mode: int) -> None:
    tmp_path.chmod(0o777)
    for path in ("tree", "tree/a", "tree/a/b"):
        (tmp_path / path).mkdir()
        (tmp_path / path / "file").write_text("x")
    for path in ("tree/a/b/file", "tree/a/b", "tree/a/file", "tree/a", "tree/file", "tree"):
        os.chown(tmp_path / path, NOBODY, NOBODY)
        (tmp_path / path).chmod(mode)
    as_user(NOBODY, lambda: remove_tree(top, b"tree"))
    assert os.listdir(tmp_path) == []


def test_somebody_elses_is_refused(tmp_path: Path, top: int) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "file").write_text("x")
    os.chown(tmp_path / "tree", NOBODY, NOBODY)
    with pytest.raises(PermissionError):
        as_user(NOBODY, lambda: remove_tree(top, b"tree"))
    assert (tmp_path / "tree" / "a" / "file").exists()


def test_one_that_keeps_being_filled_is_given_up(tmp_path: Path, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "file").write_text("x")
    rmdir = os.rmdir

    def refill(name: bytes, *, dir_fd: int) -> None:
        if name == b"a":
            (tmp_path / "tree" / "a" / "new").write_text("x")
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refill)
    with pytest.raises(OSError) as caught:
        remove_tree(top, b"tree")
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_directory_that_is_moved_away_meanwhile(tmp_path: Path, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("tree/a/b", "kept/b"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "file").write_text("x")
    (tmp_path / "kept" / "a").mkdir()
    unlink = os.unlink

    def move(name: bytes, *, dir_fd: int) -> None:
        unlink(name, dir_fd=dir_fd)
        if name == b"file":
            os.rename(tmp_path / "tree" / "a" / "b", tmp_path / "kept" / "moved")
            monkeypatch.setattr(os, "unlink", unlink)

    monkeypatch.setattr(os, "unlink", move)
    remove_tree(top, b"tree")
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert sorted(os.listdir(tmp_path / "kept")) == ["a", "b", "moved"]
    assert (tmp_path / "kept" / "b" / "file").exists()


def test_a_tree_is_measured_as_du_does(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "file").write_bytes(bytes(10_000))
    (tree / "second name").hardlink_to(tree / "d" / "file")
    (tree / "link").symlink_to("nowhere")
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    os.sync()
    du = subprocess.run(["du", "-s", "-B", str(BLOCK_BYTES), tree], check=True, capture_output=True, text=True)
    entered: list[int] = []
    size = measure_tree(str(tree), lambda fd: entered.append(os.fstat(fd).st_ino))
    length = 10_000 + len("nowhere") + (1 << 30)
    assert size == TreeSize(5, length, int(du.stdout.split()[0]) * BLOCK_BYTES)
    assert entered == [tree.stat().st_ino, (tree / "d").stat().st_ino]
