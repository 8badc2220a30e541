"""Where a copy goes, with nothing of it to be seen in the merged tree, and what says which lower object it is from.

The origin is an attribute from which the kernel and later mounts take the inode number of the copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.copy_up.hard_links import HardLinks
from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.fuse_ops.stack.upper_dir import NewFile, UpperDir
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host import syscalls
from unionfs.overlay.copying import At, at_path
from unionfs.overlay.format import encode_origin
from unionfs.overlay.rules import entry_path, has_xattr

_NO_HANDLES: Final = frozenset({errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM, errno.EINVAL})


def origin_of(layer: LayerDir, source: At) -> bytes:
    """The value of the attribute for a copy of ``source``, which is in ``layer``."""
    try:
        handle = syscalls.file_handle(*source)
    except OSError as error:
        if error.errno not in _NO_HANDLES:
            raise
        return b""
    return encode_origin(handle, layer.filesystem_uuid)


class Origins:
    """Records on the copies of one tree where they are from."""

    def __init__(self, view: MergedView, accounts: Accounts) -> None:
        self._view = view
        self._accounts = accounts

    def record(self, inode: Inode, st: os.stat_result, source: tuple[LayerDir, At], target: At) -> None:
        """Record that ``target`` is the copy of ``source``, the lower object of ``inode`` that has ``st``."""
        # Of several names the kernel, too, sets no origin: after a remount they are different files.
        if isinstance(inode, FileInode) and (inode.parent is None or inode.may_have_other_names(st)):
            return
        value = origin_of(*source)
        try:
            os.setxattr(at_path(*target), self._view.xattrs.origin, value, follow_symlinks=not target[1])
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            inode.has_origin = False  # user.* attributes exist on files and directories only
        else:
            inode.has_origin = True

    def record_later(self, path: bytes, value: bytes) -> None:
        """Record ``value`` on a copy that was made by a mount which did not come to it, unless it has one."""
        with contextlib.suppress(OSError):  # only costs the stability of its inode number
            os.setxattr(path, self._view.xattrs.origin, value, os.XATTR_CREATE)

    def arrived(self, directory: DirInode, name: bytes) -> None:
        """``name``, which has an origin, has come into an upper directory: mark that as impure.

        The kernel looks the numbers of what is in such a directory up when it is listed.
        """
        if directory.origin_names is not None:
            directory.origin_names.add(name)
        if directory.impure:
            return
        directory.impure = True
        with contextlib.suppress(OSError):  # only costs the stability of inode numbers
            path = b"/proc/self/fd/%d" % self._view.upper_dir_fd(directory)
            self._view.unnoticed(directory, lambda: os.setxattr(path, self._view.xattrs.impure, b"y"))
        self._accounts.changed(directory)  # an attribute can take a block

    def left(self, directory: DirInode, name: bytes) -> None:
        """``name``, which has an origin, is no longer in an upper directory: without any other it is not impure.

        The kernel finds that out at the next listing. Of merged directories neither says it: they are looked into
        anyhow.
        """
        if not directory.impure or directory.lowers or directory.orphan:
            return
        # An impure directory only takes longer to list. A server without privilege may search it but not read, say.
        with contextlib.suppress(OSError):
            dir_fd = self._view.upper_dir_fd(directory)
            if directory.origin_names is None:
                directory.origin_names = self._names_with_origin(directory, dir_fd)
            directory.origin_names.discard(name)
            if not directory.origin_names:
                directory.impure, directory.origin_names = False, None
                os.removexattr(b"/proc/self/fd/%d" % dir_fd, self._view.xattrs.impure)

    def _names_with_origin(self, directory: DirInode, dir_fd: int) -> set[bytes]:
        children = directory.children or {}
        found = set()
        for name in map(os.fsencode, os.listdir(b"/proc/self/fd/%d" % dir_fd)):
            child = children.get(name)
            if has_xattr(entry_path(dir_fd, name), self._view.xattrs.origin) if child is None else child.has_origin:
                found.add(name)
        return found


_MAKE_NAMES: Final = stat.S_IWUSR | stat.S_IXUSR  # what its owner needs to make names in a directory


class Publisher:
    """Puts copies that are complete into their places.

    ``copy_directory`` copies a directory up where that is needed, and returns the descriptor of its upper one.
    """

    def __init__(
        self,
        view: MergedView,
        origins: Origins,
        copy_directory: Callable[[DirInode], int],
        hard_links: HardLinks,
        accounts: Accounts,
    ) -> None:
        self._view = view
        self._hard_links = hard_links
        self._accounts = accounts
        self._origins = origins
        self._copy_directory = copy_directory
        self._server_uid = os.geteuid()

    def directory(self, upper: UpperDir, inode: DirInode, temp: bytes, st: os.stat_result) -> None:
        """Make ``temp`` in the work directory the upper object of the directory ``inode``, whose mode is in ``st``."""
        assert inode.parent is not None
        parent_fd, name = self._view.upper_dir_fd(inode.parent), inode.name

        def install() -> None:
            upper.install(upper.work_fd, temp, parent_fd, name, directory=True)

        def install_and_restrict() -> None:
            # A directory that may not be written by its owner cannot be moved by him to another one either.
            os.chmod(temp, stat.S_IMODE(st.st_mode) | stat.S_IWUSR, dir_fd=upper.work_fd)
            install()
            try:
                os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=parent_fd)
            except BaseException:
                os.rmdir(name, dir_fd=parent_fd)
                raise

        # What is in the work directory is ours, whoever the lower one belongs to.
        may_be_moved = st.st_mode & stat.S_IWUSR or self._server_uid == 0
        self._unseen(inode.parent, install if may_be_moved else install_and_restrict)
        self._placed(inode)
        inode.marks = set()
        self._accounts.changed(inode)
        self._accounts.changed(inode.parent)

    def file(self, upper: UpperDir, inode: FileInode, new: NewFile, st: os.stat_result) -> None:
        """Make ``new`` the upper object of ``inode``, whose lower one has ``st``, at all its places."""
        if inode.may_have_other_names(st):
            self._stage(upper, inode, new, st)
        elif inode.parent is not None:
            parent_fd, name = self._view.upper_dir_fd(inode.parent), inode.name
            self._unseen(inode.parent, lambda: upper.place(new, parent_fd, name))
            self._placed(inode)
        else:  # unlinked in the meantime, but still open
            upper.stage(new)  # a file that never had a name could be given one later
            inode.orphan_fd = os.open(new.temp, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper.work_fd)
            inode.upper = True
            upper.discard(new.temp)
        self._accounts.changed(inode)
        for parent, _ in inode.places():
            self._accounts.changed(parent)

    def _placed(self, inode: Inode) -> None:
        inode.upper = True
        if inode.has_origin and inode.parent is not None:
            self._origins.arrived(inode.parent, inode.name)

    def _stage(self, upper: UpperDir, inode: FileInode, new: NewFile, st: os.stat_result) -> None:
        # The copy stays in the work directory for as long as there may be names of it, and every name that is looked up
        # finds it, and becomes a link to it before anything is changed. So they remain one file.
        upper.stage(new)
        before = inode.nlink
        inode.staged_link = new.temp
        inode.upper = True
        if inode.nlink is None:
            inode.nlink = st.st_nlink
        linked: list[tuple[DirInode, bytes]] = []
        try:
            for parent, name in inode.places():
                self.link(inode, parent, name)
                linked.append((parent, name))
        except BaseException:
            inode.staged_link, inode.upper, inode.nlink = None, False, before
            for parent, name in linked:  # which would be another file when this is tried again
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._view.upper_dir_fd(parent))
            raise
        if inode.orphan:  # unlinked in the meantime, but still open
            self._hard_links.lost_name(inode)

    def link(self, inode: FileInode, parent: DirInode, name: bytes) -> None:
        """Give a copied-up, hard-linked file its name in the upper directory."""
        staged, upper = inode.staged_link, self._view.upper
        assert staged is not None and upper is not None
        parent_fd, work_fd = self._copy_directory(parent), upper.work_fd

        def link() -> None:
            with contextlib.suppress(FileExistsError):
                os.link(staged, name, src_dir_fd=work_fd, dst_dir_fd=parent_fd, follow_symlinks=False)

        self._view.unnoticed(inode, lambda: self._unseen(parent, link))
        if inode.unplaced:
            inode.unplaced.discard((parent, name))
        self._accounts.changed(parent)

    def _unseen(self, directory: DirInode, make: Callable[[], None]) -> None:
        """Make something in the upper directory of ``directory`` of which the merged tree is to show nothing.

        Nor may the directory's mode forbid it, which is that of the merged one: for its owner without privilege it
        is another one meanwhile.
        """
        dir_fd = self._view.upper_dir_fd(directory)
        before = os.stat(dir_fd)
        shown_ns = self._view.ctime_ns(directory, before)
        may_make = before.st_mode & _MAKE_NAMES == _MAKE_NAMES
        if may_make or self._server_uid == 0 or self._server_uid != before.st_uid:
            make()
        else:
            path = b"/proc/self/fd/%d" % dir_fd
            os.chmod(path, stat.S_IMODE(before.st_mode) | _MAKE_NAMES)
            try:
                make()
            finally:
                with contextlib.suppress(OSError):  # what was made is there
                    os.chmod(path, stat.S_IMODE(before.st_mode))
        with contextlib.suppress(OSError):
            os.utime(b".", ns=(before.st_atime_ns, before.st_mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
        self._view.keep_ctime(directory, shown_ns)
