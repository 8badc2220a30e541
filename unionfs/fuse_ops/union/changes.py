"""Changes of the namespace: making and removing objects of the merged tree."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from unionfs.fuse_ops.copy_up.copy_up import METADATA, CopyUp
from unionfs.fuse_ops.copy_up.hard_links import HardLinks
from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.tree.attributes import DEFAULT_ACL, Override
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode, OpenFile, as_file, backing_flags
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.overlay.format import MARK, NAME_MAX, WHITEOUT_DEVICE

_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID


class Caller(Protocol):
    """Who asks for a change: the ids of the process as the mount shows them."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...


def _masked_bits(dir_fd: int, mode: int, st: os.stat_result) -> int:
    """The permissions that the umask of this process took from a new object in a directory.

    The caller's is in ``mode`` already. Ours is 0, unless the process is somebody's program that serves the mount. A
    default ACL of the directory takes some too, which is right, and the umask does not count then (acl(5)).
    """
    masked = mode & ~st.st_mode & 0o777
    if masked:
        with contextlib.suppress(OSError):
            os.getxattr(b"/proc/self/fd/%d" % dir_fd, DEFAULT_ACL)
            return 0
    return masked


def check_new_name(name: bytes) -> None:
    """Refuse names that cannot be stored: too long, or those that mean a whiteout in a layer."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
    if name.startswith(MARK):
        raise OSError(errno.EINVAL, "names starting with .wh. mean a whiteout", os.fsdecode(name))


class Removal:
    """What has to be known of an object, and kept of it, before one of its names goes: afterwards nothing may fail.

    In the block the name is removed; if that fails, nothing is kept. ``fd`` is of an upper object that loses its last
    name while somebody can still ask for it, or -1; ``nlink`` how many links it has then, None where the disk says.
    """

    __slots__ = ("fd", "nlink")

    def __init__(self, fd: int, nlink: int | None) -> None:
        self.fd = fd
        self.nlink = nlink

    def __enter__(self) -> Removal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class NamespaceChanges:
    """Creates and removes objects in the upper layer so that the merged tree changes as a plain one would."""

    def __init__(self, view: MergedView, copy_up: CopyUp, hard_links: HardLinks, accounts: Accounts) -> None:
        self._view = view
        self._hard_links = hard_links
        self._accounts = accounts
        self._copy_up = copy_up
        self._server_ids = (os.geteuid(), os.getegid())

    # -- making -----------------------------------------------------------------------------------------------

    def create(self, directory: DirInode, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Inode, OpenFile]:
        """Make a regular file and open it with the client's ``flags``; EEXIST if the name is taken."""
        opened: list[int] = []

        def make(dir_fd: int, temp: bytes) -> None:
            open_flags = (backing_flags(flags) & ~os.O_ACCMODE) | os.O_RDWR | os.O_CREAT | os.O_EXCL
            opened.append(os.open(temp, open_flags, stat.S_IMODE(mode) | self._own_access(stat.S_IFREG), dir_fd=dir_fd))

        try:
            inode = self._make(directory, name, stat.S_IFREG | stat.S_IMODE(mode), caller, make)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        return inode, OpenFile(as_file(inode), opened[0], writable=True)

    def create_unnamed(self, directory: DirInode, mode: int, flags: int, caller: Caller) -> tuple[Inode, OpenFile]:
        """Make a file without a name in ``directory``, which :meth:`link` can give one later (O_TMPFILE)."""
        self._copy_up.require_writable()
        self._copy_up.protection.require_new_name(directory)
        if self._view.ownership.overrides:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._accounts.require_entry()
        directory_fd = self._copy_up.ensure_directory(directory)
        parent = os.stat(directory_fd)
        path = b"/proc/self/fd/%d" % directory_fd
        open_flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | (flags & os.O_EXCL)
        fd = os.open(path, open_flags, stat.S_IMODE(mode))
        try:
            uid, gid = self._view.ownership.to_layer_ids(caller.uid, caller.gid)
            if parent.st_mode & stat.S_ISGID:
                gid = parent.st_gid
            st = os.fstat(fd)
            masked = _masked_bits(directory_fd, mode, st)
            if masked:
                os.chmod(fd, stat.S_IMODE(st.st_mode) | masked)
                st = os.fstat(fd)
            if (st.st_uid, st.st_gid) != (uid, gid) and not self._view.ownership.squashed:
                os.chown(fd, uid, gid)
                if mode & _SPECIAL_BITS:
                    os.chmod(fd, stat.S_IMODE(st.st_mode) | mode & _SPECIAL_BITS)
            orphan_fd = os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC)
        except BaseException:
            os.close(fd)
            raise
        numbers = self._view.inodes.numbers
        inode = self._view.inodes.new_file(stat.S_IFREG, numbers.of((st.st_dev, st.st_ino)))
        inode.upper = True
        inode.protection = 0
        inode.orphan_fd = orphan_fd
        file = OpenFile(inode, fd, writable=True)
        self._accounts.changed(inode)
        return inode, file

    def mkdir(self, directory: DirInode, name: bytes, mode: int, caller: Caller) -> Inode:
        """Make a directory."""

        def make(dir_fd: int, temp: bytes) -> None:
            os.mkdir(temp, stat.S_IMODE(mode) | self._own_access(stat.S_IFDIR), dir_fd=dir_fd)

        return self._make(directory, name, stat.S_IFDIR | stat.S_IMODE(mode), caller, make)

    def mknod(self, directory: DirInode, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        """Make a device, fifo, socket or regular file.

        A device 0:0 is the whiteout of an overlay stacked on this mount: kept as a file with an attribute, since the
        real device would be our own whiteout.
        """
        if stat.S_ISCHR(mode) and rdev == WHITEOUT_DEVICE:
            return self._make_nested_whiteout(directory, name, mode, caller)
        real_mode = mode
        if self._view.ownership.overrides:  # special files are kept as regular ones with an attribute
            real_mode = stat.S_IFREG | 0o600

        def make(dir_fd: int, temp: bytes) -> None:
            os.mknod(temp, real_mode, 0 if stat.S_ISREG(real_mode) else rdev, dir_fd=dir_fd)

        return self._make(directory, name, mode, caller, make, rdev)

    def _make_nested_whiteout(self, directory: DirInode, name: bytes, mode: int, caller: Caller) -> Inode:
        def make(dir_fd: int, temp: bytes) -> None:
            self._make_whiteout_of_nested(directory, dir_fd, temp, mode)

        return _shown_as_whiteout(self._make(directory, name, stat.S_IFREG | stat.S_IMODE(mode), caller, make))

    def leave_nested_whiteout(self, directory: DirInode, name: bytes, caller: Caller, move: Callable[[], None]) -> None:
        """Do ``move``, by which ``name`` leaves ``directory``, and put a whiteout of a stacked overlay in its place."""
        mode = stat.S_IFREG

        def make(dir_fd: int, temp: bytes) -> None:
            self._make_whiteout_of_nested(directory, dir_fd, temp, mode)

        self._accounts.require_entry()
        directory_fd = self._copy_up.ensure_directory(directory)
        st = self._make_staged(directory_fd, name, mode, caller, make, before=move)
        inode = _shown_as_whiteout(self._view.adopt_new(directory, name, st))
        self._accounts.changed(inode)
        self._accounts.changed(directory)

    def _make_whiteout_of_nested(self, directory: DirInode, dir_fd: int, name: bytes, mode: int) -> None:
        self._allow_nested(directory)
        os.mknod(name, stat.S_IFREG | stat.S_IMODE(mode), 0, dir_fd=dir_fd)
        path = b"/proc/self/fd/%d/%s" % (dir_fd, name)
        try:
            os.setxattr(path, self._view.xattrs.nested_whiteout, b"y", follow_symlinks=False)
        except BaseException:
            os.unlink(name, dir_fd=dir_fd)
            raise

    def allow_nested(self, inode: Inode, directory: DirInode) -> None:
        """Note on an upper directory that ``inode`` is about to come into it, if that is such a whiteout."""
        if isinstance(inode, FileInode) and inode.is_nested_whiteout:
            self._allow_nested(directory)

    def _allow_nested(self, directory: DirInode) -> None:
        if not directory.holds_nested_whiteouts:
            path = b"/proc/self/fd/%d" % self._view.upper_dir_fd(directory)
            os.setxattr(path, self._view.xattrs.nested_opaque, b"x")
            directory.holds_nested_whiteouts = True

    def symlink(self, directory: DirInode, name: bytes, target: bytes, caller: Caller) -> Inode:
        """Make a symbolic link."""

        def make(dir_fd: int, temp: bytes) -> None:
            os.symlink(target, temp, dir_fd=dir_fd)

        return self._make(directory, name, stat.S_IFLNK | 0o777, caller, make)

    def link(self, inode: FileInode, directory: DirInode, name: bytes) -> None:
        """Give ``inode`` a further name."""
        upper = self._copy_up.require_writable()
        check_new_name(name)
        self._require_free(directory, name)
        self._copy_up.protection.require_new_name(directory)
        self._copy_up.protection.require_changeable(inode)
        self._accounts.require_entry()
        unnamed = inode.orphan and inode.staged_link is None
        if directory.orphan or (unnamed and inode.orphan_fd < 0):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._copy_up.ensure(inode, METADATA)
        self._copy_up.make_data_path_absolute(inode)
        directory_fd = self._copy_up.ensure_directory(directory)
        source, follow = self._view.proc_path(inode)
        if inode.staged_link is None and inode.key is None:
            st = self._view.real_stat(inode)
            self._view.inodes.remember_links(inode, (st.st_dev, st.st_ino))
        self.allow_nested(inode, directory)
        # An unnamed file (O_TMPFILE) has no path but that of its descriptor; the kernel refuses what was unlinked.
        try:
            os.link(source, name, dst_dir_fd=directory_fd, follow_symlinks=follow)
        except FileExistsError:  # a whiteout, since the merged tree has nothing of this name
            temp = upper.temp_name()
            os.link(source, temp, dst_dir_fd=upper.work_fd, follow_symlinks=follow)
            try:
                upper.install(upper.work_fd, temp, directory_fd, name, directory=False)
            except BaseException:
                upper.discard(temp)
                raise
        if inode.nlink is not None:
            inode.nlink += 1
        if inode.has_origin:
            self._copy_up.origins.arrived(directory, name)
        inode.add_place(directory, name)
        self._accounts.changed(inode)
        self._accounts.changed(directory)

    def _own_access(self, kind: int) -> int:
        """Mode bits that the server itself needs where the true mode is kept in an attribute."""
        if not self._view.ownership.overrides:
            return 0
        return 0o700 if kind == stat.S_IFDIR else 0o600

    def _require_free(self, directory: DirInode, name: bytes) -> None:
        if self._view.find(directory, name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(name))

    def _make(
        self,
        directory: DirInode,
        name: bytes,
        mode: int,
        caller: Caller,
        make: Callable[[int, bytes], None],
        rdev: int = 0,
    ) -> Inode:
        """Make an object with ``make(dir_fd, name)``, give it its owner, and put it into ``directory``."""
        upper = self._copy_up.require_writable()
        check_new_name(name)
        self._accounts.require_entry()
        # Making the object says whether the upper layer has the name.
        look_first = not directory.upper or self.hides_lower(directory, name)
        if look_first:
            self._require_free(directory, name)
        if directory.orphan:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name))
        self._copy_up.protection.require_new_name(directory)
        directory_fd = self._copy_up.ensure_directory(directory)
        is_dir = stat.S_ISDIR(mode)
        try:
            make(directory_fd, name)
        except FileExistsError:
            if not look_first:
                self._require_free(directory, name)
            is_free = False  # a whiteout, since the merged tree has nothing of this name
        else:
            is_free = True
        is_final = is_free  # what is found out of it then stays as it is until the request is answered
        if is_free:
            try:
                st = self._finish_new(directory_fd, directory_fd, name, mode, caller, rdev)
                if is_dir and directory.lowers:
                    upper.set_opaque(b"/proc/self/fd/%d/%s" % (directory_fd, name))
                    is_final = False  # this changes a time
            except BaseException:
                with contextlib.suppress(OSError):  # the error that counts is the first
                    upper.remove(directory_fd, name, directory=is_dir)
                raise
        else:
            st = self._make_staged(directory_fd, name, mode, caller, make, rdev)
        inode = self._view.adopt_new(directory, name, st)
        inode.kind = stat.S_IFMT(mode)
        if is_final:
            inode.kernel.creation_stat = st
        if isinstance(inode, DirInode):
            inode.marks = set()
        self._accounts.changed(inode)
        self._accounts.changed(directory)
        return inode

    def _make_staged(
        self,
        directory_fd: int,
        name: bytes,
        mode: int,
        caller: Caller,
        make: Callable[[int, bytes], None],
        rdev: int = 0,
        before: Callable[[], None] | None = None,
    ) -> os.stat_result:
        """Make an object in the work directory, call ``before``, and put it where there is nothing or a whiteout."""
        upper, is_dir = self._copy_up.require_writable(), stat.S_ISDIR(mode)
        with upper.staging(directory_fd) as (staging_fd, temp):
            make(staging_fd, temp)
            st = self._finish_new(directory_fd, staging_fd, temp, mode, caller, rdev)
            if is_dir:
                upper.set_opaque(b"/proc/self/fd/%d/%s" % (staging_fd, temp))
            if before is not None:
                before()
            upper.install(staging_fd, temp, directory_fd, name, directory=is_dir)
        return st

    def _finish_new(
        self, directory_fd: int, dir_fd: int, name: bytes, mode: int, caller: Caller, rdev: int
    ) -> os.stat_result:
        """Give a new object the owner and mode that POSIX says; returns its attributes.

        It is ``name`` in ``dir_fd``, and belongs into ``directory_fd``.
        """
        ownership = self._view.ownership
        uid, gid = ownership.to_layer_ids(caller.uid, caller.gid)
        if ownership.overrides:
            return self._override_new(directory_fd, dir_fd, name, mode, uid, gid, rdev)
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        masked = _masked_bits(dir_fd, mode, st)
        if masked and not stat.S_ISLNK(mode):
            os.chmod(name, stat.S_IMODE(st.st_mode) | masked, dir_fd=dir_fd)
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        has_owner = ownership.squashed or (st.st_uid, st.st_gid) == (uid, gid)
        if has_owner and dir_fd == directory_fd and not mode & _SPECIAL_BITS:
            return st  # which has all that a setgid directory gives to what is made in it
        parent = os.stat(directory_fd)
        if parent.st_mode & stat.S_ISGID:
            gid = parent.st_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        changed = False
        if (st.st_uid, st.st_gid) != (uid, gid) and not ownership.squashed:
            os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)
            changed = True
        special = stat.S_IMODE(mode) & _SPECIAL_BITS
        if special and (changed or special & ~st.st_mode) and not stat.S_ISLNK(mode):
            # chown(2) clears these; everything else of the mode is as the kernel and a default ACL made it.
            os.chmod(name, stat.S_IMODE(st.st_mode) | special, dir_fd=dir_fd)
            changed = True
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False) if changed else st

    def _override_new(
        self, directory_fd: int, dir_fd: int, name: bytes, mode: int, uid: int, gid: int, rdev: int
    ) -> os.stat_result:
        """:meth:`_finish_new` where owners and modes are kept in attributes."""
        ownership = self._view.ownership
        parent = os.stat(directory_fd)
        parent_mode, parent_gid = parent.st_mode, parent.st_gid
        override = ownership.read_override(b"/proc/self/fd/%d/." % directory_fd, stat.S_IFDIR)
        if override is not None:
            parent_mode, parent_gid = override.mode, override.gid
        if parent_mode & stat.S_ISGID:
            gid = parent_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        if not stat.S_ISLNK(mode):
            path = b"/proc/self/fd/%d/%s" % (dir_fd, name)
            ownership.write_override(path, Override(uid, gid, mode, rdev))
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    # -- removing ---------------------------------------------------------------------------------------------

    def unlink(self, directory: DirInode, name: bytes) -> None:
        """Remove a name that is not a directory's. Nothing is copied up but the directory that holds it."""
        upper = self._copy_up.require_writable()
        inode = self._view.lookup(directory, name)
        if isinstance(inode, DirInode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fsdecode(name))
        self._copy_up.protection.require_removable(directory, inode)
        self._remove(upper, inode, directory, name)

    def rmdir(self, directory: DirInode, name: bytes) -> None:
        """Remove an empty directory."""
        upper = self._copy_up.require_writable()
        inode = self._view.lookup(directory, name)
        if not isinstance(inode, DirInode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(name))
        self._copy_up.protection.require_removable(directory, inode)
        if not self._view.is_empty(inode):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fsdecode(name))
        self._remove(upper, inode, directory, name)

    def _remove(self, upper: UpperDir, inode: Inode, directory: DirInode, name: bytes) -> None:
        self._accounts.removing(inode, lambda: self._remove_name(upper, inode, directory, name))
        self._accounts.changed(directory)

    def _remove_name(self, upper: UpperDir, inode: Inode, directory: DirInode, name: bytes) -> None:
        is_dir = isinstance(inode, DirInode)
        directory_fd = self._copy_up.ensure_directory(directory)
        is_placed = inode.is_placed(directory, name)
        hides = not is_placed or self.hides_lower(directory, name)
        with self.before_removal(inode) as removal:
            if not is_placed:
                upper.whiteout(directory_fd, name)
            elif hides:
                upper.replace_by_whiteout(directory_fd, name, directory=is_dir)
            else:
                upper.remove(directory_fd, name, directory=is_dir)
        if hides:
            self.note_whiteout(directory, name)
        self.removed(inode, directory, name, removal)

    def hides_lower(self, directory: DirInode, name: bytes) -> bool:
        """Whether a lower layer would show ``name`` if the upper one did not say otherwise."""
        return bool(directory.lowers) and self._view.lower_hit(directory, name) is not None

    def note_whiteout(self, directory: DirInode, name: bytes) -> None:
        """Keep what is remembered of an upper directory in step with a whiteout just made in it."""
        assert self._view.upper is not None
        if self._view.upper.device_whiteouts:
            return
        if len(name) > NAME_MAX - len(MARK):
            directory.xwhiteouts = True
        elif directory.marks is not None:
            directory.marks.add(name)

    def before_removal(self, inode: Inode | None) -> Removal:
        """What :meth:`removed` has to know of ``inode``, if there is one, when one of its names has gone."""
        if inode is None:
            return Removal(-1, None)
        nlink: int | None = None
        is_last = True
        if isinstance(inode, FileInode):
            if inode.nlink is not None:
                nlink = inode.nlink - 1
            elif not inode.upper:
                assert inode.lower is not None
                layer, path = inode.lower
                nlink = 0 if inode.key is None else layer.stat(path).st_nlink - 1  # without a key it has one name
            is_last = not inode.aliases if inode.staged_link is None else nlink == 0
        fd = -1
        if inode.upper and inode.orphan_fd < 0 and inode.needed and is_last:
            dir_fd, name = self._view.upper_at(inode)
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        return Removal(fd, nlink)

    def removed(self, inode: Inode, directory: DirInode, name: bytes, removal: Removal) -> None:
        """Bring the memory in step with a name that was removed, or replaced, on disk."""
        view = self._view
        if isinstance(inode, DirInode):
            view.forget_upper_dir(inode)
            for child_name, child in list((inode.children or {}).items()):
                child.remove_place(inode, child_name)
        elif isinstance(inode, FileInode) and removal.nlink is not None:
            inode.nlink = removal.nlink
        if removal.fd >= 0:
            inode.orphan_fd = removal.fd
        inode.remove_place(directory, name)
        if inode.has_origin:
            self._copy_up.origins.left(directory, name)
        if isinstance(inode, FileInode):
            if inode.unsynced and inode.orphan:
                self._copy_up.forget_unsynced(inode)
            if inode.staged_link is not None:
                self._hard_links.lost_name(inode)
        if inode.orphan_fd >= 0 and inode.parent is not None:
            os.close(inode.orphan_fd)
            inode.orphan_fd = -1
        view.inodes.drop_if_unneeded(inode)


def _shown_as_whiteout(inode: Inode) -> Inode:
    file = as_file(inode)
    file.is_nested_whiteout = True
    file.kind = stat.S_IFCHR
    return file
