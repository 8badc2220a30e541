"""The next files are read ahead for who opens files in the order of their listing."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import cached_pages
from unionfs.fuse_ops.options import parse_options
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.speedups.expected_opens import ExpectedOpens
from unionfs.fuse_ops.speedups.file_ahead import FileReadAhead
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.union_tree import UnionTree

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
        ahead.took(1.0)
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


def test_nothing_in_another_order(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    open_in(tree, ahead, 10)
    drop(layer)
    for number in range(10, 0, -1):
        open_in(tree, ahead, number)
    assert in_memory(layer) == []


def test_nothing_while_files_come_from_memory(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    for _ in range(100):
        ahead.took(10e-6)
    drop(layer)
    open_in(tree, ahead, 0)
    assert in_memory(layer) == []


def test_only_lower_files(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    directory = tree.lookup(tree.root, b"d")
    tree.lookup(directory, NAMES[1]).upper = True
    tree.lookup(directory, NAMES[2]).kind = stat.S_IFIFO
    drop(layer)
    open_in(tree, ahead, 0)
    soon_in_memory(layer, [3])
    tree.lookup(directory, NAMES[1]).upper = False


def test_few_listings_are_kept(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    for number in range(100):
        ahead.listed(tree.inodes.new(stat.S_IFDIR, 1000 + number), [])
    drop(layer)
    open_in(tree, ahead, 0)
    assert in_memory(layer) == []


def test_a_file_that_is_looked_up_by_who_opens_such(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    directory = tree.lookup(tree.root, b"d")
    drop(layer)
    for number in range(4):
        ahead.looked_up(tree.lookup(directory, NAMES[number]))
        ahead.expected.opened(tree.lookup(directory, NAMES[number]))
    assert in_memory(layer) == []  # not known until now
    ahead.looked_up(tree.lookup(directory, NAMES[20]))
    soon_in_memory(layer, [20])
    ahead.looked_up(directory)
    ahead.expected.opened(tree.lookup(directory, NAMES[20]))
    ahead.looked_up(tree.lookup(directory, NAMES[30]))
    soon_in_memory(layer, [20, 30])


def test_a_file_that_cannot_be_read_ahead_is_looked_up_all_the_same(
    tree: UnionTree, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = cold_reader(tree)
    directory = tree.lookup(tree.root, b"d")
    for number in range(4):
        ahead.looked_up(tree.lookup(directory, NAMES[number]))
        ahead.expected.opened(tree.lookup(directory, NAMES[number]))
    asked: list[int] = []

    def refuse(fd: int, offset: int, length: int, advice: int) -> None:
        asked.append(fd)
        raise OSError(errno.EINVAL, "not on this file system")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    ahead.looked_up(tree.lookup(directory, NAMES[20]))
    (fd,) = asked
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)  # closed


def test_no_file_that_is_looked_up_while_files_come_from_memory(tree: UnionTree, layer: Path) -> None:
    ahead = cold_reader(tree)
    directory = tree.lookup(tree.root, b"d")
    for number in range(10):
        ahead.looked_up(tree.lookup(directory, NAMES[number]))
        ahead.expected.opened(tree.lookup(directory, NAMES[number]))
        for _ in range(10):
            ahead.took(10e-6)
    drop(layer)
    ahead.looked_up(tree.lookup(directory, NAMES[20]))
    assert in_memory(layer) == []


def test_who_only_asks_for_attributes_is_told_from_who_opens(tree: UnionTree) -> None:
    files = [tree.inodes.new(stat.S_IFREG, 1000 + number) for number in range(100)]
    expected = ExpectedOpens()
    assert not any(expected.looked_up(file) for file in files)
    for file in files:
        expected.looked_up(file)
        expected.opened(file)
    assert expected.looked_up(files[0])
    assert expected.looked_up(files[0])  # the same once more says nothing
    assert expected.looked_up(files[1])
    assert expected.looked_up(files[2])
    assert not expected.looked_up(files[3])
    expected.opened(files[1])  # not the last one
    assert not expected.looked_up(files[4])


def test_kinds_of_files_are_told_apart(tree: UnionTree) -> None:
    """As Python imports modules: it looks at the source, and opens what was made of it."""

    def file(number: int, name: bytes) -> Inode:
        inode = tree.inodes.new(stat.S_IFREG, 1000 + number)
        inode.add_place(tree.root, name)
        return inode

    expected = ExpectedOpens()
    for number in range(10):
        likely = number >= 4
        assert not expected.looked_up(file(number, b"module-%d.py" % number))
        compiled = file(number, b"module-%d.pyc" % number)
        assert expected.looked_up(compiled) is likely, number
        expected.opened(compiled)
    assert not expected.looked_up(file(99, b"other.txt"))  # nothing is known of such, and not all are opened
    for number in range(300):  # of names that nobody will see again
        expected.looked_up(file(number, b"temporary.%d" % number))
    assert len(expected._kinds) <= 256


def test_a_mount_reads_what_is_looked_up_by_who_opens_such(direct_box: Sandbox) -> None:
    box = direct_box
    layer = box.lower()
    for name in NAMES:
        layer.file(name.decode(), b"x" * 5000)
    with box.mount():
        drop(Path(box.lowers[0]))
        for number in range(12):
            with open(box.at(NAMES[number].decode()), "rb") as file:
                assert len(file.read()) == 5000
        assert os.stat(box.at(NAMES[30].decode())).st_size == 5000
        soon_in_memory(Path(box.lowers[0]), [*range(12), 30])
