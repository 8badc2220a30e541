"""Changes of attributes: owner, mode, times, size, and extended attributes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import Final

from unionfs.fuse_ops.copy_up.copy_up import ATTRIBUTES, CopyUp, scope_for_attributes
from unionfs.fuse_ops.options import XattrPermissions
from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.tree.attributes import ACL_NAMES, CAPABILITY, Override
from unionfs.fuse_ops.tree.inodes import FileInode, Inode, as_file
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.tree.protection import changes_inode, inode_ioctl
from unionfs.fuse_ops.union.changes import Caller
from unionfs.host.processes import CAP_SYS_ADMIN, has_capability

_CONTAINERS_PREFIX: Final = b"user.containers.override_"
# There are none, or none that we may take away: nor does the kernel honour those that an ordinary user has stored.
_NO_CAPABILITIES: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
_XATTR_NAME_MAX: Final = 255


@dataclass(slots=True)
class AttributeChange:
    """What a SETATTR request asks for; None leaves an attribute alone. Times in nanoseconds, size in bytes."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    to_now: bool = False
    """Whether the times are the present one."""

    @property
    def touches(self) -> bool:
        """Whether all that is asked for is the present time."""
        return self.to_now and self._leaves_rest

    @property
    def only_mtime(self) -> bool:
        """Whether the modification time is all that is asked for."""
        return self.mtime_ns is not None and self.atime_ns is None and self._leaves_rest

    @property
    def kills_privileges(self) -> bool:
        """Whether nothing is asked for: how the kernel says that a write takes privileges from the file."""
        return self.mtime_ns is None and self.atime_ns is None and self._leaves_rest

    @property
    def _leaves_rest(self) -> bool:
        return self.mode is None and self.uid is None and self.gid is None and self.size is None


def _in_group(caller: Caller, gid: int) -> bool:
    """Whether ``caller`` is in the group ``gid``, or privileged; a process that cannot be seen is not."""
    if caller.uid == 0 or caller.gid == gid:
        return True
    try:
        with open(f"/proc/{caller.pid}/status", "rb") as status:
            groups = next(line for line in status if line.startswith(b"Groups:"))
    except (OSError, StopIteration):
        return False
    return b"%d" % gid in groups.split()[1:]


