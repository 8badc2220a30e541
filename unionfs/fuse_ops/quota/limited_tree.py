"""A tree whose upper directory is limited: every change asks for room first, and is counted after.

The parts of the tree do what they always do; here is only what they need, and which files they change.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.fuse_ops.copy_up.copy_up import CopyUp
from unionfs.fuse_ops.copy_up.copy_up_job import CopyUpJob
from unionfs.fuse_ops.copy_up.origins import Origins
from unionfs.fuse_ops.copy_up.placing import Placing
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.quota.allocation import data_bytes, round_up
from unionfs.fuse_ops.quota.space_limit import SpaceLimit
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache
from unionfs.fuse_ops.stack.lower_stack import LowerStack
from unionfs.fuse_ops.stack.upper_dir import NewFile, UpperDir
from unionfs.fuse_ops.tree.changes import Caller, NamespaceChanges
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.metadata import AttributeChange, MetadataChanges
from unionfs.fuse_ops.tree.need import CONTENTS, Need
from unionfs.fuse_ops.tree.open_files import OpenFile
from unionfs.fuse_ops.tree.renames import Renames
from unionfs.fuse_ops.tree.union_tree import TreeParts, UnionTree
from unionfs.overlay.format import OverlayXattrs

# Up to this size a file is taken to have no holes, when it is asked what a copy of it needs.
_WHOLE_BYTES: Final = 1 << 20


class LimitedTree(UnionTree):
    """A :class:`UnionTree` with an upper directory that holds at most ``options.quota_bytes``."""

    def __init__(
        self,
        lower: LowerStack,
        upper: UpperDir,
        cache: DescriptorCache,
        options: MountOptions,
        xattrs: OverlayXattrs,
    ) -> None:
        assert options.quota_bytes
        # ``space`` may be None for other trees; here it is not.
        self._limit = self.space = SpaceLimit(options.quota_bytes, (upper.layer.readable_fd, upper.work_fd))
        super().__init__(lower, upper, cache, options, xattrs)

    def _make_parts(self) -> TreeParts:
        self._accounts = accounts = _Accounts(self.view, self._limit)
        copy_up = _LimitedCopyUp(self.view, accounts)
        changes = _LimitedChanges(self.view, copy_up, accounts)
        renames = _LimitedRenames(self.view, copy_up, changes, accounts)
        return TreeParts(copy_up, changes, renames, _LimitedMetadata(self.view, copy_up, accounts))

    def open(self, inode: Inode, flags: int) -> OpenFile:
        file = super().open(inode, flags)
        if flags & os.O_TRUNC or inode.orphan:
            self._accounts.settle(inode, truncated=bool(flags & os.O_TRUNC))
        return file

    def close_file(self, handle: OpenFile) -> None:
        super().close_file(handle)
        self._accounts.released(handle.inode)

    def statfs(self) -> os.statvfs_result:
        return self._limit.statvfs(super().statfs())

    def statistics(self) -> dict[str, int]:
        return {
            **super().statistics(),
            "quota_bytes": self._limit.limit_bytes,
            "quota_used_bytes": self._limit.used_bytes,
        }


class _Accounts:
    """Counts the upper objects of inodes, and those that were unlinked for as long as somebody has them."""

    def __init__(self, view: MergedView, space: SpaceLimit) -> None:
        self.space = space
        self._view = view
        self._unlinked: dict[Inode, int] = {}  # inodes without a name on disk, with their number there

    def settle(self, *inodes: Inode, truncated: bool = False) -> None:
        """Count what these have in the upper directory."""
        for inode in inodes:
            if not inode.upper or (inode.orphan and inode.orphan_fd < 0):
                continue
            st = self._view.real_stat(inode)
            if st.st_nlink == 0 and not inode.handles:
                # What the kernel still remembers of it goes in a moment, and nobody can write to it.
                self._gone(inode, st.st_ino)
                continue
            if truncated:
                self.space.truncated(st)
            else:
                self.space.settle(st)
            if st.st_nlink == 0:
                self._unlinked[inode] = st.st_ino
                self.space.unlinked(st.st_ino)
            elif self._unlinked.pop(inode, None) is not None:
                self.space.named(st.st_ino)

    @contextlib.contextmanager
    def removing(self, inode: Inode | None) -> Iterator[None]:
        """In the block, ``inode`` loses a name, perhaps its last."""
        if inode is None or not inode.upper or inode.orphan:
            yield
            return
        dir_fd, name = self._view.upper_at(inode)
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            yield
            st = os.fstat(fd)
        finally:
            os.close(fd)
        if inode.orphan_fd >= 0:
            self.settle(inode)
        elif st.st_nlink == 0:
            self.space.gone(st.st_ino)

    def released(self, inode: Inode) -> None:
        """A program has closed ``inode``: if it is unlinked, it may be gone by that."""
        if inode in self._unlinked and not inode.handles:
            self._gone(inode, self._unlinked[inode])

    def _gone(self, inode: Inode, ino: int) -> None:
        self._unlinked.pop(inode, None)
        self.space.gone(ino)


class _LimitedOrigins(Origins):
    def __init__(self, view: MergedView, accounts: _Accounts) -> None:
        super().__init__(view)
        self._accounts = accounts

    def mark_impure(self, directory: Inode) -> None:
        super().mark_impure(directory)
        self._accounts.settle(directory)  # an attribute can take a block


class _LimitedPlacing(Placing):
    def __init__(
        self, view: MergedView, origins: Origins, copy_directory: Callable[[Inode], int], accounts: _Accounts
    ) -> None:
        super().__init__(view, origins, copy_directory)
        self._accounts = accounts

    def file(self, upper: UpperDir, inode: Inode, new: NewFile, st: os.stat_result) -> None:
        super().file(upper, inode, new, st)
        self._accounts.settle(inode, *(parent for parent, _ in inode.places()))

    def link_held(self, inode: Inode, parent: Inode, name: bytes) -> None:
        super().link_held(inode, parent, name)
        self._accounts.settle(parent)


class _LimitedCopyUp(CopyUp):
    def __init__(self, view: MergedView, accounts: _Accounts) -> None:
        self._accounts = accounts
        self._expected: dict[CopyUpJob, tuple[int, int]] = {}
        super().__init__(view)

    def _make_parts(self) -> tuple[Origins, Placing]:
        origins = _LimitedOrigins(self._view, self._accounts)
        return origins, _LimitedPlacing(self._view, origins, self.copy_directory, self._accounts)

    def begin(self, inode: Inode, need: Need = CONTENTS, st: os.stat_result | None = None) -> CopyUpJob | None:
        space = self._accounts.space
        needed = self._needed(inode, need)
        space.require(needed)
        job = super().begin(inode, need, st)
        if job is not None:
            ino = os.fstat(job.target_fd).st_ino
            space.expect(ino, needed)
            self._expected[job] = ino, needed
        return job

    def _needed(self, inode: Inode, need: Need) -> int:
        """The bytes that a copy-up may take. Directories are not refused: what is removed needs them, too."""
        if inode.kind == stat.S_IFDIR or not self.needs(inode, need):
            return 0
        block = self._accounts.space.block_bytes
        st = self._view.real_stat(inode)
        if not stat.S_ISREG(st.st_mode) or (not need.data and self._view.options.metacopy):
            return block
        wanted = need.bytes_of(st.st_size)
        if wanted <= _WHOLE_BYTES:
            return round_up(wanted, block)
        layer, path = self._view.data_source(inode)
        fd = layer.open(path, os.O_RDONLY)
        try:
            return data_bytes(fd, wanted, block)
        finally:
            os.close(fd)

    def finish(self, job: CopyUpJob) -> None:
        try:
            super().finish(job)
        finally:
            self._end(job)
        self._accounts.settle(job.inode)

    def abort(self, job: CopyUpJob) -> None:
        super().abort(job)
        self._end(job)
        self._accounts.settle(job.inode)

    def _end(self, job: CopyUpJob) -> None:
        if job in self._expected:
            self._accounts.space.arrived(*self._expected.pop(job))

    def _directory(self, upper: UpperDir, inode: Inode, st: os.stat_result) -> None:
        super()._directory(upper, inode, st)
        assert inode.parent is not None
        self._accounts.settle(inode, inode.parent)

    def detach(self, inode: Inode) -> None:
        super().detach(inode)
        if inode.metacopy:
            self._accounts.settle(inode)  # an attribute can take a block; a copy has been settled


class _LimitedChanges(NamespaceChanges):
    def __init__(self, view: MergedView, copy_up: CopyUp, accounts: _Accounts) -> None:
        super().__init__(view, copy_up)
        self._accounts = accounts

    def _make(
        self,
        directory: Inode,
        name: bytes,
        mode: int,
        caller: Caller,
        make: Callable[[int, bytes], None],
        rdev: int = 0,
    ) -> Inode:
        self._accounts.space.require_entry()
        inode = super()._make(directory, name, mode, caller, make, rdev)
        self._accounts.settle(inode, directory)
        return inode

    def create_unnamed(self, directory: Inode, mode: int, flags: int, caller: Caller) -> tuple[Inode, OpenFile]:
        self._accounts.space.require_entry()
        inode, file = super().create_unnamed(directory, mode, flags, caller)
        self._accounts.settle(inode)
        return inode, file

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        self._accounts.space.require_entry()
        super().link(inode, directory, name)
        self._accounts.settle(inode, directory)

    def _remove(self, upper: UpperDir, inode: Inode, directory: Inode, name: bytes) -> None:
        with self._accounts.removing(inode):
            super()._remove(upper, inode, directory, name)
        self._accounts.settle(directory)


class _LimitedRenames(Renames):
    def __init__(self, view: MergedView, copy_up: CopyUp, changes: NamespaceChanges, accounts: _Accounts) -> None:
        super().__init__(view, copy_up, changes)
        self._accounts = accounts

    def _move(
        self,
        source: Inode,
        old_dir: Inode,
        old_name: bytes,
        target: Inode | None,
        new_dir: Inode,
        new_name: bytes,
    ) -> None:
        with self._accounts.removing(target):
            super()._move(source, old_dir, old_name, target, new_dir, new_name)
        self._accounts.settle(old_dir, new_dir, source)

    def _exchange(
        self, first: Inode, first_dir: Inode, first_name: bytes, second: Inode, second_dir: Inode, second_name: bytes
    ) -> None:
        super()._exchange(first, first_dir, first_name, second, second_dir, second_name)
        self._accounts.settle(first_dir, second_dir, first, second)


class _LimitedMetadata(MetadataChanges):
    def __init__(self, view: MergedView, copy_up: CopyUp, accounts: _Accounts) -> None:
        super().__init__(view, copy_up)
        self._accounts = accounts

    def set_attributes(self, inode: Inode, change: AttributeChange, caller: Caller) -> os.stat_result | None:
        st = super().set_attributes(inode, change, caller)
        self._accounts.settle(inode, truncated=change.size is not None)
        return st

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        space = self._accounts.space
        space.require(round_up(len(name) + len(value), space.block_bytes))
        super().set_xattr(inode, name, value, flags)
        self._accounts.settle(inode)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        super().remove_xattr(inode, name)
        self._accounts.settle(inode)
