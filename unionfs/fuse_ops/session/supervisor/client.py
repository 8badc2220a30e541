"""Asking the supervisor for a mount.

The mount program does this first of all, so only what Python has loaded anyhow is imported. ``_socket`` is what the
module socket is made of, without the 8 ms that its enumerations take; ``posix`` see wire.
"""

import _socket
import posix
import sys

from unionfs.fuse_ops.session.supervisor import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

# A supervisor that does not answer is stopped or stuck; starting a server takes a fraction of this.
_TAKEN_WITHIN_S: "Final" = 5.0

# What makes the program stay in the foreground, or do something else than mount.
_OWN_FLAGS: "Final" = frozenset(["-f", "-d", "--debug", "-h", "--help", "-V", "--version"])
# Names that mean something else to another process.
_OWN_PATHS: "Final" = ("/fd/", "/proc/self", "/proc/thread-self")


def mount(
    words: "Sequence[str]",
    argv: "Sequence[str]",
    environment: "Mapping[bytes, bytes]",
    stdio: tuple[int, int, int] = (0, 1, 2),
) -> int | None:
    """Have the supervisor start the server for ``unionfs-mount WORDS``.

    Args:
        words: the arguments of unionfs-mount.
        argv: what ``ps`` is to show for the server; it ends with ``words``.
        environment: the server's environment variables, as a rule ``os.environb``.
        stdio: the server's standard descriptors until the mount can be used; it says what is wrong on the third.

    Returns:
        0 when the mount can be used, 1 when it failed and that was said, None when the caller has to start the server
        by itself: there is no supervisor, it does not answer, it must not do this for us, or the words need a process
        of the caller's own.
    """
    if not _can_be_delegated(words, environment):
        return None
    connection = _connect(environment)
    if connection is None:
        return None
    try:
        try:
            _ask(connection, wire.Request(argv, len(words), environment, wire.own_namespaces()), stdio)
        except OSError:
            return None  # nothing has been done: it waits for our GO
        connection.settimeout(None)
        try:
            answer = connection.recv(1)
        except OSError:
            answer = b""
    finally:
        connection.close()
    if answer == wire.READY:
        return 0
    if answer == wire.DECLINED:
        return None
    if answer != wire.FAILED:
        posix.write(stdio[2], b"unionfs-mount: the server was ended before the mount was usable; mount again\n")
    return 1


def _can_be_delegated(words: "Sequence[str]", environment: "Mapping[bytes, bytes]") -> bool:
    if b"UNIONFS_DEBUG" in environment or environment.get(wire.encode(wire.SWITCH)) == b"0":
        return False
    if any(name.startswith(b"LD_") for name in environment):
        return False  # these change how a program is loaded, and ours is loaded already
    for word in words:
        if word in _OWN_FLAGS or any(path in word for path in _OWN_PATHS):
            return False
        if "debug" in word and any(option.startswith(("debug", "-odebug")) for option in word.split(",")):
            return False
    return True


def _connect(environment: "Mapping[bytes, bytes]") -> _socket.socket | None:
    for path in wire.socket_paths(environment):
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(_TAKEN_WITHIN_S)
            connection.connect(path)
            # struct ucred: process, user, group. What is not ours, or root's, must not get our descriptors.
            credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
            if int.from_bytes(credentials[4:8], sys.byteorder) == posix.geteuid():
                return connection
        except OSError:
            pass
        connection.close()
    return None


def _ask(connection: _socket.socket, request: wire.Request, stdio: "Sequence[int]") -> None:
    """Send the request and say GO once it is taken; OSError when it is not."""
    message = request.pack()
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in stdio)
    sent = connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    connection.sendall(message[sent:])
    if connection.recv(1) != wire.TAKEN:
        raise OSError("the supervisor declines")
    connection.sendall(wire.GO)
