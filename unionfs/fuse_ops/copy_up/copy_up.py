"""Copy-up: giving an object that only lower layers have a place of its own in the upper layer.

A copy is made complete in the work directory and renamed into place, so nobody sees it half-done. Its data is on the
disk before that, unless the mount is volatile, or the lower file answers for it
(:mod:`unionfs.fuse_ops.copy_up.unsynced`). Until then the copy has no name, where the file system allows that. The slow
part, copying data, is a :class:`CopyUpJob`. It knows only descriptors, so a worker thread may run it while the tree
serves others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from unionfs.fuse_ops.copy_up.hard_links import HardLinks
from unionfs.fuse_ops.copy_up.publishing import Origins, Publisher, origin_of
from unionfs.fuse_ops.copy_up.unsynced import Attribute, Unsynced, sync_and_unmark, unmark
from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.stack.upper_dir import NewFile, UpperDir
from unionfs.fuse_ops.tree.attributes import CAPABILITY
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.protection import Protection
from unionfs.overlay import rules
from unionfs.overlay.copying import (
    At,
    always,
    at_path,
    copy_data,
    copy_flags,
    copy_mode,
    copy_owner,
    copy_times,
    copy_xattrs,
)
from unionfs.overlay.format import UNSYNCED


class CopyUpScope(NamedTuple):
    """How much of a file a change needs in the upper layer, and when on the disk.

    Attributes:
        data: whether the contents are about to be changed, and not the metadata only.
        size: how many bytes of the data will matter (truncation); None is all of them.
        later: whether the data may come to the disk later; only for what keeps its name and contents.
    """

    data: bool = True
    size: int | None = None
    later: bool = False

    def bytes_of(self, size: int) -> int:
        """How many of the ``size`` bytes of a file have to be copied, if its data has to."""
        return size if self.size is None else min(self.size, size)


CONTENTS: Final = CopyUpScope()
"""For writing."""
NO_CONTENTS: Final = CopyUpScope(size=0)
"""For writing after a truncation."""
METADATA: Final = CopyUpScope(data=False)
"""For a new name."""
ATTRIBUTES: Final = CopyUpScope(data=False, later=True)
"""For new attributes under the old name."""


def scope_for_name(*, unsynced: bool) -> CopyUpScope:
    """What a new name for a file needs, which is ``unsynced`` if its data is not on the disk yet."""
    return CONTENTS if unsynced else METADATA


def scope_for_attributes(size: int | None) -> CopyUpScope:
    """What new attributes need, a new ``size`` among them or not."""
    return ATTRIBUTES if size is None else CopyUpScope(size=size, later=True)


@dataclass(eq=False, slots=True)
class CopyUpJob:
    """The copying of one file's data, or its syncing."""

    inode: FileInode
    st: os.stat_result  # of the file that is copied
    source_fd: int  # of the lower file
    target_fd: int
    new: NewFile | None  # the file behind ``target_fd``; None when the data goes straight into the upper file
    size: int
    sync: bool
    later: bool = False  # whether it is to be synced later
    overwrites: bool = False  # whether the target may have data by now
    capability: bytes | None = None  # file capabilities of the target, which writing to it takes away
    mark: bytes | None = None  # the attribute to remove from a copy that was made before, to be settled now
    origin: Attribute | None = None  # what such a copy is given in its place
    is_wanted: Callable[[], bool] = always  # asked now and then; where nobody wants it, the copying ends with EINTR
    data_is_below: tuple[bytes, ...] = ()  # attributes of a target without data that say where that is
    complete: bool = False  # whether such a target has its data
    opens_source: bool = False  # whether ``source_fd`` is O_PATH so far
    empties: bool = False  # whether the copy stands for a truncation, which is a change

    def run(self) -> None:
        """Copy the data, and see to it that it is on disk if that was asked for; in any thread."""
        if self.mark is not None:
            sync_and_unmark(self.target_fd, self.mark, self.origin)
            return
        if self.opens_source:
            self._open_source()
        copy_data(
            self.source_fd,
            self.target_fd,
            self.size,
            sync=self.sync,
            overwrite=self.overwrites,
            is_wanted=self.is_wanted,
        )
        if self.data_is_below:
            self._complete()

    def _open_source(self) -> None:
        """Open the lower file for reading, which may take long where the layer is on a network."""
        handle = self.source_fd
        self.source_fd = os.open(b"/proc/self/fd/%d" % handle, os.O_RDONLY | os.O_CLOEXEC)
        os.close(handle)
        self.opens_source = False

    def _complete(self) -> None:
        """The target has the data: it need not be looked for below any more.

        Synced after that: see :func:`sync_and_unmark`.
        """
        if self.size < self.st.st_size:
            os.ftruncate(self.target_fd, self.size)
        self._restore()
        self.empty()
        os.removexattr(self.target_fd, self.data_is_below[0])
        self.complete = True
        for name in self.data_is_below[1:]:
            with contextlib.suppress(OSError):
                os.removexattr(self.target_fd, name)
        if self.sync:
            os.fsync(self.target_fd)

    def empty(self) -> None:
        """Give the copy the times of a file that has just been truncated, if it stands for that."""
        if self.empties:
            os.ftruncate(self.target_fd, 0)

    def undo(self) -> None:
        """Make the target what it was, as far as that can be done."""
        if not self.data_is_below or self.complete:
            return
        with contextlib.suppress(OSError):
            if not self.overwrites:  # a metacopy stays a file without data
                os.ftruncate(self.target_fd, 0)
            os.ftruncate(self.target_fd, self.st.st_size)
            self._restore()

    def _restore(self) -> None:
        if self.capability is not None:
            os.setxattr(self.target_fd, CAPABILITY, self.capability)
        os.utime(self.target_fd, ns=(self.st.st_atime_ns, self.st.st_mtime_ns))

    def close(self, *, keep_target: bool = False) -> None:
        """Close the descriptors; ``keep_target``: but not that of the copy, which somebody else has now."""
        source_fd, target_fd = self.source_fd, self.target_fd
        self.source_fd = self.target_fd = -1
        for fd in (source_fd, -1 if keep_target else target_fd):
            if fd >= 0:
                os.close(fd)


