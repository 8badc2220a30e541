"""The writable layer: the primitive changes of the upper directory, each visible at once or not at all.

An object is made complete in the work directory, then renamed to its place. Nothing here knows inodes; directories
are given by descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator

from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.host import syscalls
from unionfs.host.files import make_accessible, remove_tree
from unionfs.overlay import rules
from unionfs.overlay.format import MARK, NAME_MAX, OPAQUE_MARK, WHITEOUT_DEVICE, OverlayXattrs, is_whiteout

log = logging.getLogger(__name__)

_DEFAULT_ACL = b"system.posix_acl_default"
_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_NO_DEVICES = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NewFile:
    """A file in the making: ``fd``, and the name ``temp`` in the work directory, which it has if ``named``."""

    __slots__ = ("fd", "named", "temp")

    def __init__(self, fd: int, temp: bytes, *, named: bool) -> None:
        self.fd = fd
        self.temp = temp
        self.named = named


class UpperDir:
    """The upper directory ``layer`` with its work directory ``work_fd`` (a descriptor of ``<workdir>/work``)."""

    def __init__(self, layer: LayerDir, work_fd: int, xattrs: OverlayXattrs) -> None:
        self.layer = layer
        self.work_fd = work_fd
        self.xattrs = xattrs
        self._serial = 0
        # Another server may use the same work directory: engines mount a container twice.
        self._prefix = b"#%x-" % os.getpid()
        self._whiteout_link: bytes | None = None
        # Until the file system says otherwise, which it is asked when it matters first: a mount should take no longer.
        self._has_unnamed_files = True
        self._rename_whiteout = True
        self._device_whiteouts: bool | None = None

    # -- the work directory -----------------------------------------------------------------------------------

    def temp_name(self) -> bytes:
        """A name in the work directory that is not in use."""
        self._serial += 1
        return self._prefix + b"%x" % self._serial

    def work_path(self, name: bytes) -> bytes:
        return b"/proc/self/fd/%d/%s" % (self.work_fd, name)

    def new_file(self) -> NewFile:
        """Make an empty file; it gets its place by :meth:`place`, or a name in the work directory by :meth:`stage`.

        It has no name until then where the file system can do that. That is cheaper, above all to sync, since some
        file systems sync the directory of a new name with it: ext4 without a journal takes nearly twice as long for
        that. And a server that dies leaves nothing to be removed.
        """
        temp = self.temp_name()
        if self._has_unnamed_files:
            try:
                fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.work_fd)
                return NewFile(fd, temp, named=False)
            except OSError as error:
                if error.errno not in _NO_UNNAMED_FILES:
                    raise
                self._has_unnamed_files = False
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        return NewFile(os.open(temp, flags, 0o600, dir_fd=self.work_fd), temp, named=True)

    def stage(self, new: NewFile) -> None:
        """Give ``new`` its name in the work directory, if it has none."""
        if not new.named:
            os.link(b"/proc/self/fd/%d" % new.fd, new.temp, dst_dir_fd=self.work_fd)
            new.named = True

    def place(self, new: NewFile, dir_fd: int, name: bytes) -> None:
        """Give a finished file its place, where there is nothing or a whiteout."""
        if not new.named:
            try:
                os.link(b"/proc/self/fd/%d" % new.fd, name, dst_dir_fd=dir_fd)
                return
            except FileExistsError:  # only a rename replaces something
                self.stage(new)
        self.install(self.work_fd, new.temp, dir_fd, name, directory=False)

    def discard(self, name: bytes) -> None:
        """Remove ``name`` from the work directory, whatever it is; what cannot be removed is left to the next mount."""
        try:
            remove_tree(self.work_fd, name)
        except OSError as error:
            log.warning("cannot remove %s from the work directory: %s", os.fsdecode(name), error)

    @contextlib.contextmanager
    def staging(self, parent_fd: int) -> Iterator[tuple[int, bytes]]:
        """A directory descriptor and a name under which to make an object that will be renamed into ``parent_fd``.

        If the parent has a default ACL, the object must inherit it, which only the kernel does right: it is then made
        in a directory with the same default ACL.
        """
        name = self.temp_name()
        acl = rules.read_xattr(b"/proc/self/fd/%d" % parent_fd, _DEFAULT_ACL, follow=True)
        if acl is None:
            try:
                yield self.work_fd, name
            except BaseException:
                self.discard(name)
                raise
            return
        os.mkdir(name, 0o700, dir_fd=self.work_fd)
        try:
            fd = os.open(name, _DIR_FLAGS, dir_fd=self.work_fd)
            try:
                os.setxattr(fd, _DEFAULT_ACL, acl)
                yield fd, b"new"
            finally:
                os.close(fd)
        finally:
            self.discard(name)

    # -- whiteouts --------------------------------------------------------------------------------------------

    @property
    def device_whiteouts(self) -> bool:
        """Whether whiteouts are devices; where those cannot be made, they are marks."""
        if self._device_whiteouts is None:
            link = self.temp_name()
            try:
                os.mknod(link, stat.S_IFCHR, WHITEOUT_DEVICE, dir_fd=self.work_fd)
            except OSError as error:
                if error.errno not in _NO_DEVICES:
                    raise
                self._device_whiteouts = False
            else:
                self._device_whiteouts = True
                self._whiteout_link = link
        return self._device_whiteouts

    def _link_whiteout(self, dir_fd: int, name: bytes) -> None:
        """Make ``name`` a device whiteout: one inode serves them all while its link count allows (as the kernel)."""
        if self._whiteout_link is not None:
            try:
                os.link(self._whiteout_link, name, src_dir_fd=self.work_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOENT, errno.EXDEV):
                    raise
                self._whiteout_link = None
        os.mknod(name, stat.S_IFCHR, WHITEOUT_DEVICE, dir_fd=dir_fd)
        link = self.temp_name()
        with contextlib.suppress(OSError):  # without links every whiteout is an inode of its own
            os.link(name, link, src_dir_fd=dir_fd, dst_dir_fd=self.work_fd, follow_symlinks=False)
            self._whiteout_link = link

    def _prepared_whiteout(self, dir_fd: int) -> bytes:
        """Make a whiteout in the work directory that has only to be moved to its place in ``dir_fd``; its name."""
        temp = self.temp_name()
        if self.device_whiteouts:
            self._link_whiteout(self.work_fd, temp)
            return temp
        # For names too long for a mark: a zero-size file with an attribute.
        self.allow_xattr_whiteouts(dir_fd)
        try:
            os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self.work_fd))
            os.setxattr(self.work_path(temp), self.xattrs.whiteout, b"y", follow_symlinks=False)
        except BaseException:
            self.discard(temp)
            raise
        return temp

    def allow_xattr_whiteouts(self, dir_fd: int) -> None:
        """Have the directory say that files in it may be whiteouts, unless it hides all that is below anyway."""
        with contextlib.suppress(FileExistsError):
            os.setxattr(b"/proc/self/fd/%d" % dir_fd, self.xattrs.opaque, b"x", os.XATTR_CREATE)

    def _uses_mark(self, name: bytes) -> bool:
        """Whether a whiteout of ``name`` is a mark, which stands beside the name."""
        return not self.device_whiteouts and len(name) <= NAME_MAX - len(MARK)

    def whiteout(self, dir_fd: int, name: bytes) -> None:
        """Hide the lower ``name`` where the upper directory has nothing of that name."""
        if self.device_whiteouts:
            self._link_whiteout(dir_fd, name)
        elif self._uses_mark(name):
            self._make_mark(dir_fd, name)
        else:
            temp = self._prepared_whiteout(dir_fd)
            try:
                os.rename(temp, name, src_dir_fd=self.work_fd, dst_dir_fd=dir_fd)
            except BaseException:
                self.discard(temp)
                raise

    def _make_mark(self, dir_fd: int, name: bytes) -> bool:
        """Make the mark of ``name``; false if there was one."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(MARK + name, flags, 0o600, dir_fd=dir_fd))
        except FileExistsError:
            return False
        return True

    def replace_by_whiteout(self, dir_fd: int, name: bytes, *, directory: bool) -> None:
        """Remove the upper object ``name`` and hide the lower one, in one step."""
        if self._uses_mark(name):
            # First: a crash in between must not bring the lower object back.
            self._beside_mark(dir_fd, name, lambda: self.remove(dir_fd, name, directory=directory))
            return
        temp = self._prepared_whiteout(dir_fd)
        try:
            if not directory:
                os.rename(temp, name, src_dir_fd=self.work_fd, dst_dir_fd=dir_fd)
                return
            try:
                syscalls.renameat2(self.work_fd, temp, dir_fd, name, syscalls.RENAME_EXCHANGE)
            except PermissionError:
                make_accessible(dir_fd, name)
                syscalls.renameat2(self.work_fd, temp, dir_fd, name, syscalls.RENAME_EXCHANGE)
        finally:
            # rename(2) between two links of one inode does nothing: both are whiteouts then, and this one stays.
            self.discard(temp)

    def _beside_mark(self, dir_fd: int, name: bytes, change: Callable[[], None]) -> None:
        """Do ``change`` when ``name`` has its mark, which goes if that fails: a directory beside it shows less."""
        is_new = self._make_mark(dir_fd, name)
        try:
            change()
        except BaseException:
            if is_new:
                _try_unlink(dir_fd, MARK + name)
            raise

    # -- objects ----------------------------------------------------------------------------------------------

    def remove(self, dir_fd: int, name: bytes, *, directory: bool) -> None:
        """Remove the upper object ``name``; of a directory, also the whiteouts that are left in it."""
        if not directory:
            os.unlink(name, dir_fd=dir_fd)
            return
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            temp = self.temp_name()
            self._move_away(dir_fd, name, temp)
            self.discard(temp)

    def _move_away(self, dir_fd: int, name: bytes, temp: bytes) -> None:
        """Move a directory that is to be removed into the work directory."""
        try:
            os.rename(name, temp, src_dir_fd=dir_fd, dst_dir_fd=self.work_fd)
        except PermissionError:
            make_accessible(dir_fd, name)
            os.rename(name, temp, src_dir_fd=dir_fd, dst_dir_fd=self.work_fd)

    def install(self, staging_fd: int, temp: bytes, dir_fd: int, name: bytes, *, directory: bool) -> None:
        """Move a finished object to its place, where there is nothing or a whiteout."""
        if not directory:
            os.rename(temp, name, src_dir_fd=staging_fd, dst_dir_fd=dir_fd)
            return
        try:
            syscalls.renameat2(staging_fd, temp, dir_fd, name, syscalls.RENAME_NOREPLACE)
        except FileExistsError:  # a whiteout, over which no directory can be renamed
            syscalls.renameat2(staging_fd, temp, dir_fd, name, syscalls.RENAME_EXCHANGE)
            _try_unlink(staging_fd, temp)

    def move(
        self,
        old: tuple[int, bytes],
        new: tuple[int, bytes],
        *,
        leave_whiteout: bool,
        over_whiteout: bool,
        directory: bool,
    ) -> None:
        """Rename an object from ``old`` to ``new`` (descriptor and name), leaving a whiteout if asked.

        At the new place there is nothing, an object that the kernel lets it replace, or a whiteout.
        """
        exchange = over_whiteout and directory
        if leave_whiteout and self._uses_mark(old[1]):
            # A crash in between hides rather than resurrects.
            self._beside_mark(*old, lambda: self._rename(old, new, exchange=exchange, stays=False))
        elif exchange:
            if leave_whiteout and not is_whiteout(os.stat(new[1], dir_fd=new[0], follow_symlinks=False)):
                self.allow_xattr_whiteouts(old[0])
            self._rename(old, new, exchange=True, stays=leave_whiteout)
        elif leave_whiteout:
            self._rename_leaving_whiteout(old, new)
        else:
            self._rename(old, new, exchange=False, stays=False)

    @staticmethod
    def _rename(old: tuple[int, bytes], new: tuple[int, bytes], *, exchange: bool, stays: bool) -> None:
        """Rename, of a directory over a whiteout by an exchange; ``stays``: the whiteout hides the old name then."""
        if not exchange:
            os.rename(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0])
            return
        syscalls.renameat2(*old, *new, syscalls.RENAME_EXCHANGE)
        if not stays:
            _try_unlink(*old)

    def _rename_leaving_whiteout(self, old: tuple[int, bytes], new: tuple[int, bytes]) -> None:
        if self.device_whiteouts and self._rename_whiteout:
            try:
                syscalls.renameat2(*old, *new, syscalls.RENAME_WHITEOUT)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
                self._rename_whiteout = False  # a file system without it
        temp = self._prepared_whiteout(old[0])
        try:
            os.rename(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0])
            try:
                os.rename(temp, old[1], src_dir_fd=self.work_fd, dst_dir_fd=old[0])
            except BaseException:
                with contextlib.suppress(OSError):
                    os.rename(new[1], old[1], src_dir_fd=new[0], dst_dir_fd=old[0])
                raise
        finally:
            self.discard(temp)

    def clear_directory(self, dir_fd: int, name: bytes, copy_metadata: Callable[[bytes], None]) -> None:
        """Replace the upper directory ``name``, which holds whiteouts only, by an empty opaque one.

        ``copy_metadata`` gives the directory of that name in the work directory the attributes that it is to have.
        """
        temp = self.temp_name()
        os.mkdir(temp, 0o700, dir_fd=self.work_fd)
        try:
            self.set_opaque(self.work_path(temp))
            copy_metadata(temp)
            syscalls.renameat2(self.work_fd, temp, dir_fd, name, syscalls.RENAME_EXCHANGE)
        finally:
            self.discard(temp)

    def set_opaque(self, path: bytes) -> None:
        """Mark the directory at ``path`` as hiding everything below it."""
        try:
            os.setxattr(path, self.xattrs.opaque, b"y", follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            os.close(os.open(path + b"/" + OPAQUE_MARK, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def close(self) -> None:
        """Release the work directory, leaving nothing of ours in it."""
        if self._whiteout_link is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._whiteout_link, dir_fd=self.work_fd)
            self._whiteout_link = None
        os.close(self.work_fd)
        self.layer.close()


def _try_unlink(dir_fd: int, name: bytes) -> None:
    """Remove what is in the way of nobody, when what was asked for has been done."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError as error:
        log.warning("cannot remove %s: %s", os.fsdecode(name), error.strerror)
