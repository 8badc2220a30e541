"""The unix socket that an engine finds the plugin by: made here, or handed over by systemd (sd_listen_fds(3))."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress

from unionfs.errors import DriverError

_FIRST_PASSED_FD = 3
_BACKLOG = 128


class Listener:
    """A listening unix socket.

    Attributes:
        path: where it is in the file system.
        socket: the socket.
    """

    def __init__(self, path: str, listening: socket.socket, *, own: bool) -> None:
        self.path = path
        self.socket = listening
        self._file = _identity(path) if own else None

    def withdraw(self) -> None:
        """Let nobody connect any more: who tries now tries again until the next plugin is there.

        A socket of systemd's stays: connections wait in it.
        """
        # Another plugin may have taken the place of a file that somebody removed.
        if self._file is not None and _identity(self.path) == self._file:
            os.unlink(self.path)
        self._file = None

    def close(self) -> None:
        """Withdraw and close the socket."""
        self.withdraw()
        self.socket.close()


def listen(path: str) -> Listener:
    """Make the socket ``path`` with mode 0600, in the place of one that nobody listens on.

    Raises:
        DriverError: another process listens there, or it cannot be made.
    """
    directory = os.path.dirname(path) or "."
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        # Two that start at the same time must not both find that nobody listens.
        with _locked(directory):
            _clear(path)
            old = os.umask(0o177)
            try:
                listening.bind(path)
            finally:
                os.umask(old)
            listening.listen(_BACKLOG)
        return Listener(path, listening, own=True)
    except OSError as error:
        listening.close()
        raise DriverError(
            f"cannot listen on {path}: {error.strerror or error}; choose another with --socket"
        ) from error
    except BaseException:
        listening.close()
        raise


def passed(environment: MutableMapping[str, str]) -> Listener | None:
    """The socket that systemd passed on; None when it passed none. Its variables are taken out.

    Raises:
        DriverError: several were passed, or something that is no listening unix socket.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise DriverError(f"systemd passed {count} sockets; the unit must have one ListenStream")
    wrong = DriverError("systemd passed something else than a unix stream socket; write ListenStream=/path")
    try:
        os.set_inheritable(_FIRST_PASSED_FD, False)
        listening = socket.socket(fileno=_FIRST_PASSED_FD)
        listens = bool(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        raise wrong from None
    if listening.family != socket.AF_UNIX or listening.type != socket.SOCK_STREAM or not listens:
        raise wrong
    return Listener(str(listening.getsockname()), listening, own=False)


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on, and nothing else."""
    try:
        # Asked first: connecting to any other kind of file is refused just as by a socket without a listener.
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise DriverError(f"{path} is there and is no socket; choose another path with --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise DriverError(f"{path} is another kind of socket; choose another path with --socket") from error
            raise
        pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise DriverError(f"process {pid} listens on {path}; stop it, or choose another --name")


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _identity(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        info = os.lstat(path)
        return info.st_dev, info.st_ino
    return None
