"""The mark of upper directories that hold what was copied up: as the kernel has it, once it has listed them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import mounted_overlay
from tests.support.syscalls import renameat2
from tests.support.trees import ROOT
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree

IMPURE = "trusted.overlay.impure"


class Ours:
    """A tree, by paths."""

    def __init__(self, tree: UnionTree) -> None:
        self.tree = tree

    def at(self, path: str) -> Inode:
        inode: Inode = self.tree.root
        for name in path.split("/"):
            inode = self.tree.lookup(inode, name.encode())
        return inode

    def _place(self, path: str) -> tuple[Inode, bytes]:
        parent, _, name = path.rpartition("/")
        return (self.at(parent) if parent else self.tree.root), name.encode()

    def mkdir(self, path: str) -> None:
        self.tree.mkdir(*self._place(path), 0o755, ROOT)

    def new(self, path: str) -> None:
        self.tree.mknod(*self._place(path), 0o100644, 0, ROOT)

    def mv(self, old: str, new: str) -> None:
        self.tree.rename(*self._place(old), *self._place(new))

    def swap(self, one: str, other: str) -> None:
        self.tree.rename(*self._place(one), *self._place(other), 2)

    def ln(self, old: str, new: str) -> None:
        self.tree.link(self.at(old), *self._place(new))

    def rm(self, path: str) -> None:
        self.tree.unlink(*self._place(path))

    def chmod(self, path: str) -> None:
        self.tree.set_attributes(self.at(path), AttributeChange(mode=0o700), ROOT)


class Kernels:
    """A mount of the kernel's."""

    def __init__(self, mnt: str) -> None:
        self.mnt = mnt

    def _path(self, path: str) -> str:
        return os.path.join(self.mnt, path)

    def mkdir(self, path: str) -> None:
        os.mkdir(self._path(path))

    def new(self, path: str) -> None:
        os.close(os.open(self._path(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    def mv(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))

    def swap(self, one: str, other: str) -> None:
        renameat2(self._path(one), self._path(other), 2)

    def ln(self, old: str, new: str) -> None:
        os.link(self._path(old), self._path(new))

    def rm(self, path: str) -> None:
        os.unlink(self._path(path))

    def chmod(self, path: str) -> None:
        os.chmod(self._path(path), 0o700)


START = ["mkdir d", "new d/plain", "mv f d/f"]
CASES = {
    "there": START,
    "removed": [*START, "rm d/f"],
    "one of two is removed": [*START, "mv g d/g", "rm d/f"],
    "both are removed": [*START, "mv g d/g", "rm d/f", "rm d/g"],
    "another is removed": [*START, "rm d/plain"],
    "moved away": [*START, "mkdir e", "mv d/f e/f"],
    "moved in it": [*START, "mv d/f d/f2"],
    "moved in it and removed": [*START, "mv d/f d/f2", "rm d/f2"],
    "replaced": [*START, "mv d/plain d/f"],
    "replaces": [*START, "mv d/f d/plain"],
    "replaced by another": [*START, "mv g d/f"],
    "exchanged for a plain one": [*START, "mkdir e", "new e/x", "swap d/f e/x"],
    "exchanged for one like it": [*START, "mkdir e", "mv g e/g", "swap d/f e/g"],
    "exchanged in it": [*START, "swap d/f d/plain"],
    "a link of it is removed": [*START, "ln d/f d/f2", "rm d/f"],
    "all links are removed": [*START, "ln d/f d/f2", "rm d/f", "rm d/f2"],
    "a directory": ["mkdir d", "mv low d/low", "mv d/low low2"],
    "a merged directory": ["chmod low/x", "rm low/x"],
    "comes again": [*START, "rm d/f", "mv g d/g"],
}


def impure(upper: Path) -> dict[str, bool]:
    found = {}
    for top, _, _ in os.walk(upper):
        found[os.path.relpath(top, upper)] = IMPURE in os.listxattr(top)
    return found


@pytest.mark.parametrize("remount", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_marked_as_by_the_kernel(tmp_path: Path, case: str, remount: bool) -> None:
    (tmp_path / "mnt").mkdir()
    marks = []
    for who in ("ours", "kernel"):
        for name in ("lower/low", "upper", "work"):
            (tmp_path / who / name).mkdir(parents=True)
        for name in ("f", "g", "low/x", "low/y"):
            (tmp_path / who / "lower" / name).write_text(name)
        lower, upper, work = (str(tmp_path / who / name) for name in ("lower", "upper", "work"))
        steps = CASES[case]
        for part in [steps[:-1], steps[-1:]] if remount else [steps]:
            if who == "kernel":
                with mounted_overlay([lower], upper, work, str(tmp_path / "mnt")) as mnt:
                    for step in part:
                        command, *paths = step.split()
                        getattr(Kernels(mnt), command)(*paths)
                        for top, _, _ in os.walk(mnt):  # it looks when it lists
                            os.listdir(top)
                continue
            tree = open_tree(MountOptions(lowerdirs=(lower,), upperdir=upper, workdir=work))
            for step in part:
                command, *paths = step.split()
                getattr(Ours(tree), command)(*paths)
            tree.close()
        marks.append(impure(tmp_path / who / "upper"))
    assert marks[0] == marks[1]
