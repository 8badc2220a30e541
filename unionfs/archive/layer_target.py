"""A bare layer directory as the directory that an archive is unpacked into, over the layers below it."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence

from unionfs.archive.overlay_view import Node, OpenMerged, OverlayView, Place
from unionfs.archive.tar_format import show
from unionfs.archive.target import CACHED, NOT_THERE, Parent, Target, drop_acls, no_directory, nothing_at
from unionfs.errors import ArchiveError
from unionfs.host.files import DIRECTORY_FLAGS, RootedDir, join
from unionfs.overlay.copying import copy_attributes, copy_xattrs
from unionfs.overlay.format import OverlayXattrs, is_whiteout


class LayerTarget(Target):
    """A bare layer directory as the target: it has what the archive changes in the layers below.

    With the layers below known, it is filled so that all together show what unpacking onto a copy of them would.

    Args:
        root: the directory.
        parents_owner: (uid, gid) of directories that are nowhere, but that an entry needs.
        space: the names of the xattrs that mark it.
        lowers: the layers below, top first; None: not known. Then every whiteout is written, and a directory that an
            entry needs is made anew.
    """

    def __init__(
        self,
        root: RootedDir,
        parents_owner: tuple[int, int],
        space: OverlayXattrs,
        lowers: Sequence[RootedDir] | None,
    ) -> None:
        super().__init__(root, parents_owner)
        self._space = self._own = space
        self._has_lowers = lowers is not None
        self._merged = OverlayView([root, *(lowers or ())], spaces=(space,))
        self._view = self._merged
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()
        self._open_below: tuple[tuple[Place, ...], OpenMerged] | None = None  # what was asked last
        self._root_is_hidden = False

    def _forget(self) -> None:
        super()._forget()
        self._nodes.clear()
        if self._open_below is not None:
            self._open_below[1].close()
            self._open_below = None

    def _node(self, parent: Parent) -> Node:
        """The merged directory of which ``parent`` is the top."""
        known = self._nodes.get(parent.path)
        if known is None:
            above, _, name = parent.path.rpartition(b"/")
            base = self._nodes.get(above)
            known = self._look(base, name) if base is not None else None
            if known is None:
                _, known = self.resolve(parent.path.split(b"/"))
            assert known is not None
            self._nodes[parent.path] = known
            if len(self._nodes) > CACHED:
                self._nodes.popitem(last=False)
        return known

    def _look_below(self, node: Node, name: bytes) -> Node | None:
        """What the lower layers alone show as ``name`` in the merged directory ``node``."""
        stack = self._below(node)
        if not stack:
            return None
        if self._open_below is None or self._open_below[0] != stack:
            if self._open_below is not None:
                self._open_below[1].close()
            self._open_below = stack, OpenMerged(self._merged, stack)
        return self._open_below[1].lookup(name)

    def _below(self, node: Node) -> tuple[Place, ...]:
        return tuple(place for place in node.stack if place.layer is not self.root)

    def _missing(self, above: Parent, name: bytes) -> Parent:
        if not self._has_lowers:
            return super()._missing(above, name)
        node = self._look_below(self._node(above), name)
        if node is None:
            return super()._missing(above, name)
        if stat.S_ISLNK(node.stat.st_mode):
            return self._linked(above, name)
        if not node.is_dir:
            raise no_directory(join(above.path, name))
        return self._copy_directory(above, name, node)

    def _blocked(self, above: Parent, name: bytes, info: os.stat_result) -> Parent:
        if not is_whiteout(info):
            return super()._blocked(above, name, info)
        # The archive deleted the name first: what it puts there now must not merge with what is below.
        os.unlink(name, dir_fd=above.fd)
        made = super()._missing(above, name)
        self._mark_opaque(made.fd, made.path)
        return made

    def _copy_directory(self, above: Parent, name: bytes, node: Node) -> Parent:
        """Make the directory that is in the layers below, as it is there."""
        self._to_change(above)
        os.mkdir(name, 0o700, dir_fd=above.fd)
        self._made.add_copy(above.inode, name)
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=above.fd)
        try:
            self._new_directory(fd, new=False)
            if above.inherits:
                drop_acls(fd)
            source = node.place.layer.open_dir(node.place.rel)
            try:
                copy_xattrs(source, fd, self._own)
            finally:
                os.close(source)
            copy_attributes(fd, b"", node.stat)
            path = join(above.path, name)
            self.set_times(fd, path, node.stat.st_atime_ns, node.stat.st_mtime_ns)
        except BaseException:
            os.close(fd)
            raise
        return self._opened(fd, path)

    def _replaced(self, fd: int, path: bytes) -> None:
        self._mark_opaque(fd, path)

    def _mark_opaque(self, fd: int, path: bytes) -> None:
        try:
            os.setxattr(fd, self._own.opaque, b"y")
        except OSError as error:
            # Unlike other xattrs this one decides what the layer shows, so it is never best effort.
            raise ArchiveError(
                f"{show(path)}: cannot mark the directory opaque ({os.fsdecode(self._own.opaque)}): {error.strerror}; "
                "use a file system with xattrs"
            ) from error
        self._nodes.clear()

    def link_source(self, parts: Sequence[bytes]) -> Parent:
        """See :meth:`Target.link_source`; what is in the layers below is copied up."""
        name = parts[-1]
        parent = self.find(parts[:-1])
        if parent is not None:
            try:
                info = os.lstat(name, dir_fd=parent.fd)
            except FileNotFoundError:
                pass
            else:
                if is_whiteout(info):
                    raise nothing_at(parts)
                return super().link_source(parts)
        node = self._merged_at(parts[:-1], parent)
        found = self._look_below(node, name) if node is not None else None
        if found is None:
            raise nothing_at(parts)
        if found.is_dir:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fsdecode(b"/".join(parts)))
        parent = self.parent(parts[:-1])
        self._copy_file(parent, name, found)
        return parent

    def _merged_at(self, parts: Sequence[bytes], parent: Parent | None) -> Node | None:
        """The merged directory at ``parts``, of which ``parent`` is the top if the target has it."""
        return self._node(parent) if parent is not None else self.resolve(parts)[1]

    # Whiteouts

    def white_out(self, parts: Sequence[bytes], name: bytes, owner: Callable[[], tuple[int, int]]) -> None:
        """See :meth:`Target.white_out`."""
        parent = self._existing(parts) if self._has_lowers else self.parent(parts)
        if self._has_lowers:
            node = self._existing_merged(parts, parent)
            shown = node is not None and self._look_below(node, name) is not None
        else:
            shown = parent is not None and parent.inode not in self._cleaned
        if parent is None:
            if not shown:
                return
            parent = self.parent(parts)
        left = self._remove_older(parent, name)
        if not shown:
            return
        if left is None:
            self._mark_hidden(parent, name, owner())
        elif stat.S_ISDIR(left.st_mode):
            self._mark_opaque_at(parent, name)

    def hide_all(self, parts: Sequence[bytes]) -> None:
        """See :meth:`Target.hide_all`."""
        parent = self._existing(parts) if self._has_lowers else self.parent(parts)
        below: tuple[Place, ...] = ()
        if self._has_lowers:
            node = self._existing_merged(parts, parent)
            below = self._below(node) if node is not None else ()
            if below and parent is None:
                parent = self.parent(parts)
        if parent is None:
            return
        self._clean(parent.fd)
        if not self._has_lowers or (below and parent.path):
            self._mark_opaque(parent.fd, parent.path)
        elif below:
            self._hide_root(below)

    def _hide_root(self, below: tuple[Place, ...]) -> None:
        """Hide what the layers below show in their root, for which the kernel knows no mark."""
        if self._root_is_hidden:
            return
        self._root_is_hidden = True
        with OpenMerged(self._merged, below) as root:
            for name in sorted(root.names()):
                shown = root.lookup(name)
                if shown is None:
                    continue
                try:
                    info = os.lstat(name, dir_fd=self._top.fd)
                except FileNotFoundError:
                    self._mark_hidden(self._top, name, self._parents_owner)
                else:
                    if stat.S_ISDIR(info.st_mode) and shown.is_dir:
                        self._mark_opaque_at(self._top, name)

    def _existing_merged(self, parts: Sequence[bytes], parent: Parent | None) -> Node | None:
        try:
            return self._merged_at(parts, parent)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            return None

    def _mark_hidden(self, parent: Parent, name: bytes, owner: tuple[int, int]) -> None:
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent.fd)
        except PermissionError as error:
            raise ArchiveError(
                f"{show(join(parent.path, name))}: this user may not make a whiteout (a 0:0 device); "
                "keep the .wh. form instead (WhiteoutMode.KEEP)"
            ) from error
        os.chown(name, *owner, dir_fd=parent.fd, follow_symlinks=False)

    def _mark_opaque_at(self, parent: Parent, name: bytes) -> None:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=parent.fd)
        try:
            self._mark_opaque(fd, join(parent.path, name))
        finally:
            os.close(fd)

    def _is_whiteout(self, info: os.stat_result) -> bool:
        return is_whiteout(info)
