"""The supervisor's socket: from systemd, or made at its path."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from typing import Final

from unionfs.errors import SupervisorError

_FIRST_PASSED: Final = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START
_BACKLOG: Final = 128


def passed_socket() -> socket.socket | None:
    """The listening socket that systemd, or our own predecessor, passed to this process (sd_listen_fds(3)).

    Raises SupervisorError when what was passed is something else.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != "1":
        raise SupervisorError(f"{count or 'no'} sockets were passed; the unit needs exactly one ListenStream=")
    try:
        passed = socket.socket(fileno=_FIRST_PASSED)
        fitting = passed.family == socket.AF_UNIX and passed.type == socket.SOCK_STREAM
        fitting = fitting and bool(passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise SupervisorError(f"descriptor {_FIRST_PASSED} is not a socket: {error.strerror}; see LISTEN_FDS") from None
    if not fitting:
        passed.detach()
        raise SupervisorError("the passed socket is of another kind; the unit needs ListenStream=/a/path, Accept=no")
    passed.set_inheritable(False)
    passed.setblocking(True)
    return passed


def pass_on(listener: socket.socket) -> None:
    """Let the program that this process executes next find ``listener`` with :func:`passed_socket`."""
    os.dup2(listener.fileno(), _FIRST_PASSED, inheritable=True)
    os.set_inheritable(_FIRST_PASSED, True)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}


@contextlib.contextmanager
def made_socket(path: str) -> Iterator[socket.socket]:
    """A socket at ``path`` that only this user can connect to, removed afterwards.

    One that nobody listens on any more is replaced. Raises SupervisorError when somebody does, or when the
    directory belongs to others, who could replace the socket.
    """
    directory_fd = _open_directory(os.path.dirname(path))
    try:
        name = os.path.basename(path)
        fcntl.flock(directory_fd, fcntl.LOCK_EX)  # of two that start at once, the second finds the first listening
        listener = _bind(path, directory_fd, name)
        made = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        fcntl.flock(directory_fd, fcntl.LOCK_UN)
        try:
            yield listener
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_ino == made.st_ino:
                    os.unlink(name, dir_fd=directory_fd)
    finally:
        os.close(directory_fd)


def _open_directory(directory: str) -> int:
    """``directory``, made when it is missing, and known to be nobody else's."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o755)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SupervisorError(
            f"the socket's directory {directory} cannot be used: {error.strerror}; create it, or name another socket"
        ) from None
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise SupervisorError(
            f"the socket's directory {directory} belongs to, or can be written by, others (user {info.st_uid}, mode "
            f"{stat.S_IMODE(info.st_mode):o}); use one of your own with mode 755 or 700"
        )
    return fd


def _bind(path: str, directory_fd: int, name: str) -> socket.socket:
    # Through the descriptor that was checked, whatever the path leads to by now; and sun_path is only 108 bytes.
    address = f"/proc/self/fd/{directory_fd}/{name}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path, address)
            listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SupervisorError(f"cannot listen on {path}: {error.strerror or error}; name another socket") from None
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: str, address: str) -> None:
    if not stat.S_ISSOCK(os.lstat(address).st_mode):
        raise SupervisorError(f"{path} exists and is not a socket; remove it, or name another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
            return
        except OSError:
            pass
    raise SupervisorError(f"a supervisor listens on {path} already; end it first, or name another socket")
