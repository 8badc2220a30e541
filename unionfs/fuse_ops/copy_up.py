"""Copy-up: giving an object that only lower layers have a place of its own in the upper layer.

A copy is made complete in the work directory and renamed into place, so it is never seen half-done; its data is on
disk before that, unless the mount is volatile, or the lower file answers for it (:mod:`unionfs.fuse_ops.unsynced`).
Until then the copy has no name, where the file system allows that.
The slow part, copying data, is a :class:`CopyUpJob` that knows only descriptors: it may run in a worker thread while
the tree goes on serving others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from unionfs.fuse_ops import syscalls
from unionfs.fuse_ops.attributes import CAPABILITY
from unionfs.fuse_ops.copying import at_path, copy_data, copy_mode, copy_owner, copy_times, copy_xattrs
from unionfs.fuse_ops.inodes import Inode
from unionfs.fuse_ops.layer_dir import LayerDir
from unionfs.fuse_ops.merged_view import MergedView
from unionfs.fuse_ops.need import CONTENTS, Need
from unionfs.fuse_ops.overlay_format import UNSYNCED, encode_origin
from unionfs.fuse_ops.unsynced import Attribute, Unsynced, settle, unmark
from unionfs.fuse_ops.upper_dir import NewFile, UpperDir

At = tuple[int, bytes]
"""An object as the ``*at`` calls name it: by a directory descriptor and a name, or by its own and an empty one."""

NO_ROOM_FOR_PATH = frozenset({errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EOPNOTSUPP, errno.EPERM})
"""Errors that say that a path from the top of the layers cannot be recorded in an attribute."""

_MAKE_NAMES = stat.S_IWUSR | stat.S_IXUSR  # what its owner needs to make names in a directory
_LATER_BYTES = 1 << 20  # copies of up to this size may be synced later: for large ones the copying takes longer

_NO_HANDLES = frozenset({errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM, errno.EINVAL})


class CopyUpJob:
    """The copying of one file's data, or its syncing. :meth:`run` may be called in a worker thread."""

    __slots__ = (
        "capability",
        "inode",
        "later",
        "mark",
        "new",
        "origin",
        "overwrites",
        "size",
        "source_fd",
        "st",
        "sync",
        "target_fd",
    )

    def __init__(
        self,
        inode: Inode,
        st: os.stat_result,
        source_fd: int,
        target_fd: int,
        new: NewFile | None,
        size: int,
        *,
        sync: bool,
    ) -> None:
        self.inode = inode
        self.st = st
        self.source_fd = source_fd
        self.target_fd = target_fd
        self.new = new  # the file behind ``target_fd``; None when the data goes straight into the upper file
        self.size = size
        self.sync = sync
        self.later = False  # whether it is to be synced later
        self.overwrites = False  # whether the target may have data by now
        self.capability: bytes | None = None  # file capabilities of the target, which writing to it takes away
        self.mark: bytes | None = None  # the attribute to remove from a copy that was made before, to be settled now
        self.origin: Attribute | None = None  # what such a copy is given in its place

    def run(self) -> None:
        """Copy the data, and see to it that it is on disk if the mount's policy asks for that."""
        if self.mark is not None:
            settle(self.target_fd, self.mark, self.origin)
        else:
            copy_data(self.source_fd, self.target_fd, self.size, sync=self.sync, overwrite=self.overwrites)

    def close(self) -> None:
        for fd in (self.source_fd, self.target_fd):
            if fd >= 0:
                os.close(fd)