class MetadataChanges:
    """Changes attributes of objects, copying them up first."""

    def __init__(self, view: MergedView, copy_up: CopyUp, accounts: Accounts) -> None:
        self._view = view
        self._accounts = accounts
        self._copy_up = copy_up
        self._uncapped: Inode | None = None  # of which capabilities were the last attribute to be removed

    # -- attributes -------------------------------------------------------------------------------------------

    def set_attributes(self, inode: Inode, change: AttributeChange, caller: Caller) -> os.stat_result | None:
        """Apply ``change``. A truncation copies no more data than what remains.

        Returns lstat of the real object afterwards, if that had to be asked for.
        """
        st: os.stat_result | None = None
        self._copy_up.require_writable()
        self.check_change(inode, change)
        if change.kills_privileges:
            # The same request stands for root's chown(-1, -1), which takes setuid, and for his write to a file with
            # capabilities, which takes these alone. Before the latter the kernel has removed them.
            if caller.uid != 0 or self._uncapped is not inode:
                self.clear_privileges(inode, caller)
                self._accounts.changed(inode)
            self._uncapped = None
            return None
        self._copy_up.ensure(inode, scope_for_attributes(change.size))
        if change.size is not None:
            # POSIX: truncation by a process without privilege clears setuid and setgid. First: if one of the two
            # fails, other contents must not have the privileges.
            if caller.uid != 0:
                self.clear_privileges(inode, caller)
            self._truncate(
                as_file(inode), change.size, keep_times=change.mtime_ns is None and self._view.kernel_keeps_time
            )
        if change.uid is not None or change.gid is not None:
            st = self._chown(inode, change.uid, change.gid, caller)
        if change.mode is not None:
            self._chmod(inode, stat.S_IMODE(change.mode))
            st = None
        if change.atime_ns is not None or change.mtime_ns is not None:
            self._set_times(inode, change.atime_ns, change.mtime_ns)
            st = None
        self._accounts.changed(inode, truncated=change.size is not None)
        return st

    def check_change(self, inode: Inode, change: AttributeChange) -> None:
        """Raise EPERM where the flags of ``inode`` forbid ``change``, before anything is copied up for it."""
        protection = self._copy_up.protection
        if change.kills_privileges or not protection.of(inode):
            return
        if change.only_mtime and self._view.kernel_keeps_time and isinstance(inode, FileInode) and inode.handles:
            return  # the kernel's, for what was written while that was allowed
        if change.touches:
            protection.require_touchable(inode)
        else:
            protection.require_changeable(inode)

    def _real(self, inode: Inode) -> tuple[bytes, int | None, bool]:
        """The real object as functions of :mod:`os` take it: path, ``dir_fd`` and ``follow_symlinks``.

        A name in a directory descriptor costs the kernel less than a path that begins with a link in /proc.
        """
        if inode.orphan_fd >= 0:
            return b"/proc/self/fd/%d" % inode.orphan_fd, None, True
        dir_fd, name = self._view.real_at(inode)
        return name, dir_fd, False

    def _truncate(self, inode: FileInode, size: int, *, keep_times: bool) -> None:
        inode.capability = None
        if keep_times:
            st = self._view.real_stat(inode)
            self._truncate(inode, size, keep_times=False)
            with contextlib.suppress(OSError):  # the contents are gone, and the kernel has its own times
                self._set_times(inode, st.st_atime_ns, st.st_mtime_ns)
            return
        for handle in inode.handles or ():
            if handle.writable:
                os.ftruncate(handle.fd, size)
                return
        path, _ = self._view.proc_path(inode)
        os.truncate(path, size)

    def _chown(self, inode: Inode, uid: int | None, gid: int | None, caller: Caller) -> os.stat_result | None:
        ownership = self._view.ownership
        new_uid, new_gid = ownership.to_layer_ids(-1 if uid is None else uid, -1 if gid is None else gid)
        if self._change_override(inode, uid=new_uid, gid=new_gid):
            return None
        path, dir_fd, follow = self._real(inode)
        if isinstance(inode, FileInode):
            inode.capability = None
        try:
            os.chown(path, new_uid, new_gid, dir_fd=dir_fd, follow_symlinks=follow)
        except PermissionError:
            if not ownership.squashed:
                raise
            self.clear_privileges(inode, caller)
            return None
        # The backing chown(2) has cleared setuid and capabilities, but setgid only if the group may execute.
        st = self._view.real_stat(inode)
        if inode.kind == stat.S_IFREG and st.st_mode & stat.S_ISGID:
            self.clear_privileges(inode, caller)
            return None
        return st

    def _chmod(self, inode: Inode, mode: int) -> None:
        if self._change_override(inode, mode=mode):
            return
        if inode.kind == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        path, dir_fd, _ = self._real(inode)
        os.chmod(path, mode, dir_fd=dir_fd)

    def _change_override(self, inode: Inode, uid: int = -1, gid: int = -1, mode: int | None = None) -> bool:
        """Where owner and mode are kept in an attribute: change them there. False where they are not."""
        ownership = self._view.ownership
        if not ownership.overrides:
            return False
        st = self._view.real_stat(inode)
        real_kind = stat.S_IFMT(st.st_mode)
        if real_kind not in (stat.S_IFREG, stat.S_IFDIR):
            return True  # a symbolic link has no attribute to keep it in
        path, _ = self._view.proc_path(inode)
        now = ownership.read_override(path, real_kind) or Override(st.st_uid, st.st_gid, st.st_mode)
        new_mode = now.mode if mode is None else mode
        if mode is None and real_kind == stat.S_IFREG:  # chown clears setuid, and setgid of what the group may run
            new_mode &= ~stat.S_ISUID
            if new_mode & stat.S_IXGRP:
                new_mode &= ~stat.S_ISGID
        kind = stat.S_IFMT(now.mode) or real_kind
        ownership.write_override(
            path,
            Override(
                now.uid if uid == -1 else uid, now.gid if gid == -1 else gid, stat.S_IMODE(new_mode) | kind, now.rdev
            ),
        )
        return True

    def _set_times(self, inode: Inode, atime_ns: int | None, mtime_ns: int | None) -> None:
        if atime_ns is None or mtime_ns is None:
            st = self._view.real_stat(inode)  # os.utime has no UTIME_OMIT
            atime_ns = st.st_atime_ns if atime_ns is None else atime_ns
            mtime_ns = st.st_mtime_ns if mtime_ns is None else mtime_ns
        path, dir_fd, follow = self._real(inode)
        os.utime(path, ns=(atime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=follow)

    def control(self, inode: Inode, command: int, data: bytes, out_size: int) -> bytes:
        """An ioctl(2) of those that :func:`knows_ioctl` knows; returns its output."""
        protection = self._copy_up.protection
        changes = changes_inode(command)
        if changes:
            self._copy_up.require_writable()
            self._copy_up.ensure(inode, ATTRIBUTES)
        path, _ = self._view.proc_path(inode)
        answer, flags = inode_ioctl(path, command, data, out_size, protection.of(inode))
        if changes:
            protection.set(inode, flags)
        return answer

    def clear_privileges(self, inode: Inode, caller: Caller) -> None:
        """Take setuid, setgid and file capabilities away, because ``caller`` changed the contents or the owner.

        Setgid without group execute goes only if the caller is not in the group (kernel: setattr_should_drop_sgid).
        """
        if not isinstance(inode, FileInode) or inode.kind != stat.S_IFREG:
            return
        attributes = self._view.attributes(inode)
        mode = attributes.mode
        keep = stat.S_IMODE(mode) & ~stat.S_ISUID
        if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not _in_group(caller, attributes.gid)):
            keep &= ~stat.S_ISGID
        if keep != stat.S_IMODE(mode):
            self._copy_up.ensure(inode, ATTRIBUTES)
            self._chmod(inode, keep)
        inode.capability = None
        if inode.upper:
            path, follow = self._view.proc_path(inode)
            try:
                os.removexattr(path, CAPABILITY, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in _NO_CAPABILITIES:
                    raise

    # -- extended attributes ----------------------------------------------------------------------------------

    def _stored_name(self, shown: bytes) -> bytes:
        """The name under which a program's attribute ``shown`` is kept."""
        if self._view.options.xattr_permissions is XattrPermissions.CONTAINERS and shown.startswith(
            (b"security.", b"user.containers.")
        ):
            stored = _CONTAINERS_PREFIX + shown
            if len(stored) > _XATTR_NAME_MAX:
                raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
            return stored
        return self._view.xattrs.to_stored(shown)

    def _shown_name(self, stored: bytes) -> bytes | None:
        """The name that a program sees of a stored attribute; None for those that are ours."""
        mode = self._view.options.xattr_permissions
        if mode is XattrPermissions.CONTAINERS:
            if stored.startswith(_CONTAINERS_PREFIX):
                shown = stored[len(_CONTAINERS_PREFIX) :]
                return shown if shown.startswith((b"security.", b"user.containers.")) else None
            if stored.startswith(b"security."):
                return None
        if stored.startswith(b"user.fuseoverlayfs.") or (
            mode is XattrPermissions.PRIVILEGED and stored.startswith(b"security.fuseoverlayfs.")
        ):
            return None
        return None if self._view.xattrs.is_private(stored) else self._view.xattrs.to_shown(stored)

    def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """The value of the attribute that a program calls ``name``; ENODATA without one."""
        if name.startswith(b"user.fuseoverlayfs."):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        path, follow = self._view.proc_path(inode)
        try:
            value = os.getxattr(path, self._stored_name(name), follow_symlinks=follow)
        except OSError as error:
            if name in ACL_NAMES and error.errno == errno.EOPNOTSUPP:
                # The kernel asks before it checks permissions, and takes only this for "there is no ACL".
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None
            raise
        return self._view.ownership.map_acl(value, to_disk=False) if name in ACL_NAMES else value

    def list_xattrs(self, inode: Inode, caller: Caller) -> list[bytes]:
        """The names of the attributes that a program may see; ``trusted.`` ones only for one with CAP_SYS_ADMIN."""
        path, follow = self._view.proc_path(inode)
        try:
            listed = os.listxattr(path, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        names = []
        for text in listed:
            name = self._shown_name(os.fsencode(text))
            if name is not None:
                names.append(name)
        if any(name.startswith(b"trusted.") for name in names) and not has_capability(CAP_SYS_ADMIN, caller.pid):
            return [name for name in names if not name.startswith(b"trusted.")]
        return names

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; ``flags`` are os.XATTR_CREATE and os.XATTR_REPLACE."""
        self._copy_up.require_writable()
        self._copy_up.protection.require_changeable(inode)
        if name.startswith(b"user.fuseoverlayfs."):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        stored = self._stored_name(name)
        self._accounts.require(len(name) + len(value))
        if not inode.upper and flags:
            self.check_xattr(inode, name, flags)
        self._copy_up.ensure(inode, ATTRIBUTES)
        if name in ACL_NAMES:
            value = self._view.ownership.map_acl(value, to_disk=True)
            inode.kernel.default_acl = None
        path, follow = self._view.proc_path(inode)
        os.setxattr(path, stored, value, flags, follow_symlinks=follow)
        self._accounts.changed(inode)
        if stored == CAPABILITY and isinstance(inode, FileInode):
            inode.capability = value if any(handle.writable for handle in inode.handles or ()) else None

    def check_xattr(self, inode: Inode, name: bytes, flags: int) -> None:
        """Raise what setting the attribute with ``flags`` would, so that nothing is copied up for it."""
        try:
            self.get_xattr(inode, name)
        except OSError as error:
            if error.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(name))

    def has_xattr_to_remove(self, inode: Inode, name: bytes) -> bool:
        """Whether there is something to remove; ENODATA if not, except for ACLs of upper files (as the kernel)."""
        self._copy_up.require_writable()
        if name != CAPABILITY:  # which goes when an append-only file is written
            self._copy_up.protection.require_changeable(inode)
        try:
            self.get_xattr(inode, name)
        except OSError as error:
            if name in ACL_NAMES and error.errno == errno.ENODATA and inode.upper:
                return False
            raise
        return True

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove an attribute; ENODATA, and no copy-up, if there is none."""
        if not self.has_xattr_to_remove(inode, name):
            return
        self._copy_up.ensure(inode, ATTRIBUTES)
        path, follow = self._view.proc_path(inode)
        os.removexattr(path, self._stored_name(name), follow_symlinks=follow)
        self._accounts.changed(inode)
        if name == CAPABILITY and isinstance(inode, FileInode):
            inode.capability = None
        self._uncapped = inode if name == CAPABILITY else None
        inode.kernel.default_acl = None
