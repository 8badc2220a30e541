"""The next files are read ahead for who opens files in the order of their listing."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import needs_root
from tests.support.syscalls import cached_pages
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.option_text import parse_options
from unionfs.fuse_ops.speedups.reading_ahead import FileReadAhead
from unionfs.fuse_ops.union.union_tree import UnionTree

pytest_plugins = ["tests.support.sandbox"]
needs_root()

NAMES = [b"%02d" % number for number in range(40)]


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "lower" / "d").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lower" / "d" / name.decode()).write_bytes(b"x" * 5000)
    (tmp_path / "empty").mkdir()
    return tmp_path / "lower" / "d"


@pytest.fixture
def tree(layer: Path) -> Iterator[UnionTree]:
    tree = open_tree(parse_options([f"lowerdir={layer.parents[1] / 'empty'}:{layer.parent}"]).options)
    yield tree
    tree.close()


def cold_reader(tree: UnionTree) -> FileReadAhead:
    """One that has found the disk slow, and was told of a listing."""
    directory = tree.lookup(tree.root, b"d")
    for name in NAMES:
        tree.lookup(directory, name)
    ahead = FileReadAhead()
    for _ in range(3):
        ahead.record_latency(1.0)
    ahead.listed(directory, NAMES)
    return ahead


def drop(layer: Path) -> None:
    """Take the files out of the page cache."""
    for name in NAMES:
        fd = os.open(layer / name.decode(), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    assert in_memory(layer) == []


def in_memory(layer: Path) -> list[int]:
    found = []
    for number, name in enumerate(NAMES):
        fd = os.open(layer / name.decode(), os.O_RDONLY)
        if cached_pages(fd):
            found.append(number)
        os.close(fd)
    return found


def soon_in_memory(layer: Path, expected: list[int]) -> None:
    """Reading ahead is not waited for."""
    deadline = time.monotonic() + 10
    while in_memory(layer) != expected and time.monotonic() < deadline:
        time.sleep(0.005)
    assert in_memory(layer) == expected


def open_in(tree: UnionTree, ahead: FileReadAhead, number: int) -> None:
    ahead.opened(tree.lookup(tree.lookup(tree.root, b"d"), NAMES[number]))


@pytest.mark.disk
def test_the_next_three(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    drop(layer)
    open_in(tree, ahead, 0)
    soon_in_memory(layer, [1, 2, 3])
    open_in(tree, ahead, 1)
    soon_in_memory(layer, [1, 2, 3, 4])
    open_in(tree, ahead, 5)  # some were something else for this program
    soon_in_memory(layer, [1, 2, 3, 4, 6, 7, 8])
    open_in(tree, ahead, 39 - 1)
    soon_in_memory(layer, [1, 2, 3, 4, 6, 7, 8])  # a leap: some other order
    for number in range(6, 40):
        open_in(tree, ahead, number)
    soon_in_memory(layer, [1, 2, 3, 4, *range(6, 40)])


def test_it_is_busy_for_a_moment(tree: UnionTree, layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ahead = cold_reader(tree)
    assert not ahead.busy
    open_in(tree, ahead, 0)
    assert ahead.busy
    now += 0.011
    assert not ahead.busy


@pytest.mark.disk
def test_nothing_in_another_order(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    open_in(tree, ahead, 10)
    drop(layer)
    for number in range(10, 0, -1):
        open_in(tree, ahead, number)
    assert in_memory(layer) == []


@pytest.mark.disk
def test_nothing_while_files_come_from_memory(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    for _ in range(100):
        ahead.record_latency(10e-6)
    drop(layer)
    open_in(tree, ahead, 0)
    assert in_memory(layer) == []


@pytest.mark.disk
def test_only_lower_files(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    directory = tree.lookup(tree.root, b"d")
    tree.lookup(directory, NAMES[1]).upper = True
    tree.lookup(directory, NAMES[2]).kind = stat.S_IFIFO
    drop(layer)
    open_in(tree, ahead, 0)
    soon_in_memory(layer, [3])
    tree.lookup(directory, NAMES[1]).upper = False


@pytest.mark.disk
def test_few_listings_are_kept(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    for number in range(100):
        ahead.listed(tree.inodes.new_directory(1000 + number), [])
    drop(layer)
    open_in(tree, ahead, 0)
    assert in_memory(layer) == []
