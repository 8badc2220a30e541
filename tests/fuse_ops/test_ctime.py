"""The time of the last change: nothing that the server does by itself may move it, in a tree without a mount.

tar(1) says "file changed as we read it" when it does, and a backup takes the file again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.trees import Caller, open_union
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, as_file
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host import syscalls

if os.geteuid() != 0:
    pytest.skip("needs root for trusted attributes", allow_module_level=True)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[UnionTree]:
    for name in ("low/d/deep", "upper", "work"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file", "linked", "d/one", "d/two", "d/deep/three"):
        (tmp_path / "low" / name).write_text(name)
    os.link(tmp_path / "low" / "linked", tmp_path / "low" / "d" / "other name")
    tree = open_union(tmp_path, "low")
    yield tree
    tree.close()


def at(tree: UnionTree, path: str) -> Inode:
    inode = trees.at(tree, path)
    inode.lookups += 1  # as the kernel, which remembers it
    return inode


def chmod(tree: UnionTree, path: str, mode: int = 0o600) -> Inode:
    inode = at(tree, path)
    tree.set_attributes(inode, AttributeChange(mode=mode), Caller())
    return inode


def ctime(tree: UnionTree, path: str) -> int:
    return tree.attributes(at(tree, path)).ctime_ns


def settle(tree: UnionTree, inode: FileInode, meanwhile: Callable[[], object] = lambda: None) -> None:
    job = tree.copy_up.begin_sync(inode)
    job.run()
    meanwhile()
    tree.copy_up.finish(job)


def test_syncing_a_copy_later_does_not_show(tree: UnionTree, tmp_path: Path) -> None:
    inode = as_file(chmod(tree, "file"))
    assert inode.unsynced
    before = tree.attributes(inode)
    settle(tree, inode)
    assert not inode.unsynced
    assert tree.attributes(inode) == before
    on_disk = os.stat(tmp_path / "upper" / "file").st_ctime_ns
    assert on_disk > before.ctime_ns, "nothing was there to hide"
    path, follow = tree.view.proc_path(inode)
    statx = p.statx_with(
        syscalls.statx(syscalls.AT_FDCWD, path, 0 if follow else syscalls.AT_SYMLINK_NOFOLLOW, 0xFFF), before
    )
    assert before.ctime_ns == int.from_bytes(statx[96:104], "little") * 10**9 + int.from_bytes(statx[104:108], "little")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree, inode: tree.set_attributes(inode, AttributeChange(mode=0o640), Caller()),
        lambda tree, inode: tree.set_xattr(inode, b"user.x", b"y"),
        lambda tree, inode: tree.link(inode, tree.root, b"again"),
        lambda tree, inode: tree.rename(tree.root, b"file", tree.root, b"moved", 0, Caller()),
        lambda tree, inode: tree.close_file(tree.open(inode, os.O_WRONLY | os.O_TRUNC)),
    ],
    ids=["chmod", "setxattr", "link", "rename", "truncate"],
)
def test_what_somebody_changes_after_that_shows(
    tree: UnionTree, change: Callable[[UnionTree, Inode], object], tmp_path: Path
) -> None:
    inode = as_file(chmod(tree, "file"))
    settle(tree, inode)
    change(tree, inode)
    path, _ = tree.view.proc_path(inode)
    assert tree.attributes(inode).ctime_ns == os.stat(path).st_ctime_ns


def test_what_somebody_changes_meanwhile_shows(tree: UnionTree, tmp_path: Path) -> None:
    inode = as_file(chmod(tree, "file"))
    before = tree.attributes(inode)
    settle(tree, inode, lambda: chmod(tree, "file", 0o640))
    assert tree.attributes(inode).ctime_ns > before.ctime_ns


def test_further_names_of_a_file_do_not_show(tree: UnionTree, tmp_path: Path) -> None:
    inode = as_file(chmod(tree, "linked"))
    before = tree.attributes(inode)
    assert at(tree, "d/other name") is inode
    tree.copy_up.place_names(inode)
    assert os.stat(tmp_path / "upper" / "d" / "other name").st_nlink > 2
    assert tree.attributes(inode) == before


def test_copies_do_not_show_in_their_directories(tree: UnionTree, tmp_path: Path) -> None:
    before = {path: ctime(tree, path) for path in ("", "d", "d/deep")}
    chmod(tree, "d/deep/three")
    chmod(tree, "d/one")
    chmod(tree, "file")
    at(tree, "d/other name")
    chmod(tree, "linked")
    assert b"trusted.overlay.impure" in map(os.fsencode, os.listxattr(tmp_path / "upper" / "d"))
    assert {path: ctime(tree, path) for path in before} == before


def test_what_somebody_does_in_a_directory_shows(tree: UnionTree, tmp_path: Path) -> None:
    chmod(tree, "d/one")
    before = ctime(tree, "d")
    tree.mkdir(at(tree, "d"), b"new", 0o755, Caller())
    after = ctime(tree, "d")
    assert after > before
    chmod(tree, "d/two")
    assert ctime(tree, "d") == after
    tree.unlink(at(tree, "d"), b"two")
    assert ctime(tree, "d") > after
    chmod(tree, "d", 0o700)
    assert ctime(tree, "d") == os.stat(tmp_path / "upper" / "d").st_ctime_ns