NO_ROOM_FOR_PATH = frozenset({errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EOPNOTSUPP, errno.EPERM})
"""Errors that say that a path from the top of the layers cannot be recorded in an attribute."""

_LATER_BYTES = 1 << 20  # copies of up to this size may be synced later: for large ones the copying takes longer


class CopyUp:
    """Copies objects up, one after the other or in three steps: :meth:`begin`, ``job.run()``, :meth:`finish`."""

    def __init__(self, view: MergedView, protection: Protection, hard_links: HardLinks, accounts: Accounts) -> None:
        self._view = view
        self.protection = protection
        self._accounts = accounts
        self.origins = Origins(view, accounts)
        self._publisher = Publisher(view, self.origins, self.copy_directory, hard_links, accounts)
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

    def requires(self, inode: Inode, scope: CopyUpScope = CONTENTS) -> bool:
        """Whether ``inode`` has to be copied up before it can be changed."""
        if not inode.upper:
            return True
        return isinstance(inode, FileInode) and scope.data and (inode.metacopy or inode.unsynced)

    def place_names(self, inode: FileInode) -> None:
        """Make those names of a copied-up, hard-linked file that were looked up since links of the upper file."""
        while inode.unplaced:
            self._publisher.link(inode, *next(iter(inode.unplaced)))

    def may_sync_later(self, inode: FileInode, st: os.stat_result) -> bool:
        """Whether a copy of the lower ``inode``, for new attributes, may get its place before it is on the disk."""
        if self.unsynced is None or not stat.S_ISREG(st.st_mode) or not 0 < st.st_size <= _LATER_BYTES:
            return False
        # Elsewhere than under the lower file's name, the mark would not find it.
        return inode.parent is not None and not inode.metacopy and not inode.may_have_other_names(st)

    def ensure(self, inode: Inode, scope: CopyUpScope = CONTENTS, st: os.stat_result | None = None) -> None:
        """Copy ``inode``, which is to be changed, up now if it needs to be.

        ``st`` is lstat of its real object, from somebody who has just asked for it. Afterwards the ctime on disk is
        the one to show: see :meth:`MergedView.unnoticed`.
        """
        job = self._prepare(inode, scope, st)
        if job is not None:
            self._do(job)
        inode.ctime = None

    def make_empty(self, inode: FileInode) -> int:
        """Copy ``inode``, which has data below, up without it; returns a descriptor to read and write it.

        Whoever truncates by opening has nothing left to do then that could fail when the contents are gone.
        """
        job = self._prepare(inode, NO_CONTENTS, None)
        assert job is not None
        job.empties = True
        fd = job.target_fd
        self._do(job, keep_open=True)
        inode.ctime = None
        return fd

    def _do(self, job: CopyUpJob, *, keep_open: bool = False) -> None:
        try:
            job.run()
        except BaseException:
            self.abort(job)
            raise
        self.finish(job, keep_open=keep_open)

    def ensure_directory(self, directory: DirInode) -> int:
        """Copy ``directory``, in which names are about to change, up if needed; returns the upper one's descriptor."""
        if directory.upper:
            directory.ctime = None
        else:
            self.ensure(directory)
        return self._view.upper_dir_fd(directory)

    def copy_directory(self, directory: DirInode) -> int:
        """As :meth:`ensure_directory`, for a copy of what is in it: the merged tree shows nothing of that."""
        missing: list[DirInode] = []
        node: DirInode | None = directory
        while node is not None and not node.upper:
            missing.append(node)
            node = node.parent
        for node in reversed(missing):
            st = self._view.real_stat(node)
            shown_ns = self._view.ctime_ns(node, st)
            self._directory(self._upper, node, st)
            self._view.keep_ctime(node, shown_ns)
        return self._view.upper_dir_fd(directory)

    def begin(self, inode: Inode, scope: CopyUpScope = CONTENTS, st: os.stat_result | None = None) -> CopyUpJob | None:
        """Start copying ``inode`` up as :meth:`ensure` does; returns the job that is left to do, None if it is done.

        Directories, links and other special files, and files of which no data is wanted, are done at once.
        """
        job = self._prepare(inode, scope, st, in_thread=True)
        if job is None or job.size or job.mark is not None:
            return job
        self._do(job)
        return None

    def _prepare(
        self, inode: Inode, scope: CopyUpScope, st: os.stat_result | None, *, in_thread: bool = False
    ) -> CopyUpJob | None:
        if isinstance(inode, FileInode):
            self.place_names(inode)
        if not self.requires(inode, scope):
            return None
        size_bytes = self._accounts.require_copy(inode, data=scope.data, size=scope.size)
        job = self._begin(inode, scope, st, os.O_PATH if in_thread else os.O_RDONLY)
        if job is not None:
            try:
                self._accounts.copying(inode, job.target_fd, size_bytes)
            except BaseException:
                self.abort(job)
                raise
        return job

    def _begin(
        self, inode: Inode, scope: CopyUpScope, st: os.stat_result | None, source_flags: int
    ) -> CopyUpJob | None:
        upper = self._upper
        if isinstance(inode, FileInode):
            if inode.unsynced:
                return self.begin_sync(inode)
            if inode.upper:
                return self._begin_data(inode, scope, source_flags)
        for parent, _ in inode.places():
            self.copy_directory(parent)
        if st is None:
            st = self._view.real_stat(inode)
        if isinstance(inode, DirInode):
            self._directory(upper, inode, st)
            return None
        assert isinstance(inode, FileInode)
        if not stat.S_ISREG(st.st_mode):
            self._special(upper, inode, st)
            return None
        wanted = scope.bytes_of(st.st_size)
        if not scope.data and self._view.options.metacopy and st.st_size > 0:
            self._metacopy(upper, inode, st)
            return None
        source_fd = self._view.open_data(inode, source_flags)
        later = scope.later and not scope.data and self.may_sync_later(inode, st)
        try:
            new = self._marked_file(upper, st.st_size) if later else upper.new_file()
        except BaseException:
            os.close(source_fd)
            raise
        sync = self._sync and wanted > 0 and not later
        opens_source = source_flags == os.O_PATH
        return CopyUpJob(inode, st, source_fd, new.fd, new, wanted, sync, later=later, opens_source=opens_source)

    def finish(self, job: CopyUpJob, *, keep_open: bool = False) -> None:
        """Put a copied file into its place: after this it is the inode's object, also for files open by now.

        With ``keep_open``, ``job.target_fd`` is the caller's from then on.
        """
        try:
            self._finish(job)
        finally:
            self._accounts.copied(job.inode)
        job.close(keep_target=keep_open)

    def _finish(self, job: CopyUpJob) -> None:
        if job.mark is not None:
            self._finish_sync(job)
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
            later = origin_of(self._view.lower_place(inode)[0], source) if job.later else None
            self.copy_metadata(inode, job.st, source, (job.target_fd, b""), with_origin=later is None)
            inode.has_origin |= later is not None
            job.empty()
            self._publisher.file(upper, inode, job.new, job.st)
        except BaseException:
            self.abort(job)
            raise
        # From here on the copy is the file: nothing may fail, or who has it open would see the lower one for ever.
        inode.lower = inode.data = None
        inode.metacopy = False
        if later is not None and self.unsynced is not None and not inode.orphan:
            self.unsynced.add(inode, later)
        self._switch_handles(job)

    def abort(self, job: CopyUpJob) -> None:
        """Give up: the file stays what it was."""
        job.undo()
        if job.complete:  # but for syncing that
            self._finish_data(job)
        job.close()
        if job.new is not None:
            self._upper.discard(job.new.temp)
        self._accounts.copied(job.inode)

    # -- parts ------------------------------------------------------------------------------------------------

    def copy_metadata(
        self, inode: Inode, st: os.stat_result, source: At, target: At, *, with_origin: bool = True
    ) -> None:
        """Give the copy ``target`` of ``source`` everything but its data and its place.

        The mode follows the extended attributes, which a server without privilege can set on a file that it may
        write only. The times are last, and stay: renames and links do not change them.
        """
        self._copy_owner(target, st)
        if with_origin:
            self.origins.record(inode, st, (self._view.lower_place(inode)[0], source), target)
        copy_xattrs(at_path(*source), at_path(*target), self._view.xattrs)
        if inode.kind in (stat.S_IFREG, stat.S_IFDIR):
            copy_flags(source, target)
        protection = self.protection.of(inode)
        if protection:
            self.protection.record(at_path(*target), protection, follow=not target[1])
        copy_mode(*target, st)
        copy_times(*target, st)

    def _copy_owner(self, target: At, st: os.stat_result) -> None:
        try:
            copy_owner(*target, st)
        except PermissionError:
            # A server without privilege. What is squashed is shown whatever the copy has, which is the server's.
            ownership = self._view.ownership
            if not ownership.squashed:
                raise
            uid = st.st_uid if ownership.squash_uid is None else -1
            gid = st.st_gid if ownership.squash_gid is None else -1
            os.chown(at_path(*target), uid, gid, follow_symlinks=not target[1])

    def _lower_at(self, inode: Inode) -> At:
        """The lower object that is copied up."""
        layer, path = self._view.lower_place(inode)
        return layer.locate(path)

    def _directory(self, upper: UpperDir, inode: DirInode, st: os.stat_result) -> None:
        if inode.orphan:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        temp = upper.temp_name()
        os.mkdir(temp, 0o700, dir_fd=upper.work_fd)
        try:
            self.copy_metadata(inode, st, self._lower_at(inode), (upper.work_fd, temp))
            self._publisher.directory(upper, inode, temp, st)
        except BaseException:
            upper.discard(temp)
            raise

    def _special(self, upper: UpperDir, inode: FileInode, st: os.stat_result) -> None:
        temp = upper.temp_name()
        if stat.S_ISLNK(st.st_mode):
            os.symlink(self._view.readlink(inode), temp, dir_fd=upper.work_fd)
        else:
            os.mknod(temp, st.st_mode, st.st_rdev, dir_fd=upper.work_fd)
        try:
            self.copy_metadata(inode, st, self._lower_at(inode), (upper.work_fd, temp))
            self._publisher.file(upper, inode, NewFile(-1, temp, named=True), st)
        except BaseException:
            upper.discard(temp)
            raise
        inode.lower = None

    def _metacopy(self, upper: UpperDir, inode: FileInode, st: os.stat_result) -> None:
        """Copy everything but the data, which stays below until it is changed (kernel: ``metacopy=on``).

        It is found there under the name that the copy has; :meth:`make_data_path_absolute` keeps that so.
        """
        new = upper.new_file()
        try:
            os.ftruncate(new.fd, st.st_size)
            os.setxattr(new.fd, self._view.xattrs.metacopy, b"")
            self.copy_metadata(inode, st, self._lower_at(inode), (new.fd, b""))
            self._publisher.file(upper, inode, new, st)
        except BaseException:
            upper.discard(new.temp)
            raise
        finally:
            os.close(new.fd)
        if not inode.metacopy:
            inode.metacopy = True
            inode.data = inode.lower
        inode.lower = None

    def make_data_path_absolute(self, inode: FileInode) -> None:
        """Before a metacopy gets another name: have it find its data by a path from the top (kernel: ``redirect``).

        Where that cannot be recorded the data is copied.
        """
        if inode.unsynced:
            self.ensure(inode)
        if not inode.metacopy or (inode.orphan and inode.staged_link is None):
            return
        path, _ = self._view.proc_path(inode)
        name = inode.name
        recorded = rules.read_redirect(path, (self._view.xattrs,))
        if recorded is not None:
            if recorded.startswith(b"/"):
                return  # it holds wherever the file is
            name = recorded
        directory = None if inode.parent is None else inode.parent.stack_path
        if directory is not None:
            where = b"/%s/%s" % (directory, name) if directory else b"/" + name
            try:
                os.setxattr(path, self._view.xattrs.redirect, where, follow_symlinks=False)
                self._accounts.changed(inode)  # an attribute can take a block
                return
            except OSError as error:
                if error.errno not in NO_ROOM_FOR_PATH:
                    raise
        self.ensure(inode)

    @staticmethod
    def _switch_handles(job: CopyUpJob) -> None:
        """Let files that were opened before the copy-up see what is written after it.

        They get the descriptor that there is, although it may be written to: to open another one may fail.
        """
        for handle in job.inode.handles or ():
            if handle.has_fd:
                handle.switch(job.target_fd)

    # -- the data of a metacopy -------------------------------------------------------------------------------

    def _begin_data(self, inode: FileInode, scope: CopyUpScope, source_flags: int) -> CopyUpJob:
        st = self._view.real_stat(inode)
        wanted = scope.bytes_of(st.st_size)
        proc_path, _ = self._view.proc_path(inode)
        names = (self._view.xattrs.metacopy, self._view.xattrs.redirect)
        job = CopyUpJob(inode, st, -1, -1, None, wanted, self._sync and wanted > 0, data_is_below=names)
        try:
            job.overwrites = st.st_blocks > 0
            job.source_fd = self._view.open_data(inode, source_flags)
            job.opens_source = source_flags == os.O_PATH
            job.target_fd = os.open(proc_path, os.O_RDWR | os.O_CLOEXEC)
            job.capability = rules.read_xattr(job.target_fd, CAPABILITY)
        except BaseException:
            self.abort(job)
            raise
        return job

    def _finish_data(self, job: CopyUpJob) -> None:
        job.inode.metacopy = False
        job.inode.data = None
        self._switch_handles(job)

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

    def begin_sync(self, inode: FileInode) -> CopyUpJob:
        """The job that brings an unsynced copy to the disk."""
        path, _ = self._view.proc_path(inode)
        mark, origin = self._view.xattrs.metacopy, self._later_origin(inode)
        st = self._view.real_stat(inode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        inode.ctime = (st.st_ctime_ns, self._view.ctime_ns(inode, st))
        return CopyUpJob(inode, st, -1, fd, None, 0, sync=True, mark=mark, origin=origin)

    def _later_origin(self, inode: FileInode) -> Attribute | None:
        value = None if self.unsynced is None else self.unsynced.origin_of(inode)
        return None if value is None else (self._view.xattrs.origin, value)

    def _finish_sync(self, job: CopyUpJob) -> None:
        inode = job.inode
        self.forget_unsynced(inode)
        if inode.ctime is not None:  # nobody has changed it meanwhile
            self._view.keep_ctime(inode, inode.ctime[1])

    def forget_unsynced(self, inode: FileInode) -> None:
        """``inode`` need not be settled any more: it is, or it has no name left."""
        if self.unsynced is not None:
            self.unsynced.remove(inode)

    def remove_mark(self, inode: FileInode) -> None:
        """Remove the mark of an unsynced copy that has been synced."""
        with contextlib.suppress(FileNotFoundError):  # somebody has changed the upper directory
            path, _ = self._view.proc_path(inode)
            unmark(path, self._view.xattrs.metacopy, self._later_origin(inode))

    def recover(self, inode: FileInode) -> None:
        """Copy the data of ``inode``, which a crash has left marked, again, and record where it comes from."""
        layer, lower = self._view.data_source(inode)
        origin = origin_of(layer, layer.locate(lower))
        self.ensure(inode)
        path, _ = self._view.proc_path(inode)
        self.origins.record_later(path, origin)
        if inode.parent is not None:
            self.origins.arrived(inode.parent, inode.name)
