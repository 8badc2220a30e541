"""Files of several names in a layer: one file while mounted, and no room for what nobody can find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.snapshot import upper_entries
from tests.support.trees import ROOT, at, open_union, place
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree


@pytest.fixture
def dirs(tmp_path: Path) -> Path:
    for name in ("low1", "low2/d", "upper", "work", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "low2" / "a").write_text("old")
    return tmp_path


def link(dirs: Path, *names: str) -> None:
    for name in names:
        (dirs / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(dirs / "low2" / "a", dirs / name)


def write(tree: UnionTree, path: str, data: bytes = b"new") -> None:
    file = tree.open(at(tree, path), os.O_WRONLY)
    os.pwrite(file.fd, data, 0)
    tree.close_file(file)


def read(tree: UnionTree, path: str) -> bytes:
    file = tree.open(at(tree, path), os.O_RDONLY)
    try:
        return os.pread(file.fd, 100, 0)
    finally:
        tree.close_file(file)


def staged(dirs: Path) -> list[str]:
    """What lies in the work directory, but for the whiteout that others are links of."""
    work = dirs / "work" / "work"
    return [name for name in os.listdir(work) if not (work / name).is_char_device()]


def search(tree: UnionTree) -> bool:
    """Search for further names, as after each request that removes one; whether there was anything to search."""
    found = tree.hard_links.begin_search()
    if found is None:
        return False
    tree.hard_links.finish_search(found())
    return True


# -- looking changes nothing ----------------------------------------------------------------------------------


def test_a_lookup_changes_nothing(dirs: Path) -> None:
    link(dirs, "low2/d/b")
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    before = upper_entries(str(dirs / "upper"))
    assert read(tree, "d/b") == b"new"
    assert tree.attributes(at(tree, "d/b")) == tree.attributes(at(tree, "a"))
    assert upper_entries(str(dirs / "upper")) == before == {"a": "file"}
    tree.close()


CHANGES: dict[str, Callable[[UnionTree], None]] = {
    "mode": lambda tree: tree.set_attributes(at(tree, "d/b"), AttributeChange(mode=0o600), ROOT) and None,
    "xattr": lambda tree: tree.set_xattr(at(tree, "d/b"), b"user.x", b"1"),
    "contents": lambda tree: write(tree, "d/b"),
    "rename": lambda tree: tree.rename(at(tree, "d"), b"b", at(tree, "d"), b"b2"),
    "exchange": lambda tree: tree.rename(at(tree, "d"), b"b", at(tree, "d"), b"other", 2),
    "link": lambda tree: tree.link(at(tree, "d/b"), at(tree, "d"), b"b2"),
    "end": lambda tree: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_looked_up_is_kept(dirs: Path, change: str) -> None:
    link(dirs, "low2/d/b")
    (dirs / "low2" / "d" / "other").write_text("other")
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    at(tree, "d/b")
    CHANGES[change](tree)
    if change == "rename":
        assert tree.find(at(tree, "d"), b"b") is None
    tree.close()
    assert staged(dirs) == []
    tree = open_union(dirs, "low1", "low2")
    name = {"rename": "d/b2", "exchange": "d/other"}.get(change, "d/b")
    assert read(tree, name) == b"new"
    assert at(tree, name) is at(tree, "a")
    tree.close()


@pytest.mark.parametrize("how", ["unlink", "rename over"])
def test_a_name_that_was_only_looked_up_is_removed(dirs: Path, how: str) -> None:
    link(dirs, "low2/d/b", "low2/d/c")
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    d = at(tree, "d")
    at(tree, "d/b")
    if how == "unlink":
        tree.unlink(d, b"b")
        assert tree.find(d, b"b") is None
    else:
        tree.mknod(d, b"file", 0o100644, 0, ROOT)
        tree.rename(d, b"file", d, b"b")
    assert tree.attributes(at(tree, "a")).nlink == 2
    assert not search(tree)
    assert read(tree, "d/c") == b"new"
    tree.close()
    tree = open_union(dirs, "low1", "low2")
    if how == "unlink":
        assert tree.find(at(tree, "d"), b"b") is None
    else:
        assert read(tree, "d/b") == b""
    tree.close()


# -- no room for what nobody can find -------------------------------------------------------------------------


def remove(tree: UnionTree, path: str, how: str = "unlink") -> None:
    if how == "unlink":
        tree.unlink(*place(tree, path))
    else:
        tree.mknod(tree.root, b"file", 0o100644, 0, ROOT)
        tree.rename(tree.root, b"file", *place(tree, path))


@pytest.mark.parametrize("how", ["unlink", "rename over"])
def test_names_outside_of_the_layers_do_not_count(dirs: Path, how: str) -> None:
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    remove(tree, "a", how)
    assert staged(dirs) != []
    assert search(tree)
    assert staged(dirs) == []
    tree.close()


def test_the_layers_are_searched_once(dirs: Path) -> None:
    (dirs / "low2" / "other").write_text("old")
    os.link(dirs / "low2" / "other", dirs / "outside" / "other")
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2")
    for name in ("a", "other"):
        write(tree, name)
    remove(tree, "a")
    assert search(tree)
    remove(tree, "other")
    assert not search(tree)
    assert staged(dirs) == []
    tree.close()


@pytest.mark.parametrize("other", ["low2/b", "low2/d/b", "low1/b"])
def test_a_further_name_finds_the_changed_file(dirs: Path, other: str) -> None:
    link(dirs, other)
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    remove(tree, "a")
    search(tree)
    name = other.partition("/")[2]
    assert read(tree, name) == b"new"
    remove(tree, name)
    search(tree)
    assert staged(dirs) == []
    tree.close()


@pytest.mark.parametrize("hidden_by", ["whiteout", "mark", "file", "opaque", "removed before"])
def test_names_that_the_merged_tree_does_not_have(dirs: Path, hidden_by: str) -> None:
    link(dirs, "low2/d/b")
    (dirs / "low1" / "d").mkdir()
    if hidden_by == "whiteout":
        os.mknod(dirs / "low1" / "d" / "b", 0o020000, 0)
    elif hidden_by == "mark":
        (dirs / "low1" / "d" / ".wh.b").write_text("")
    elif hidden_by == "file":
        (dirs / "low1" / "d" / "b").write_text("other")
    elif hidden_by == "opaque":
        os.setxattr(dirs / "low1" / "d", "trusted.overlay.opaque", b"y")
    else:
        tree = open_union(dirs, "low1", "low2")
        remove(tree, "d/b")
        tree.close()
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    remove(tree, "a")
    assert search(tree)
    assert staged(dirs) == []
    tree.close()


@pytest.mark.parametrize("when", ["in this mount", "in an earlier one", "in a lower layer"])
def test_a_name_in_a_directory_that_was_moved_counts(dirs: Path, when: str) -> None:
    link(dirs, "low2/d/sub/b")
    if when == "in a lower layer":
        os.mknod(dirs / "low1" / "d", 0o020000, 0)
        (dirs / "low1" / "moved").mkdir()
        os.setxattr(dirs / "low1" / "moved", "trusted.overlay.redirect", b"/d")
    tree = open_union(dirs, "low1", "low2")
    if when == "in an earlier one":
        tree.rename(tree.root, b"d", tree.root, b"moved")
        tree.close()
        tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    if when == "in this mount":
        tree.rename(tree.root, b"d", tree.root, b"moved")
    remove(tree, "a")
    assert search(tree)
    assert read(tree, "moved/sub/b") == b"new"
    tree.close()


def test_an_open_file_that_lost_its_names(dirs: Path) -> None:
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2")
    inode = at(tree, "a")
    inode.lookups += 1
    file = tree.open(inode, os.O_RDWR)
    remove(tree, "a")
    assert search(tree)
    os.pwrite(file.fd, b"more", 3)
    assert os.pread(file.fd, 10, 0) == b"oldmore"
    tree.set_attributes(inode, AttributeChange(mode=0o600), ROOT)
    assert tree.attributes(inode).nlink == 0
    tree.close_file(file)
    tree.forget(inode, 1)
    assert len(tree.inodes) == 1
    tree.close()


def test_a_file_that_is_copied_after_it_lost_its_names(dirs: Path) -> None:
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2")
    inode = at(tree, "a")
    file = tree.open(inode, os.O_RDONLY)
    remove(tree, "a")
    assert not search(tree), "there is nothing in the upper directory yet"
    tree.set_attributes(inode, AttributeChange(mode=0o600), ROOT)
    assert search(tree)
    assert staged(dirs) == []
    tree.close_file(file)
    tree.close()


def test_what_cannot_be_searched_is_kept(dirs: Path) -> None:
    """Nobody can say that there is no name; it goes when the mount ends."""
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2")
    write(tree, "a")
    remove(tree, "a")
    assert tree.hard_links.begin_search() is not None
    assert tree.hard_links.begin_search() is None, "one search at a time"
    tree.hard_links.finish_search(None)
    assert staged(dirs) != []
    assert search(tree), "the next request tries again"
    tree.close()
    assert staged(dirs) == []


def test_the_room_of_a_limited_tree_comes_back(dirs: Path) -> None:
    link(dirs, "outside/a")
    tree = open_union(dirs, "low1", "low2", quota_bytes=1 << 20)
    assert tree.space is not None
    before = tree.space.used_bytes
    write(tree, "a", bytes(900_000))
    file = tree.open(at(tree, "a"), os.O_RDONLY)
    tree.space.recount(os.fstat(file.fd))  # requests do that after a write
    tree.close_file(file)
    remove(tree, "a")
    assert tree.space.used_bytes > 900_000
    assert search(tree)
    assert tree.space.used_bytes <= before + 8192
    tree.close()
