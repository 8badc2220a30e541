"""A container's root file system seen from outside of it: no link in it leads out of it.

The container's own programs fill these directories, also while we look, so the kernel resolves every path
(openat2(2) with RESOLVE_IN_ROOT): ``/`` and ``..`` stop at the container's root.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from types import TracebackType

from unionfs.errors import RunError
from unionfs.host.files import reopen
from unionfs.host.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, has_openat2, openat2

_RESOLVE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS


class RootFs:
    """A mounted root file system, open until :meth:`close`.

    Args:
        path: its root on the host.

    Raises:
        RunError: this kernel cannot resolve paths inside of a directory.
        OSError: the directory cannot be opened.
    """

    def __init__(self, path: str) -> None:
        if not has_openat2():
            raise RunError("unionfs run needs the system call openat2; use Linux 5.6 or newer")
        self.path = path
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> RootFs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, path: str, limit_bytes: int) -> bytes:
        """The first ``limit_bytes`` of a regular file, links followed.

        Raises:
            OSError: there is none, or it is something else (EINVAL): a FIFO is never opened.
        """
        handle = self._open(path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            with os.fdopen(reopen(handle, os.O_RDONLY), "rb") as file:
                return file.read(limit_bytes)
        finally:
            os.close(handle)

    def stat(self, path: str) -> os.stat_result:
        """The attributes of what ``path`` leads to, links followed.

        Raises:
            OSError: it leads nowhere.
        """
        handle = self._open(path, os.O_PATH)
        try:
            return os.fstat(handle)
        finally:
            os.close(handle)

    def open_device(self, path: str, majors: range) -> int:
        """A descriptor of a character device, never made our controlling terminal.

        Args:
            path: links are followed.
            majors: the numbers that it may have: to open a device can have effects, and a container may have put
                another one there.

        Raises:
            OSError: there is none, or it is something else (ENOTTY).
        """
        handle = self._open(path, os.O_PATH)
        try:
            found = os.fstat(handle)
            if not stat.S_ISCHR(found.st_mode) or os.major(found.st_rdev) not in majors:
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY), path)
            return os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(handle)

    def open_dir(self, path: str) -> int | None:
        """A readable descriptor of a directory, links followed; None if there is none."""
        try:
            return self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether ``path`` leads to something."""
        try:
            self.stat(path)
        except OSError:
            return False
        return True

    def make_dir(self, path: str) -> None:
        """Make a directory, mode 0755, with those above it; one that is there stays as it is.

        Raises:
            OSError: something else is in the way.
        """
        os.close(self._dir(path))

    def make_file(self, path: str) -> None:
        """Make an empty file to mount on, mode 0644, with the directories above it; what is there stays as it is.

        Raises:
            OSError: it cannot be made.
        """
        above, _, name = path.rstrip("/").rpartition("/")
        parent = self._dir(above)
        try:
            # A link that leads nowhere counts as there: whoever mounts on it resolves it.
            with suppress(FileExistsError):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent))
        finally:
            os.close(parent)

    def _dir(self, path: str) -> int:
        try:
            return self._open(path, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            pass
        above, _, name = path.rstrip("/").rpartition("/")
        parent = self._dir(above)
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return self._open(path, os.O_PATH | os.O_DIRECTORY)

    def _open(self, path: str, flags: int) -> int:
        # The empty path is not the root for openat2.
        return openat2(self._fd, os.fsencode(path) or b"/", flags, _RESOLVE)
