"""The contents of small files for the kernel's page cache, given when a file is opened and not when it is read.

Who opens a small file nearly always reads it. What is in the page cache by then is read without a request, and a
read that was none does not make the kernel ask for the access time afterwards.

Only files of lower layers, which never change, and only while nobody else has them open: a page that the kernel reads
is locked until it has the answer, and whoever stores into it waits for that, which must not be the one who answers.
"""

from __future__ import annotations

import os
from typing import Final

from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.open_files import OpenFile

_SMALL_BYTES: Final = 128 * 1024  # what the kernel reads ahead at once


def size_to_give(file: OpenFile, flags: int) -> int:
    """How many bytes of ``file``, opened with the client's ``flags``, the kernel is to be given: all or 0.

    Raises OSError where it is opened for that and cannot be.
    """
    inode = file.inode
    if inode.filled or inode.upper or inode.metacopy or file.writable or flags & os.O_DIRECT:
        return 0
    if not _is_only_user(file):
        return 0
    size_bytes = os.fstat(file.fd).st_size
    return size_bytes if size_bytes <= _SMALL_BYTES else 0


def may_still_give(file: OpenFile) -> bool:
    """Whether that is still so after others had their turn."""
    return not file.inode.upper and _is_only_user(file)


def was_read(inode: Inode) -> None:
    """The kernel asks for the beginning of a file, so it no longer has what it was given."""
    inode.filled = False


def _is_only_user(file: OpenFile) -> bool:
    handles = file.inode.handles
    return handles is not None and len(handles) == 1
