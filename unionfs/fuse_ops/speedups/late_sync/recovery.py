"""What a mount does first when the one before it has ended in a crash: finishes copies that were not yet synced.

See :mod:`unionfs.fuse_ops.speedups.late_sync.unsynced`: their data may be anything, and the lower files have it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.union_tree import UnionTree
from unionfs.host import syscalls
from unionfs.overlay.format import UNSYNCED

_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def recover(tree: UnionTree) -> list[str]:
    """Copy the data of each marked file of the upper directory again.

    Returns lines for people about what could not be done. For as long as there is such a file, the tree takes its data
    from the lower one.
    """
    assert tree.view.upper is not None
    upper_fd = tree.view.upper.layer.readable_fd
    tree.view.trusts_blocks = False
    failed: list[tuple[bytes, OSError]] = []
    try:
        for path in _marked(upper_fd, tree.view.xattrs.metacopy):
            try:
                _finish(tree, path)
            except OSError as error:
                failed.append((path, error))
        if not failed:
            syscalls.syncfs(upper_fd)
    except OSError as error:
        what, why = "look for unfinished copies", error.strerror
    else:
        if not failed:
            tree.view.trusts_blocks = True
            return []
        others = f" and {len(failed) - 1} more" if failed[1:] else ""
        what, why = f"finish the copy of {os.fsdecode(failed[0][0])}{others}", failed[0][1].strerror
    return [
        f"upperdir {tree.options.upperdir}: cannot {what} after a crash: {why}; "
        "their contents come from the lower layers until a mount can"
    ]


def _finish(tree: UnionTree, path: bytes) -> None:
    inode: Inode = tree.root
    for name in path.split(b"/"):
        inode = tree.lookup(inode, name)
    try:
        if inode.metacopy:
            tree.copy_up.recover(inode)
    finally:
        tree.inodes.drop_if_unneeded(inode)


def _marked(top_fd: int, mark: bytes) -> Iterator[bytes]:
    """The paths of all files below ``top_fd`` whose attribute ``mark`` says that they are not synced."""
    pending = [b""]
    while pending:
        directory = pending.pop()
        fd = os.open(directory or b".", _DIR_FLAGS, dir_fd=top_fd)
        try:
            for name in os.listdir(fd):
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                path = (directory + b"/" if directory else b"") + os.fsencode(name)
                if stat.S_ISDIR(st.st_mode):
                    pending.append(path)
                elif stat.S_ISREG(st.st_mode) and _is_marked(b"/proc/self/fd/%d/%s" % (fd, os.fsencode(name)), mark):
                    yield path
        finally:
            os.close(fd)


def _is_marked(path: bytes, mark: bytes) -> bool:
    try:
        return os.getxattr(path, mark, follow_symlinks=False) == UNSYNCED
    except OSError:
        return False
