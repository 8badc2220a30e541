"""Attributes as the kernel's protocol has them, packed once for what does not change.

Most of a tree is in lower layers. What was packed for one answer is kept for the next ones: the same directory read
by another program, the attributes that the kernel asks for again after it has read something.
"""

from __future__ import annotations

import stat

from unionfs.fuse_ops.transports.direct.protocol import ATTR, attr_fields
from unionfs.fuse_ops.tree.attributes import Attributes
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView


def pack(inode: Inode, attributes: Attributes) -> bytes:
    """``attributes`` of ``inode`` as struct fuse_attr; kept where they stay what they are."""
    packed = ATTR.pack(*attr_fields(attributes))
    # A file of several names has fewer when one of them is removed.
    if not inode.upper and (attributes.nlink == 1 or inode.kind == stat.S_IFDIR):
        inode.packed = packed
    return packed


class PackedAttributes:
    """Attributes of the inodes of a tree."""

    def __init__(self, view: MergedView) -> None:
        self._view = view

    def of(self, inode: Inode) -> bytes:
        """What stat(2) shows of ``inode``."""
        packed = inode.packed
        if packed is None or inode.upper or inode.parent is None:  # copied up since, or removed
            return pack(inode, self._view.attributes(inode))
        return packed

    def of_new(self, inode: Inode) -> bytes:
        """As :meth:`of`, for the answer to the request that made ``inode``."""
        return pack(inode, self._view.attributes_of_new(inode))

    def child(self, directory: Inode, name: bytes) -> tuple[Inode, bytes] | None:
        """The object called ``name`` in ``directory`` with its attributes; None if there is none."""
        if directory.children is not None:
            inode = directory.children.get(name)
            if inode is not None:
                return inode, self.of(inode)
        found = self._view.child(directory, name)
        return None if found is None else (found[0], pack(*found))
