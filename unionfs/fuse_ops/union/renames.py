"""Renaming in the merged tree, with redirects for directories that the lower layers have."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from unionfs.fuse_ops.copy_up.copy_up import METADATA, NO_ROOM_FOR_PATH, CopyUp
from unionfs.fuse_ops.copy_up.hard_links import HardLinks
from unionfs.fuse_ops.options import RedirectMode
from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView, enoent
from unionfs.fuse_ops.union.changes import Caller, NamespaceChanges, check_new_name
from unionfs.host.files import make_accessible
from unionfs.host.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2


class Move(NamedTuple):
    """A name that is to be changed, and what it and the new one are of now."""

    old_dir: DirInode
    old_name: bytes
    source: Inode
    new_dir: DirInode
    new_name: bytes
    target: Inode | None
    flags: int

    @property
    def moved(self) -> tuple[Inode, ...]:
        """What gets another name."""
        if self.flags & RENAME_EXCHANGE and self.target is not None:
            return self.source, self.target
        return (self.source,)


class Renames:
    """Moves objects; directories keep what the lower layers have in them, without copying it."""

    def __init__(
        self,
        view: MergedView,
        copy_up: CopyUp,
        changes: NamespaceChanges,
        hard_links: HardLinks,
        accounts: Accounts,
    ) -> None:
        self._view = view
        self._hard_links = hard_links
        self._accounts = accounts
        self._copy_up = copy_up
        self._changes = changes

    def begin(self, old_dir: DirInode, old_name: bytes, new_dir: DirInode, new_name: bytes, flags: int) -> Move:
        """Look up what is to be renamed, and raise what forbids it, before anything is copied up for it.

        ``flags`` are RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT of renameat2(2); EINVAL for others.
        """
        known = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
        if flags & ~known or (flags & RENAME_EXCHANGE and flags != RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._copy_up.require_writable()
        source = self._view.lookup(old_dir, old_name)
        target = self._view.find(new_dir, new_name)
        move = Move(old_dir, old_name, source, new_dir, new_name, target, flags)
        if target is not source:
            self._check_protection(move)
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise enoent(new_name)
            return move
        if target is not None and flags & RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(new_name))
        if target is source:
            return move
        check_new_name(new_name)
        if new_dir.orphan:
            raise enoent(new_name)
        if target is not None:
            self._check_replaceable(source, target)
        return move

    def finish(self, move: Move, caller: Caller | None = None) -> None:
        """Do what :meth:`begin` has found, at once after it.

        RENAME_WHITEOUT leaves a device 0:0 for ``caller``, which an overlay stacked on this mount needs. Raises EXDEV
        for a directory of a lower layer when redirects are off.
        """
        if move.target is move.source:
            return  # two names of one file: POSIX says that nothing happens
        if move.flags & RENAME_EXCHANGE:
            self._exchange(move)
        elif move.flags & RENAME_WHITEOUT:
            assert caller is not None
            self._move_leaving_nested_whiteout(move, caller)
        else:
            self._accounts.removing(move.target, lambda: self._move(move))
        for inode in (move.old_dir, move.new_dir, *move.moved):
            self._accounts.changed(inode)

    def _move_leaving_nested_whiteout(self, move: Move, caller: Caller) -> None:
        def do() -> None:
            self._accounts.removing(move.target, lambda: self._move(move))

        try:
            self._changes.leave_nested_whiteout(move.old_dir, move.old_name, caller, do)
        except OSError:
            if move.target is None and (move.new_dir.children or {}).get(move.new_name) is move.source:
                with contextlib.suppress(OSError):
                    self._move(Move(move.new_dir, move.new_name, move.source, move.old_dir, move.old_name, None, 0))
            raise

    def _check_protection(self, move: Move) -> None:
        protection = self._copy_up.protection
        protection.require_removable(move.old_dir, move.source)
        if move.target is not None:
            protection.require_removable(move.new_dir, move.target)
        else:
            protection.require_new_name(move.new_dir)

    def _check_replaceable(self, source: Inode, target: Inode) -> None:
        source_is_dir = isinstance(source, DirInode)
        if isinstance(target, DirInode):
            if not source_is_dir:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not self._view.is_empty(target):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        elif source_is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _ready(self, inode: Inode, old_dir: DirInode, new_dir: DirInode) -> None:
        """Copy up what is to be moved, and make a directory independent of the name it has."""
        if isinstance(inode, DirInode) and inode.lowers and self._view.options.redirect_dir is not RedirectMode.ON:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self._copy_up.ensure(inode, METADATA)
        self._copy_up.ensure_directory(new_dir)
        if isinstance(inode, FileInode):
            self._copy_up.make_data_path_absolute(inode)
        elif isinstance(inode, DirInode):
            upper = self._copy_up.require_writable()
            path, _ = self._view.proc_path(inode)
            if inode.lowers:
                self._set_redirect(inode, path, same_directory=old_dir is new_dir)
            elif new_dir.lowers:
                upper.set_opaque(path)

    def _set_redirect(self, inode: DirInode, path: bytes, *, same_directory: bool) -> None:
        """Record where the lower layers have a directory: by its name there, or by the path from the top."""
        if inode.redirect is not None and (same_directory or inode.redirect.startswith(b"/")):
            return
        if inode.stack_path is None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        redirect = inode.stack_path.rpartition(b"/")[2] if same_directory else b"/" + inode.stack_path
        try:
            os.setxattr(path, self._view.xattrs.redirect, redirect, follow_symlinks=False)
        except OSError as error:
            if error.errno in NO_ROOM_FOR_PATH:
                # Let the program copy, as it does between file systems.
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV)) from None
            raise
        inode.redirect = redirect
        self._hard_links.redirects.add(redirect)

    def _move(self, move: Move) -> None:
        old_dir, old_name, source, new_dir, new_name, target, _ = move
        view, changes = self._view, self._changes
        upper = self._copy_up.require_writable()
        self._copy_up.ensure_directory(old_dir)
        self._ready(source, old_dir, new_dir)
        leave_whiteout = changes.hides_lower(old_dir, old_name)
        if isinstance(target, DirInode) and target.upper:
            self._clear(target, new_dir, new_name)
        over_whiteout = False
        if target is None or not target.upper:
            with contextlib.suppress(FileNotFoundError):
                st = os.stat(new_name, dir_fd=self._dir_fd(new_dir), follow_symlinks=False)
                over_whiteout = not stat.S_ISDIR(st.st_mode)
        changes.allow_nested(source, new_dir)
        with changes.before_removal(target) as removal:
            upper.move(
                (self._dir_fd(old_dir), old_name),
                (self._dir_fd(new_dir), new_name),
                leave_whiteout=leave_whiteout,
                over_whiteout=over_whiteout,
                directory=isinstance(source, DirInode),
            )
        if leave_whiteout:
            changes.note_whiteout(old_dir, old_name)
            # It may be one of those that came from there.
            old_dir.xwhiteouts |= over_whiteout and isinstance(source, DirInode)
        if target is not None:
            changes.removed(target, new_dir, new_name, removal)
        source.remove_place(old_dir, old_name)
        source.add_place(new_dir, new_name)
        self._after_move(source, new_dir, new_name)
        if source.has_origin:
            self._copy_up.origins.left(old_dir, old_name)
        view.inodes.drop_if_unneeded(old_dir)

    def _clear(self, directory: DirInode, parent: DirInode, name: bytes) -> None:
        """Remove the whiteouts in a directory that shows nothing, so that another can be renamed over it."""
        parent_fd = self._dir_fd(parent)
        if not _has_entries(parent_fd, name):
            return
        upper = self._copy_up.require_writable()
        st = self._view.real_stat(directory)

        def copy_metadata(temp: bytes) -> None:
            self._copy_up.copy_metadata(directory, st, (parent_fd, name), (upper.work_fd, temp), with_origin=False)

        upper.clear_directory(parent_fd, name, copy_metadata)
        self._view.forget_upper_dir(directory)
        directory.lowers, directory.index, directory.marks = (), None, set()

    def _exchange(self, move: Move) -> None:
        first_dir, first_name, first, second_dir, second_name, second, _ = move
        assert second is not None
        self._copy_up.ensure_directory(first_dir)
        self._copy_up.ensure_directory(second_dir)
        self._ready(first, first_dir, second_dir)
        self._ready(second, second_dir, first_dir)
        self._changes.allow_nested(first, second_dir)
        self._changes.allow_nested(second, first_dir)
        renameat2(self._dir_fd(first_dir), first_name, self._dir_fd(second_dir), second_name, RENAME_EXCHANGE)
        first.remove_place(first_dir, first_name)
        second.remove_place(second_dir, second_name)
        first.add_place(second_dir, second_name)
        second.add_place(first_dir, first_name)
        self._after_move(first, second_dir, second_name)
        self._after_move(second, first_dir, first_name)
        if first.has_origin and not second.has_origin:
            self._copy_up.origins.left(first_dir, first_name)
        elif second.has_origin and not first.has_origin:
            self._copy_up.origins.left(second_dir, second_name)

    def _dir_fd(self, directory: DirInode) -> int:
        # Asked anew for each use: opening one directory may close another's descriptor.
        return self._view.upper_dir_fd(directory)

    def _after_move(self, inode: Inode, directory: DirInode, name: bytes) -> None:
        if inode.has_origin:
            self._copy_up.origins.arrived(directory, name)


def _has_entries(dir_fd: int, name: bytes) -> bool:
    """Whether there are whiteouts in a directory that is to be replaced; its owner may be forbidden to look."""
    path = b"/proc/self/fd/%d/%s" % (dir_fd, name)
    try:
        return bool(os.listdir(path))
    except PermissionError:
        make_accessible(dir_fd, name)
        return bool(os.listdir(path))
