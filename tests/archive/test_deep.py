"""Trees of any depth: what is done with them takes time in proportion to what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.paths import assert_linear
from unionfs.archive.changes import changes_of_trees, changes_of_upper
from unionfs.archive.pack import pack_changes, pack_tree
from unionfs.archive.sizes import tree_size
from unionfs.drivers.tree_copy import copy_tree
from unionfs.host.files import remove_tree


def make_comb(root: Path, depth: int, content: bytes = b"x") -> Path:
    """``d/d/d...`` with a file and a directory ``e`` in each, so that a walk has something to do on its way back."""
    root.mkdir()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("e", dir_fd=fd)
        file = os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        os.write(file, content)
        os.close(file)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    return root


def remove(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(fd, os.fsencode(path.name))
    finally:
        os.close(fd)


def drain(pieces: Iterable[object]) -> int:
    return sum(1 for _ in pieces)


def copied(root: Path) -> None:
    target = root.with_name("target")
    target.mkdir()
    copy_tree(str(root), str(target))
    assert tree_size(target.__fspath__()) == tree_size(root.__fspath__())
    remove(target)


WALKS: dict[str, Callable[[Path, Path], object]] = {
    "size": lambda new, _: tree_size(str(new)),
    "copy": lambda new, _: copied(new),
    "pack": lambda new, _: drain(pack_tree(str(new))),
    "changes of trees": lambda new, old: drain(changes_of_trees(str(new), str(old), all_xattrs=True)),
    "changes of upper": lambda new, old: drain(changes_of_upper(str(new), [str(old)])),
    "pack changes": lambda new, old: drain(pack_changes(changes_of_upper(str(new), [str(old)]))),
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory that is removed even when the test fails: pytest cannot remove what is so deep."""
    path = tmp_path / "place"
    path.mkdir()
    yield path
    remove(path)


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_goes_through_each_level_once(place: Path, walk: str) -> None:
    for depth in (75, 300):
        make_comb(place / f"new{depth}", depth)
        make_comb(place / f"old{depth}", depth, b"y")
    assert_linear(lambda depth: WALKS[walk](place / f"new{depth}", place / f"old{depth}"), 75)
