"""Trees deeper than what one path can name: everything goes by descriptors, in pieces, and without recursion."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.trees import ROOT, open_union
from unionfs.fuse_ops.tree.inodes import Inode, as_file
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.files import remove_tree

NAME = b"directory"
DEPTH = 1100  # more than the interpreter would recurse, and twice PATH_MAX


@pytest.fixture
def dirs(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    fd = os.open(tmp_path / "lower", os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir(NAME, dir_fd=fd)
        below = os.open(NAME, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    with open(os.open("data", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "w") as file:
        file.write("contents")
    os.mkdir("sub", dir_fd=fd)
    os.close(fd)
    yield tmp_path
    top = os.open(tmp_path, os.O_RDONLY)
    for name in ("lower", "upper", "work"):  # pytest's own removal recurses
        remove_tree(top, name.encode())
    os.close(top)


def union(dirs: Path, **changes: object) -> UnionTree:
    tree = open_union(dirs, "lower", **changes)
    tree.view._cache._limit = 64
    return tree


def bottom(tree: UnionTree) -> Inode:
    inode: Inode = tree.root
    for _ in range(DEPTH):
        inode = tree.lookup(inode, NAME)
    return inode


def read(tree: UnionTree, inode: Inode) -> bytes:
    file = tree.open(inode, os.O_RDONLY)
    try:
        return os.pread(file.fd, 100, 0)
    finally:
        tree.close_file(file)


@pytest.mark.disk
def test_changes_at_the_bottom(dirs: Path) -> None:
    tree = union(dirs)
    here = bottom(tree)
    assert sorted(tree.names(here)) == [b"data", b"file", b"sub"]
    assert read(tree, tree.lookup(here, b"data")) == b"contents"
    number = tree.attributes(tree.lookup(here, b"file")).ino
    tree.set_xattr(tree.lookup(here, b"file"), b"user.x", b"value")
    tree.set_attributes(tree.lookup(here, b"sub"), AttributeChange(mode=0o711), ROOT)
    tree.rename(here, b"sub", here, b"moved")
    with pytest.raises(OSError) as caught:  # its path has no room in an attribute: as between file systems
        tree.rename(here, b"moved", tree.root, b"moved")
    assert caught.value.errno == errno.EXDEV
    tree.rename(here, b"data", tree.root, b"data")
    tree.close()

    tree = union(dirs)
    here = bottom(tree)
    assert sorted(tree.names(here)) == [b"file", b"moved"]
    assert tree.get_xattr(tree.lookup(here, b"file"), b"user.x") == b"value"
    assert tree.attributes(tree.lookup(here, b"file")).ino == number
    assert read(tree, tree.lookup(tree.root, b"data")) == b"contents"
    tree.close()


@pytest.mark.disk
def test_a_metacopy_that_leaves_the_bottom_gets_its_data(dirs: Path) -> None:
    tree = union(dirs, metacopy=True)
    here = bottom(tree)
    data = as_file(tree.lookup(here, b"data"))
    tree.set_attributes(data, AttributeChange(mode=0o600), ROOT)
    assert data.metacopy
    tree.rename(here, b"data", tree.root, b"data")
    assert not data.metacopy
    assert read(tree, data) == b"contents"
    tree.close()


@pytest.mark.parametrize("remount", [False, True])
def test_all_of_it_is_removed(dirs: Path, remount: bool) -> None:
    tree = union(dirs)
    here = bottom(tree)
    for name in (b"data", b"file"):
        tree.unlink(here, name)
    tree.rmdir(here, b"sub")
    if remount:
        tree.close()
        tree = union(dirs)
        here = bottom(tree)
    while here.parent is not None:
        above = here.parent
        tree.rmdir(above, NAME)
        here = above
    assert tree.names(tree.root) == []
    tree.close()
    assert os.listdir(dirs / "upper") == [NAME.decode()]  # the whiteout


def test_a_server_that_died_left_it_in_the_work_directory(dirs: Path) -> None:
    union(dirs).close()
    os.rename(dirs / "lower", dirs / "work" / "work" / "#1")
    (dirs / "lower").mkdir()
    union(dirs).close()
    assert os.listdir(dirs / "work" / "work") == []


def test_copies_that_a_crash_has_left_unsynced(dirs: Path) -> None:
    tree = union(dirs)
    here = bottom(tree)
    data = as_file(tree.lookup(here, b"data"))
    tree.set_attributes(data, AttributeChange(mode=0o640), ROOT)
    assert data.unsynced
    path, _ = tree.view.proc_path(data)
    with open(path, "r+b") as file:
        file.write(bytes(8))  # as the crash left it
    assert tree._claim is not None
    tree._claim.close()  # which a server that died does not hold either
    tree._claim = None
    again = union(dirs)
    assert again.warnings == []
    assert read(again, again.lookup(bottom(again), b"data")) == b"contents"
    again.close()


@pytest.mark.disk
def test_what_it_takes_is_counted(dirs: Path) -> None:
    tree = union(dirs)
    here = bottom(tree)
    file = tree.open(tree.lookup(here, b"data"), os.O_RDWR)
    os.pwrite(file.fd, bytes(1 << 20), 0)
    tree.close_file(file)
    tree.close()
    tree = union(dirs, quota_bytes=1 << 30)
    assert tree.space is not None
    assert tree.space.used_bytes >= DEPTH * 4096 + (1 << 20)
    tree.close()
