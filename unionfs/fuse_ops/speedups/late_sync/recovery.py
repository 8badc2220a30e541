"""What a mount does first when the one before it has ended in a crash: finishes copies that were not yet synced.

See :mod:`unionfs.fuse_ops.copy_up.unsynced`: their data may be anything, and the lower files have it.
"""

from __future__ import annotations

import os
import stat

from unionfs.fuse_ops.copy_up.unsynced import unmark
from unionfs.fuse_ops.tree.inodes import FileInode, Inode
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host import syscalls
from unionfs.host.files import open_directory, walk_tree
from unionfs.overlay.format import TRUSTED, UNSYNCED, USER
from unionfs.overlay.rules import entry_path, read_xattr


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
        if isinstance(inode, FileInode) and inode.metacopy:
            tree.copy_up.recover(inode)
    finally:
        tree.inodes.drop_if_unneeded(inode)


def _marked(top_fd: int, mark: bytes) -> list[bytes]:
    """The paths of all files below ``top_fd`` whose attribute ``mark`` says that they are not synced."""
    found: list[bytes] = []
    path: list[bytes] = []

    def enter(fd: int) -> list[bytes]:
        directories, marked = _divided(fd, mark)
        found.extend(b"/".join([*path, name]) for name in marked)
        return directories

    def open_below(fd: int, name: bytes) -> int:
        below = open_directory(fd, name)
        if below >= 0:
            path.append(name)
        return below

    walk_tree(top_fd, enter, lambda fd, name: path.pop(), open_below)
    return found


def _divided(fd: int, mark: bytes) -> tuple[list[bytes], list[bytes]]:
    """The names of the directories in the directory ``fd``, and those of its marked files."""
    directories, marked = [], []
    for name in map(os.fsencode, os.listdir(fd)):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            directories.append(name)
        elif stat.S_ISREG(st.st_mode) and read_xattr(entry_path(fd, name), mark) == UNSYNCED:
            marked.append(name)
    return directories, marked


def settle_marked(upperdir: str) -> None:
    """Settle all marked files of an upper directory without a mount, while the machine lives on which they were made.

    For one that becomes a layer though a server goes on to use it. That finds them settled when it gets to them. Raises
    OSError.
    """
    fd = os.open(upperdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
        for mark in (TRUSTED.metacopy, USER.metacopy):

            def enter(fd: int, mark: bytes = mark) -> list[bytes]:
                directories, marked = _divided(fd, mark)
                for name in marked:
                    unmark(entry_path(fd, name), mark, None)
                return directories

            walk_tree(fd, enter)
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
