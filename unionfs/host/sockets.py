"""Listening unix sockets: made at a path, or handed over by systemd (sd_listen_fds(3))."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import Final

from unionfs.errors import ListenError

_FIRST_PASSED: Final = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START
_BACKLOG: Final = 128
_PROBE_S: Final = 1.0
_PATH_BYTES: Final = 107  # struct sockaddr_un of unix(7), less the zero byte
_ANOTHER: Final = "name another socket with --socket"
_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid


class Listener:
    """A listening unix socket.

    Attributes:
        path: where it is in the file system.
        socket: the socket.
    """

    def __init__(self, path: str, listening: socket.socket, made: tuple[int, int] | None = None) -> None:
        self.path = path
        self.socket = listening
        self._made = made

    def withdraw(self) -> None:
        """Let nobody connect any more: who tries now tries again until the next server is there.

        A socket of systemd's stays: connections wait in it.
        """
        # Another server may have taken the place of a file that somebody removed.
        if self._made is not None and file_identity(self.path) == self._made:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        self._made = None

    def close(self) -> None:
        """Withdraw and close the socket."""
        self.withdraw()
        self.socket.close()


def listen(path: str, *, private: bool = False) -> Listener:
    """Make the socket ``path`` with mode 0600, in the place of one that nobody listens on.

    Args:
        path: absolute; the directory is created if it is missing.
        private: only in a directory that belongs to this user and that nobody else can write to: who can write to it
            could put a socket of his own there.

    Raises:
        ListenError: another process listens there, or it cannot be made.
    """
    directory_fd = _open_directory(os.path.dirname(path), private)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Of two that start at the same time, the second must find that the first listens.
        fcntl.flock(directory_fd, fcntl.LOCK_EX)
        # By the descriptor that was checked, wherever the path leads by now.
        address = f"/proc/self/fd/{directory_fd}/{os.path.basename(path)}"
        clear_place(path, address)
        before = os.umask(0o177)
        try:
            listening.bind(address)
        finally:
            os.umask(before)
        listening.listen(_BACKLOG)
        return Listener(path, listening, file_identity(address))
    except OSError as error:
        listening.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}; {_ANOTHER}") from error
    except BaseException:
        listening.close()
        raise
    finally:
        os.close(directory_fd)


def clear_place(path: str, address: str | None = None) -> None:
    """Remove the socket ``path`` if nobody listens on it; missing is fine.

    Args:
        path: where a socket is to be made.
        address: another path of the same place, to be used in its stead.

    Raises:
        ListenError: somebody listens on it, it is something else than a socket, or too long for one.
        OSError: it cannot be looked at.
    """
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise ListenError(f"{path} is longer than the {_PATH_BYTES} bytes a socket's path may have; {_ANOTHER}")
    address = address or path
    try:
        # Asked first: connecting to any other kind of file is refused just as by a socket without a listener.
        if not stat.S_ISSOCK(os.lstat(address).st_mode):
            raise ListenError(f"{path} exists and is no socket; remove it, or {_ANOTHER}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
            return
        except TimeoutError:
            who = "a process that does not answer"  # so many wait for it that no more may
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise ListenError(f"{path} is another kind of socket; remove it, or {_ANOTHER}") from error
            raise
        else:
            pid, _, _ = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            who = f"process {pid}"
    raise ListenError(f"{who} listens on {path} already; end it, or {_ANOTHER}")


def passed() -> Listener | None:
    """The listening socket that systemd passed to this process, or that :func:`pass_on` did; None if there is none.

    The variables that tell of it are taken out of the environment.

    Raises:
        ListenError: several were passed, or something that is no listening unix socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise ListenError(f"{count} sockets were passed; the unit needs exactly one ListenStream=")
    try:
        listening = socket.socket(fileno=_FIRST_PASSED)
        fitting = listening.family == socket.AF_UNIX and listening.type == socket.SOCK_STREAM
        fitting = fitting and bool(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise ListenError(f"descriptor {_FIRST_PASSED} is not a socket: {error.strerror}; see LISTEN_FDS") from None
    if not fitting:
        listening.detach()
        raise ListenError("the passed socket is of another kind; the unit needs ListenStream=/a/path, Accept=no")
    listening.set_inheritable(False)
    listening.setblocking(True)
    return Listener(str(listening.getsockname()), listening)


def pass_on(listener: Listener) -> None:
    """Let the program that this process executes next find ``listener`` with :func:`passed`."""
    os.dup2(listener.socket.fileno(), _FIRST_PASSED, inheritable=True)
    os.set_inheritable(_FIRST_PASSED, True)  # dup2(2) of a descriptor to itself leaves it as it is
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}


def _open_directory(directory: str, private: bool) -> int:
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if private else 0))
    except OSError as error:
        raise ListenError(
            f"the socket's directory {directory} cannot be used: {error.strerror}; create it, or {_ANOTHER}"
        ) from None
    info = os.fstat(fd)
    if private and (info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        os.close(fd)
        raise ListenError(
            f"the socket's directory {directory} belongs to, or can be written by, others (user {info.st_uid}, mode "
            f"{stat.S_IMODE(info.st_mode):o}); use one of your own with mode 755 or 700"
        )
    return fd


def file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode number of what has the name ``path``; None if nothing has."""
    with suppress(OSError):
        info = os.lstat(path)
        return info.st_dev, info.st_ino
    return None
