"""A union's tree without a mount: opened over directories of a test, and looked at by paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.union.union_tree import UnionTree


@dataclass(frozen=True)
class Caller:
    """Who asks for a change."""

    uid: int = 0
    gid: int = 0
    pid: int = 0


ROOT = Caller()


def options_in(top: Path, *lowers: str, **changes: Any) -> MountOptions:
    """Options for the layers ``lowers``, ``upper`` and ``work``, all of them directories in ``top``."""
    values = {
        "lowerdirs": tuple(str(top / name) for name in lowers),
        "upperdir": str(top / "upper"),
        "workdir": str(top / "work"),
    }
    return MountOptions(**{**values, **changes})


def open_union(top: Path, *lowers: str, **changes: Any) -> UnionTree:
    """The tree for :func:`options_in`; the caller closes it."""
    return open_tree(options_in(top, *lowers, **changes))


def at(tree: UnionTree, path: str) -> Inode:
    """The object at ``path``; the root is empty."""
    inode: Inode = tree.root
    for name in path.encode().split(b"/"):
        if name:
            inode = tree.lookup(inode, name)
    return inode


def place(tree: UnionTree, path: str) -> tuple[Inode, bytes]:
    """The directory that ``path`` is in, and the name there."""
    above, _, name = path.rpartition("/")
    return at(tree, above), name.encode()