class CopyUp:
    """Copies objects up, one after the other or in three steps: :meth:`begin`, ``job.run()``, :meth:`finish`."""

    def __init__(self, view: MergedView) -> None:
        self._view = view
        view.link_held = self.link_held
        self._server_uid = os.geteuid()
        self._sync = view.options.fsync and not view.options.volatile
        self.unsynced: Unsynced | None = None  # where copies that are synced later are remembered; None: there are none

    @property
    def _upper(self) -> UpperDir:
        if self._view.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._view.upper

    def require_writable(self) -> UpperDir:
        """The upper directory; raises EROFS for a mount without one."""
        return self._upper

    # -- the whole of it --------------------------------------------------------------------------------------

    def needs(self, inode: Inode, need: Need = CONTENTS) -> bool:
        """Whether ``inode`` has to be copied up before it can be changed."""
        return not inode.upper or (need.data and (inode.metacopy or inode.unsynced))

    def may_sync_later(self, inode: Inode, st: os.stat_result) -> bool:
        """Whether a copy of the lower ``inode``, for new attributes, may get its place before it is on the disk."""
        if self.unsynced is None or not stat.S_ISREG(st.st_mode) or not 0 < st.st_size <= _LATER_BYTES:
            return False
        # Elsewhere than under the lower file's name, the mark would not find it.
        return inode.parent is not None and not inode.metacopy and not self._has_other_names(inode, st)

    def ensure(self, inode: Inode, need: Need = CONTENTS, st: os.stat_result | None = None) -> None:
        """Copy ``inode``, which is to be changed, up now if it needs to be.

        ``st`` is lstat of its real object, from somebody who has just asked for it.
        """
        job = self.begin(inode, need, st)
        if job is None:
            return
        try:
            job.run()
        except BaseException:
            self.abort(job)
            raise
        self.finish(job)

    def ensure_directory(self, directory: Inode) -> int:
        """Copy ``directory`` up if needed and return the descriptor of its upper directory."""
        if not directory.upper:
            self.ensure(directory)
        return self._view.upper_dir_fd(directory)

    def begin(self, inode: Inode, need: Need = CONTENTS, st: os.stat_result | None = None) -> CopyUpJob | None:
        """Start copying ``inode`` up as :meth:`ensure` does; returns the job that is left to do, None if it is done.

        Directories, links and other special files, and files of which no data is wanted, are done at once.
        """
        upper = self._upper
        if not self.needs(inode, need):
            return None
        if inode.unsynced:
            return self.begin_settling(inode)
        if inode.upper:
            return self._begin_data(inode, need)
        self._ensure_parents(inode)
        if st is None:
            st = self._view.real_stat(inode)
        if inode.kind == stat.S_IFDIR:
            self._directory(upper, inode, st)
            return None
        if not stat.S_ISREG(st.st_mode):
            self._special(upper, inode, st)
            return None
        assert inode.lower is not None
        wanted = need.bytes_of(st.st_size)
        if not need.data and self._view.options.metacopy and st.st_size > 0:
            self._metacopy(upper, inode, st)
            return None
        source = self._view.data_source(inode)
        source_fd = source[0].open(source[1], os.O_RDONLY)
        later = need.later and not need.data and self.may_sync_later(inode, st)
        try:
            new = self._marked_file(upper, st.st_size) if later else upper.new_file()
        except BaseException:
            os.close(source_fd)
            raise
        job = CopyUpJob(inode, st, source_fd, new.fd, new, wanted, sync=self._sync and wanted > 0 and not later)
        job.later = later
        if wanted == 0:
            self.finish(job)
            return None
        return job

    def finish(self, job: CopyUpJob) -> None:
        """Put a copied file into its place: after this it is the inode's object, also for files open by now."""
        if job.mark is not None:
            self._finish_settling(job)
            return
        if job.new is None:
            self._finish_data(job)
            return
        upper, inode = self._upper, job.inode
        try:
            # A metacopy has its data from another file than the rest.
            source = self._lower_at(inode) if inode.metacopy else (job.source_fd, b"")
            # Beside the mark there is no room for the origin in an inode of ext4: it would take a block of the disk,
            # and keep it. So it comes when the mark goes.
            later = self._origin_of(self._lower(inode)[0], source) if job.later else None
            self._dress(inode, job.st, source, (job.target_fd, b""), with_origin=later is None)
            inode.has_origin |= later is not None
            self._install_file(upper, inode, job.new, job.st)
        except BaseException:
            self.abort(job)
            raise
        # From here on the copy is the file: whatever fails must not take it away.
        inode.lower = inode.data = None
        inode.metacopy = False
        if later is not None and self.unsynced is not None and not inode.orphan:
            self.unsynced.add(inode, later)
        try:
            self._switch_handles(inode, job.target_fd)
        finally:
            job.close()

    def abort(self, job: CopyUpJob) -> None:
        """Give up: the file stays what it was."""
        if job.new is None and job.mark is None:
            with contextlib.suppress(OSError):
                if not job.overwrites:  # a metacopy stays a file without data
                    os.ftruncate(job.target_fd, 0)
                    os.ftruncate(job.target_fd, job.st.st_size)
                self._give_back_capability(job)
        job.close()
        if job.new is not None:
            self._upper.discard(job.new.temp)

    # -- parts ------------------------------------------------------------------------------------------------

    def _ensure_parents(self, inode: Inode) -> None:
        missing: list[Inode] = []
        for parent, _ in inode.places():
            node: Inode | None = parent
            while node is not None and not node.upper:
                missing.append(node)
                node = node.parent
        for node in reversed(missing):
            if not node.upper:
                self._directory(self._upper, node, self._view.real_stat(node))

    def _dress(self, inode: Inode, st: os.stat_result, source: At, target: At, *, with_origin: bool = True) -> None:
        """Give the copy ``target`` of ``source`` everything but its data and its place.

        The mode follows the extended attributes, which a server without privilege can set on a file that it may
        write only. The times are last, and stay: renames and links do not change them.
        """
        copy_owner(*target, st)
        if with_origin and self._records_origin(inode, st):
            inode.has_origin = self._set_origin(inode, source, target)
        copy_xattrs(at_path(*source), at_path(*target), self._view.xattrs)
        copy_mode(*target, st)
        copy_times(*target, st)

    @staticmethod
    def _lower(inode: Inode) -> tuple[LayerDir, bytes]:
        if inode.kind == stat.S_IFDIR:
            return inode.lowers[0].layer, inode.lowers[0].path
        assert inode.lower is not None
        return inode.lower

    def _lower_at(self, inode: Inode) -> At:
        """The lower object that is copied up."""
        layer, path = self._lower(inode)
        return layer.locate(path)

    @staticmethod
    def _has_other_names(inode: Inode, st: os.stat_result) -> bool:
        """Whether this may be a file of which the lower layers have names that nobody has looked up."""
        return st.st_nlink > 1 and inode.nlink != 0

    def _records_origin(self, inode: Inode, st: os.stat_result) -> bool:
        # Of several names the kernel, too, sets no origin: after a remount they are different files.
        return inode.kind == stat.S_IFDIR or (inode.parent is not None and not self._has_other_names(inode, st))

    def _set_origin(self, inode: Inode, source: At, target: At) -> bool:
        """Record which lower object the copy comes from: the kernel and the next mount take its inode number."""
        value = self._origin_of(self._lower(inode)[0], source)
        try:
            os.setxattr(at_path(*target), self._view.xattrs.origin, value, follow_symlinks=not target[1])
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            return False  # user.* attributes exist on files and directories only
        return True

    @staticmethod
    def _origin_of(layer: LayerDir, source: At) -> bytes:
        """What a copy of ``source``, which is in ``layer``, has as its origin."""
        try:
            handle = syscalls.file_handle(*source)
        except OSError as error:
            if error.errno not in _NO_HANDLES:
                raise
            return b""
        return encode_origin(handle, layer.filesystem_uuid)

    def mark_impure(self, directory: Inode) -> None:
        """Note on an upper directory that it has children with an origin (kernel: their d_ino must be looked up)."""
        if directory.impure:
            return
        assert self._view.upper is not None
        path = b"/proc/self/fd/%d" % self._view.upper_dir_fd(directory)
        with contextlib.suppress(OSError):  # only costs the stability of inode numbers
            os.setxattr(path, self._view.xattrs.impure, b"y")
        directory.impure = True

    def _directory(self, upper: UpperDir, inode: Inode, st: os.stat_result) -> None:
        if inode.orphan:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        temp = upper.temp_name()
        os.mkdir(temp, 0o700, dir_fd=upper.work_fd)
        try:
            self._dress(inode, st, self._lower_at(inode), (upper.work_fd, temp))
            self._place_directory(upper, inode, temp, st)
        except BaseException:
            upper.discard(temp)
            raise
        if inode.has_origin and inode.parent is not None:
            self.mark_impure(inode.parent)
        inode.upper = True
        inode.marks = set()

    def _special(self, upper: UpperDir, inode: Inode, st: os.stat_result) -> None:
        temp = upper.temp_name()
        if stat.S_ISLNK(st.st_mode):
            os.symlink(self._view.readlink(inode), temp, dir_fd=upper.work_fd)
        else:
            os.mknod(temp, st.st_mode, st.st_rdev, dir_fd=upper.work_fd)
        try:
            self._dress(inode, st, self._lower_at(inode), (upper.work_fd, temp))
            self._install_file(upper, inode, NewFile(-1, temp, named=True), st)
        except BaseException:
            upper.discard(temp)
            raise
        inode.lower = None

    def _metacopy(self, upper: UpperDir, inode: Inode, st: os.stat_result) -> None:
        """Copy everything but the data, which stays below until it is changed (kernel: ``metacopy=on``).

        It is found there under the name that the copy has; :meth:`detach` sees to it that this stays so.
        """
        new = upper.new_file()
        try:
            os.ftruncate(new.fd, st.st_size)
            os.setxattr(new.fd, self._view.xattrs.metacopy, b"")
            self._dress(inode, st, self._lower_at(inode), (new.fd, b""))
            self._install_file(upper, inode, new, st)
        except BaseException:
            upper.discard(new.temp)
            raise
        finally:
            os.close(new.fd)
        if not inode.metacopy:
            inode.metacopy = True
            inode.data = inode.lower
        inode.lower = None

    def detach(self, inode: Inode) -> None:
        """Before a metacopy gets another name: have it find its data by a path from the top (kernel: ``redirect``).

        Where that cannot be recorded the data is copied.
        """
        if inode.unsynced:
            self.ensure(inode)
        if not inode.metacopy or (inode.orphan and inode.hold is None):
            return
        path, _ = self._view.proc_path(inode)
        name = inode.name
        with contextlib.suppress(OSError):
            recorded = os.getxattr(path, self._view.xattrs.redirect, follow_symlinks=False)
            if recorded.startswith(b"/"):
                return  # it holds wherever the file is
            name = recorded
        directory = None if inode.parent is None else inode.parent.stack_path
        if directory is not None:
            where = b"/%s/%s" % (directory, name) if directory else b"/" + name
            try:
                os.setxattr(path, self._view.xattrs.redirect, where, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in NO_ROOM_FOR_PATH:
                    raise
        self.ensure(inode)

    def _install_file(self, upper: UpperDir, inode: Inode, new: NewFile, st: os.stat_result) -> None:
        """Make ``new`` the upper object of ``inode`` at all its places."""
        places = list(inode.places())
        has_other_names = self._has_other_names(inode, st)
        if not places and not has_other_names:  # unlinked in the meantime, but still open
            upper.hold(new)  # a file that never had a name could be given one later
            inode.orphan_fd = os.open(new.temp, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper.work_fd)
            os.unlink(new.temp, dir_fd=upper.work_fd)
            inode.upper = True
            return
        if not has_other_names:
            self._place_file(upper, inode, new)
            if inode.has_origin and inode.parent is not None:
                self.mark_impure(inode.parent)
            inode.upper = True
            return
        # Several names: the copy stays in the work directory for as long as the mount lives, and every name that is
        # looked up becomes a link to it. So they remain one file, also those that nobody has looked up yet.
        upper.hold(new)
        inode.hold = new.temp
        inode.upper = True
        if inode.nlink is None:
            inode.nlink = st.st_nlink
        try:
            for parent, name in places:
                self.link_held(inode, parent, name)
        except BaseException:
            inode.hold, inode.upper = None, False
            raise

    def link_held(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Give a copied-up, hard-linked file its name in the upper directory."""
        assert inode.hold is not None
        upper = self._upper
        parent_fd = self.ensure_directory(parent)

        def link() -> None:
            assert inode.hold is not None
            with contextlib.suppress(FileExistsError):
                os.link(inode.hold, name, src_dir_fd=upper.work_fd, dst_dir_fd=parent_fd, follow_symlinks=False)

        self._unseen(parent_fd, link)

    def _place_file(self, upper: UpperDir, inode: Inode, new: NewFile) -> None:
        assert inode.parent is not None
        parent_fd, name = self._view.upper_dir_fd(inode.parent), inode.name
        self._unseen(parent_fd, lambda: upper.place(new, parent_fd, name))

    def _place_directory(self, upper: UpperDir, inode: Inode, temp: bytes, st: os.stat_result) -> None:
        assert inode.parent is not None
        parent_fd, name = self._view.upper_dir_fd(inode.parent), inode.name

        def install() -> None:
            upper.install(upper.work_fd, temp, parent_fd, name, directory=True)

        def install_and_restrict() -> None:
            # A directory that may not be written by its owner cannot be moved by him to another one either.
            os.chmod(temp, stat.S_IMODE(st.st_mode) | stat.S_IWUSR, dir_fd=upper.work_fd)
            install()
            os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=parent_fd)

        # What is in the work directory is ours, whoever the lower one belongs to.
        may_be_moved = st.st_mode & stat.S_IWUSR or self._server_uid == 0
        self._unseen(parent_fd, install if may_be_moved else install_and_restrict)

    def _unseen(self, dir_fd: int, make: Callable[[], None]) -> None:
        """Make something in an upper directory of which the merged tree is to show nothing.

        Nor may the directory's mode forbid it, which is that of the merged one: for its owner without privilege it
        is another one meanwhile.
        """
        before = os.stat(dir_fd)
        may_make = before.st_mode & _MAKE_NAMES == _MAKE_NAMES
        if may_make or self._server_uid == 0 or self._server_uid != before.st_uid:
            make()
        else:
            path = b"/proc/self/fd/%d" % dir_fd
            os.chmod(path, stat.S_IMODE(before.st_mode) | _MAKE_NAMES)
            try:
                make()
            finally:
                os.chmod(path, stat.S_IMODE(before.st_mode))
        with contextlib.suppress(OSError):
            os.utime(b".", ns=(before.st_atime_ns, before.st_mtime_ns), dir_fd=dir_fd, follow_symlinks=False)

    def _switch_handles(self, inode: Inode, upper_fd: int) -> None:
        """Let files that were opened before the copy-up see what is written after it."""
        for handle in inode.handles or ():
            if handle.has_fd:
                handle.switch(os.open(b"/proc/self/fd/%d" % upper_fd, os.O_RDONLY | os.O_CLOEXEC))

    # -- the data of a metacopy -------------------------------------------------------------------------------

    def _begin_data(self, inode: Inode, need: Need) -> CopyUpJob | None:
        layer, path = self._view.data_source(inode)
        st = self._view.real_stat(inode)
        wanted = need.bytes_of(st.st_size)
        source_fd = layer.open(path, os.O_RDONLY)
        try:
            proc_path, _ = self._view.proc_path(inode)
            target_fd = os.open(proc_path, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(source_fd)
            raise
        job = CopyUpJob(inode, st, source_fd, target_fd, None, wanted, sync=self._sync and wanted > 0)
        job.overwrites = st.st_blocks > 0
        with contextlib.suppress(OSError):
            job.capability = os.getxattr(target_fd, CAPABILITY)
        if wanted == 0:
            self.finish(job)
            return None
        return job

    @staticmethod
    def _give_back_capability(job: CopyUpJob) -> None:
        if job.capability is not None:
            os.setxattr(job.target_fd, CAPABILITY, job.capability)

    def _finish_data(self, job: CopyUpJob) -> None:
        inode = job.inode
        try:
            if job.size < job.st.st_size:
                os.ftruncate(job.target_fd, job.size)
            self._give_back_capability(job)
            os.utime(job.target_fd, ns=(job.st.st_atime_ns, job.st.st_mtime_ns))
            os.removexattr(job.target_fd, self._view.xattrs.metacopy)
            with contextlib.suppress(OSError):
                os.removexattr(job.target_fd, self._view.xattrs.redirect)
            inode.metacopy = False
            inode.data = None
            self._switch_handles(inode, job.target_fd)
        finally:
            job.close()

    # -- data that is synced later ----------------------------------------------------------------------------

    def _marked_file(self, upper: UpperDir, size: int) -> NewFile:
        """An empty file for ``size`` bytes, of which the lower file is to be taken after a crash."""
        assert self.unsynced is not None
        self.unsynced.note()
        new = upper.new_file()
        try:
            os.ftruncate(new.fd, size)  # the size goes with the attribute, the data does not
            os.setxattr(new.fd, self._view.xattrs.metacopy, UNSYNCED)
        except BaseException:
            os.close(new.fd)
            upper.discard(new.temp)
            raise
        return new

    def begin_settling(self, inode: Inode) -> CopyUpJob:
        """The job that brings an unsynced copy to the disk."""
        path, _ = self._view.proc_path(inode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        job = CopyUpJob(inode, os.fstat(fd), -1, fd, None, 0, sync=True)
        job.mark = self._view.xattrs.metacopy
        job.origin = self._later_origin(inode)
        return job

    def _later_origin(self, inode: Inode) -> Attribute | None:
        value = None if self.unsynced is None else self.unsynced.origin_of(inode)
        return None if value is None else (self._view.xattrs.origin, value)

    def _finish_settling(self, job: CopyUpJob) -> None:
        self.forget_unsynced(job.inode)
        job.close()

    def forget_unsynced(self, inode: Inode) -> None:
        """``inode`` need not be settled any more: it is, or it has no name left."""
        if self.unsynced is not None:
            self.unsynced.remove(inode)

    def remove_mark(self, inode: Inode) -> None:
        """Remove the mark of an unsynced copy that has been synced."""
        with contextlib.suppress(FileNotFoundError):  # somebody has changed the upper directory
            path, _ = self._view.proc_path(inode)
            unmark(path, self._view.xattrs.metacopy, self._later_origin(inode))

    def recover(self, inode: Inode) -> None:
        """Copy the data of ``inode``, which a crash has left marked, again, and record where it comes from."""
        layer, lower = self._view.data_source(inode)
        origin = self._origin_of(layer, layer.locate(lower))
        self.ensure(inode)
        path, _ = self._view.proc_path(inode)
        with contextlib.suppress(OSError):  # only costs the stability of its inode number
            os.setxattr(path, self._view.xattrs.origin, origin, os.XATTR_CREATE)
        if inode.parent is not None:
            self.mark_impure(inode.parent)
