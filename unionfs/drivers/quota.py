"""Size limits of layers by XFS project quota.

A directory gets a project id that everything made in it inherits, and the file system limits what the project holds.
The ids are chosen as Docker does: the home's own plus one is for trying, and one more than the
largest found is the next; those that anybody else uses are left out.

Sources: ioctl_xfs_fsgetxattr(2), quotactl(2), linux/fs.h, linux/dqblk_xfs.h.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator

from unionfs.errors import DriverError, QuotaNotSupportedError
from unionfs.host import inode_flags
from unionfs.host.fs_magic import FsMagic, fs_magic
from unionfs.host.syscalls import in_user_namespace, quotactl

BLOCK_DEVICE_NAME = "backingFsBlockDev"

_PRJQUOTA = 2
_Q_XSETQLIM = 0x5804
_Q_XGETQUOTA = 0x5803
# struct fs_disk_quota: version, flags, field mask, id, then block and inode limits and counts, timers, padding.
_DISK_QUOTA = struct.Struct("=bbHIQQQQQQ56x")
_FIELD_BLOCK_SOFT, _FIELD_BLOCK_HARD = 1 << 2, 1 << 3
_FLAG_PROJECT = 2
_BLOCK_BYTES = 512


def project_limits(home: str, directories: str | None = None) -> ProjectQuota | NoQuota:
    """Limits for the directories of one home by project quota, or the reason why there are none.

    Args:
        home: the driver's home.
        directories: where the layers' directories are, ``home`` itself unless given.
    """
    try:
        return ProjectQuota(home, directories)
    except QuotaNotSupportedError as error:
        return NoQuota(error)


class NoQuota:
    """:class:`unionfs.drivers.layered.SizeLimits` where nothing can enforce one; ``error`` says why."""

    def __init__(self, error: QuotaNotSupportedError) -> None:
        self._why = str(error)

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""
        raise QuotaNotSupportedError(self._why)

    def apply(self, directory: str, size_bytes: int) -> None:
        """See :meth:`SizeLimits.apply`."""
        self.check()

    def mount_limit(self, directory: str) -> int:
        """See :meth:`SizeLimits.mount_limit`."""
        return 0


class ProjectQuota:
    """:class:`unionfs.drivers.layered.SizeLimits` for the directories of one home; see :func:`project_limits`.

    Raises:
        QuotaNotSupportedError: the file system has no project quotas, or we may not set them.
    """

    def __init__(self, home: str, directories: str | None = None) -> None:
        self._home = home
        self._directories = directories or home
        self._lock = threading.Lock()
        if in_user_namespace():
            raise QuotaNotSupportedError(f"{home}: quotas cannot be set in a user namespace; leave out size")
        if fs_magic(home) != FsMagic.XFS:
            raise self._unsupported("is not on xfs")
        try:
            trial = project_of(home) + 1
            self._node = self._make_node()
            try:
                # Only to ask whether limits can be set at all. No layer may have this id: it would lose its limit here.
                self._limit(trial, 0)
            except OSError:
                os.unlink(self._node)
                raise
        except OSError as error:
            raise self._unsupported(f"has no project quotas ({error.strerror})") from error
        self._next = max([trial + 1, *(number + 1 for number in self._used())])

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""

    def mount_limit(self, directory: str) -> int:
        """See :meth:`SizeLimits.mount_limit`: the file system below does it."""
        return 0

    def apply(self, directory: str, size_bytes: int) -> None:
        """Limit what ``directory``, still empty, may ever hold to ``size_bytes``.

        Raises:
            DriverError: the file system refuses.
        """
        try:
            with self._lock:
                # Others may use the same file system, such as a Docker whose home has the same first id.
                while self._is_in_use(self._next):
                    self._next += 1
                number = self._next
                self._next += 1
            set_project(directory, number)
            self._limit(number, size_bytes)
        except OSError as error:
            raise DriverError(
                f"cannot limit {directory} to {size_bytes} bytes: {error.strerror}; check the quotas of the file system"
            ) from error

    def limit_of(self, directory: str) -> int:
        """The limit of ``directory`` in bytes; 0 for none."""
        number = project_of(directory)
        return self._limits_and_counts(number)[0] * _BLOCK_BYTES if number else 0

    def _is_in_use(self, number: int) -> bool:
        return any(self._limits_and_counts(number))

    def _limits_and_counts(self, number: int) -> tuple[int, ...]:
        """Blocks and inodes allowed (hard and soft each), blocks and inodes in use; all 0 for an unused id."""
        try:
            data = self._quotactl(_Q_XGETQUOTA, number, bytes(_DISK_QUOTA.size))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                return (0,) * 6
            raise
        return _DISK_QUOTA.unpack(data)[4:10]

    def _limit(self, number: int, size_bytes: int) -> None:
        # At least one block, since 0 would mean none.
        blocks = max(1, size_bytes // _BLOCK_BYTES) if size_bytes else 0
        fields = _FIELD_BLOCK_SOFT | _FIELD_BLOCK_HARD
        data = _DISK_QUOTA.pack(1, _FLAG_PROJECT, fields, number, blocks, blocks, 0, 0, 0, 0)
        self._quotactl(_Q_XSETQLIM, number, data)

    def _quotactl(self, command: int, number: int, data: bytes) -> bytes:
        return quotactl(command << 8 | _PRJQUOTA, self._node, number, data)

    def _make_node(self) -> str:
        """quotactl(2) wants the device; there may be no node for it where we run."""
        path = os.path.join(self._home, BLOCK_DEVICE_NAME)
        device = os.stat(self._home).st_dev
        try:
            info = os.lstat(path)
            if stat.S_ISBLK(info.st_mode) and info.st_rdev == device:
                return path
            os.unlink(path)
        except FileNotFoundError:
            pass
        os.mknod(path, stat.S_IFBLK | 0o600, device)
        return path

    def _used(self) -> Iterator[int]:
        """The project ids of the directories in the home and one level below."""
        for top in {self._home, self._directories}:
            with os.scandir(top) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        yield project_of(entry.path)

    def _unsupported(self, why: str) -> QuotaNotSupportedError:
        return QuotaNotSupportedError(
            f"{self._home} {why}, so no size can be enforced; "
            "put it on an xfs file system mounted with pquota, or leave out size"
        )


def project_of(path: str) -> int:
    """The project id of a file or directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return inode_flags.get_extended(fd).project
    finally:
        os.close(fd)


def set_project(directory: str, number: int) -> None:
    """Give ``directory`` the project id ``number``, which what is made in it inherits."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        inode_flags.set_project(fd, number, inherit=True)
    finally:
        os.close(fd)
