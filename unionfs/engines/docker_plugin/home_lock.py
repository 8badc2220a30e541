"""One process at a time serves a driver's home.

The counts of who uses which mount live in memory, so two processes would unmount each other's layers. The lock is on
the directory itself, so that the home has no file which Docker does not know. It ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.home import ensure_dir, root_owner
from unionfs.errors import DriverError


class HomeLock:
    """Holds the lock until :meth:`release`.

    Args:
        home: the directory; it and its parents are made where they are missing, as the drivers would.
        id_mapping: the owners' mapping.

    Raises:
        DriverError: somebody else holds it, or the directory cannot be made.
    """

    def __init__(self, home: str, id_mapping: IdMapping) -> None:
        self.home = home
        self._fd = -1
        ensure_dir(home, 0o710, (os.geteuid(), root_owner(id_mapping)[1]))
        try:
            self._fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise DriverError(f"cannot use {home} as home: {error.strerror}; choose another directory") from error
            raise DriverError(
                f"{home} is served by another process; stop it (fuser -v {home} shows it), or use another home"
            ) from error

    def release(self) -> None:
        """Let others in; releasing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
