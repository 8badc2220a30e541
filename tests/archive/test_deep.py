"""Trees of any depth: what is done with them takes time in proportion to what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.archive.tars import apply, directory, entry, hard_link, symlink
from tests.support.paths import assert_linear
from unionfs.archive.changes import changes_of_trees, changes_of_upper
from unionfs.archive.pack import pack_changes, pack_tree
from unionfs.archive.sizes import tree_size
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode
from unionfs.drivers.vfs import copy_tree
from unionfs.host.files import remove_tree


def make_comb(root: Path, depth: int, content: bytes | None = b"x", beside: str = "e") -> Path:
    """``d/d/d...`` with a file and a directory ``e`` in each, so that a walk has something to do on its way back."""
    root.mkdir()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.mkdir(beside, dir_fd=fd)
        if content is not None:
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


def test_looking_ahead_goes_to_the_bottom_once(place: Path) -> None:
    """Each level has "d" and "d-e", between whose lines the contents of "d" come: is there a change, far down?"""

    def run(depth: int) -> None:
        changes = list(changes_of_upper(str(place / f"new{depth}"), [str(place / f"old{depth}")]))
        assert len(changes) == depth + 1

    for depth in (75, 300):
        for tree, end in (("new", "1"), ("old", "2")):
            path = make_comb(place / f"{tree}{depth}", depth, None, "d-e")
            (path / "/".join("d" * depth) / "last").write_text(end)
    assert_linear(run, 75)


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


def deep(depth: int, *rest: str) -> str:
    return "/".join(["d"] * depth + list(rest))


LAYERS: dict[str, Callable[[int], list[bytes]]] = {
    "directories": lambda depth: [directory(deep(depth, *"x" * depth))],
    "file": lambda depth: [entry(deep(depth, "new"))],
    "whiteout of all": lambda _: [entry(".wh.d")],
    "whiteout at the bottom": lambda depth: [entry(deep(depth - 1, ".wh.d"))],
    "opaque": lambda _: [entry(".wh..wh..opq")],
    "opaque again and again": lambda depth: [entry("d/.wh..wh..opq")] * depth,
    "made and hidden": lambda depth: [directory("x/" + deep(depth)), entry(".wh.x"), entry("x/.wh..wh..opq")],
    "hard link": lambda depth: [hard_link("link", deep(depth - 1, "f"))],
    "link": lambda depth: [symlink("link", deep(min(depth, 200))), entry("link/new")],
}


@pytest.mark.parametrize("known", [False, True], ids=["a copy", "a layer"])
@pytest.mark.parametrize("what", LAYERS)
def test_unpacking_goes_through_each_level_once(place: Path, what: str, known: bool) -> None:
    for depth in (75, 300):
        make_comb(place / f"tree{depth}", depth)
        (place / f"layer{depth}").mkdir()

    def run(depth: int) -> None:
        tree, layer = place / f"tree{depth}", place / f"layer{depth}"
        if known:
            apply(
                layer, *LAYERS[what](depth), options=UnpackOptions(whiteouts=WhiteoutMode.OVERLAY, lowers=[str(tree)])
            )
        else:
            apply(tree, *LAYERS[what](depth))

    assert_linear(run, 75)
