"""Merging lower layers: what is hidden stays hidden, also by another way to it and after a remount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.trees import at, open_union
from unionfs.fuse_ops.options import RedirectMode
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree


class User:
    uid = gid = pid = 0


def layers(top: Path, *paths: str) -> None:
    """Make directories (with a slash at the end) and files that contain their path."""
    for name in ("l1", "l2", "l3", "upper", "work"):
        (top / name).mkdir(exist_ok=True)
    for path in paths:
        place = top / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            place.mkdir(exist_ok=True)
        else:
            place.write_text(path)


def listed(tree: UnionTree, path: str) -> list[str]:
    inode = at(tree, path) if path else tree.root
    by_list = sorted(os.fsdecode(name) for name in tree.names(inode))
    assert all(tree.find(inode, name.encode()) is not None for name in by_list)
    return by_list


def contents(tree: UnionTree, path: str) -> str:
    file = tree.open(at(tree, path), os.O_RDONLY)
    try:
        return os.pread(file.fd, 1000, 0).decode()
    finally:
        tree.close_file(file)


@pytest.mark.parametrize("target", ["b", "a/y"])
@pytest.mark.parametrize("known", [False, True])
def test_what_a_mark_hides_stays_hidden_after_a_move(tmp_path: Path, target: str, known: bool) -> None:
    layers(tmp_path, "l1/a/.wh..wh..opq", "l1/a/x/new", "l2/a/x/old")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    if known:
        assert listed(tree, "a") == ["x"]
        assert listed(tree, "a/x") == ["new"]
    parent, _, name = target.rpartition("/")
    directory = at(tree, parent) if parent else tree.root
    tree.rename(at(tree, "a"), b"x", directory, name.encode())
    assert listed(tree, target) == ["new"]
    tree.close()
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, target) == ["new"]
    tree.close()


def test_a_mark_at_the_top_of_a_layer(tmp_path: Path) -> None:
    layers(tmp_path, "l1/a/one", "l1/other", "l2/.wh..wh..opq", "l2/a/two", "l3/a/three", "l3/hidden")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "") == ["a", "other"]
    tree.rename(tree.root, b"a", tree.root, b"b")
    tree.close()
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "b") == ["one", "two"]
    assert tree.find(tree.root, b"hidden") is None
    tree.close()


@pytest.mark.parametrize("where", ["", "a/"])
def test_a_mark_in_the_upper_directory(tmp_path: Path, where: str) -> None:
    layers(tmp_path, f"upper/{where}.wh..wh..opq", "upper/a/x/new", "l1/a/x/old", "l1/a/old")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "a") == ["x"]
    assert listed(tree, "a/x") == ["new"]
    tree.rename(at(tree, "a"), b"x", tree.root, b"b")
    tree.close()
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "b") == ["new"]
    tree.close()


def test_a_mark_hides_the_data_of_a_metacopy(tmp_path: Path) -> None:
    layers(tmp_path, "l1/a/.wh..wh..opq", "l2/a/f", "l1/b/", "l2/b/f")
    for place in ("l1/a/f", "l1/b/f"):
        with open(tmp_path / place, "wb") as file:
            file.truncate(6)
        os.setxattr(tmp_path / place, "trusted.overlay.metacopy", b"")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert contents(tree, "b/f") == "l2/b/f"
    with pytest.raises(OSError) as caught:
        contents(tree, "a/f")
    assert caught.value.errno == errno.EIO
    tree.close()


@pytest.mark.parametrize("layer", ["l1", "l3"])
def test_a_metacopy_without_data_is_never_zeros(tmp_path: Path, layer: str) -> None:
    """Nor where no layer is left that could have it."""
    layers(tmp_path, f"{layer}/")
    with open(tmp_path / layer / "f", "wb") as file:
        file.truncate(6)
    os.setxattr(tmp_path / layer / "f", "trusted.overlay.metacopy", b"")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    with pytest.raises(OSError) as caught:
        contents(tree, "f")
    assert caught.value.errno == errno.EIO
    tree.close()


def test_an_opaque_directory_has_no_redirect(tmp_path: Path) -> None:
    layers(tmp_path, "upper/u/", "l1/m/", "l2/t/old", "l2/m/", "l3/t/", "l1/t/")
    for place in ("upper/u", "l1/m"):
        os.setxattr(tmp_path / place, "trusted.overlay.opaque", b"y")
        os.setxattr(tmp_path / place, "trusted.overlay.redirect", b"/t")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "u") == listed(tree, "m") == []
    tree.close()


def test_a_redirect_is_followed_beside_a_mark(tmp_path: Path) -> None:
    """The mark is of what was there before the directory was moved to this name."""
    layers(tmp_path, "upper/.wh.d", "upper/d/", "l1/t/x/", "l2/t/in_t", "l2/d/old")
    os.setxattr(tmp_path / "upper/d", "trusted.overlay.redirect", b"/t")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "d") == ["in_t", "x"]
    tree.close()


@pytest.mark.parametrize("where", ["l1", "upper"])
def test_redirects_that_are_not_to_be_followed(tmp_path: Path, where: str) -> None:
    layers(tmp_path, f"{where}/d/", "l2/t/in_t", "l2/d/", "l3/last/", "l2/t/f", f"{where}/e/top")
    os.setxattr(tmp_path / where / "d", "trusted.overlay.redirect", b"/t")
    os.setxattr(tmp_path / "l3/last", "trusted.overlay.redirect", b"/t")
    with open(tmp_path / where / "f", "wb") as file:
        file.truncate(6)
    os.setxattr(tmp_path / where / "f", "trusted.overlay.metacopy", b"")
    os.setxattr(tmp_path / where / "f", "trusted.overlay.redirect", b"/t/f")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "d") == ["f", "in_t"]
    assert contents(tree, "f") == "l2/t/f"
    tree.close()
    tree = open_union(tmp_path, "l1", "l2", "l3", redirect_dir=RedirectMode.NOFOLLOW)
    for name in (b"d", b"f"):
        with pytest.raises(PermissionError):
            tree.lookup(tree.root, name)
    assert listed(tree, "last") == [], "there is nothing to follow it to"
    tree.close()


def test_a_redirect_of_a_metacopy_is_checked(tmp_path: Path) -> None:
    layers(tmp_path, "l1/d/", "l2/d/g")
    with open(tmp_path / "l1/d/f", "wb") as file:
        file.truncate(6)
    os.setxattr(tmp_path / "l1/d/f", "trusted.overlay.metacopy", b"")
    for value, number in ((b"../d/g", errno.EINVAL), (b"/d/../d/g", errno.EACCES), (b"g", 0), (b"/d/g", 0)):
        os.setxattr(tmp_path / "l1/d/f", "trusted.overlay.redirect", value)
        tree = open_union(tmp_path, "l1", "l2", "l3")
        if number:
            with pytest.raises(OSError) as caught:
                at(tree, "d/f")
            assert caught.value.errno == number, value
        else:
            assert contents(tree, "d/f") == "l2/d/g"
        tree.close()


def test_what_is_made_below_a_marked_directory_is_kept(tmp_path: Path) -> None:
    """The directory is copied up; its copy says nothing of the layers below, and the mark still does."""
    layers(tmp_path, "l1/a/.wh..wh..opq", "l1/a/x/new", "l2/a/x/old", "l2/a/old")
    tree = open_union(tmp_path, "l1", "l2", "l3")
    tree.mkdir(at(tree, "a/x"), b"made", 0o755, User())
    tree.set_attributes(at(tree, "a"), AttributeChange(mode=0o700), User())
    tree.close()
    tree = open_union(tmp_path, "l1", "l2", "l3")
    assert listed(tree, "a") == ["x"]
    assert listed(tree, "a/x") == ["made", "new"]
    tree.close()


def test_as_many_redirects_as_layers(tmp_path: Path) -> None:
    """One rename in each layer; nothing recurses."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    for number in range(400):
        place = tmp_path / f"layer{number}" / f"d{number}"
        place.mkdir(parents=True)
        (place / f"f{number}").write_text("")
        os.setxattr(place, "trusted.overlay.redirect", b"%sd%d" % (b"/" if number % 2 else b"", number + 1))
    tree = open_union(
        tmp_path, "l1", "l2", "l3", lowerdirs=tuple(str(tmp_path / f"layer{number}") for number in range(400))
    )
    assert len(listed(tree, "d0")) == 400
    tree.close()
