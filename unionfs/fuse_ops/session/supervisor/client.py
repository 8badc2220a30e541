"""What the supervisor is asked, and asking it for a mount.

The client sends one request, with its descriptors 0, 1 and 2 beside it (SCM_RIGHTS). Then both say single bytes:

========== ================== =======================================================================================
worker     ``TAKEN``          it has become like the caller, and waits
client     ``GO``             it still waits for this mount; without it the worker does nothing
worker     ``READY``          the mount can be used
worker     ``FAILED``         it cannot be mounted, and the caller's stderr says why
worker     ``DECLINED``       nothing has been done: start a server yourself. Also the meaning of an end before ``GO``
========== ================== =======================================================================================

The mount program does this first of all, so only what Python has loaded anyhow is imported: ``posix`` is what the
module os is made of, without the millisecond that the rest of it takes, and ``_socket`` what the module socket is made
of, without the 8 ms that its enumerations take. Annotations are quoted since even ``__future__`` is a module.
"""

import _socket
import posix
import sys

from unionfs import __version__

TYPE_CHECKING = False  # the module typing takes 3 ms
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

SWITCH: "Final" = "UNIONFS_SUPERVISOR"
"""The environment variable: ``0`` for no supervisor, or the path of another socket."""

TAKEN: "Final" = b"t"
GO: "Final" = b"g"
READY: "Final" = b"r"
FAILED: "Final" = b"f"
DECLINED: "Final" = b"d"

MAX_REQUEST_BYTES: "Final" = 16 << 20  # more than execve(2) takes: a quarter of the stack limit, 6 MiB at most
LENGTH_BYTES: "Final" = 4

_MAGIC: "Final" = "unionfs supervisor 1"
_PACKAGE: "Final" = __file__.rsplit("/", 3)[0]
_ENCODING: "Final" = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
_INITIAL_USER_NAMESPACE: "Final" = 0xEFFFFFFD  # linux/nsfs.h: USER_NS_INIT_INO

# A supervisor that does not answer is stopped or stuck; starting a server takes a fraction of this.
_TAKEN_WITHIN_S: "Final" = 5.0

# What makes the program stay in the foreground, or do something else than mount.
_OWN_FLAGS: "Final" = frozenset(["-f", "-d", "--debug", "-h", "--help", "-V", "--version"])
# Names that mean something else to another process.
_OWN_PATHS: "Final" = ("/fd/", "/proc/self", "/proc/thread-self")


class DeclinedError(Exception):
    """The supervisor must not, or cannot, do this; the caller is to do it himself."""


class Request:
    """One request for a mount.

    Args:
        argv: the command line as ``ps`` is to show it; it ends with the arguments of unionfs-mount.
        argument_count: how many they are.
        environment: the caller's environment variables (``os.environb``).
        namespaces: the inode numbers of the caller's mount and user namespace, as it sees them.
    """

    __slots__ = ("argument_count", "argv", "environment", "namespaces")

    def __init__(
        self,
        argv: "Sequence[str]",
        argument_count: int,
        environment: "Mapping[bytes, bytes]",
        namespaces: tuple[int, int],
    ) -> None:
        self.argv = list(argv)
        self.argument_count = argument_count
        self.environment = dict(environment)
        self.namespaces = namespaces

    @property
    def arguments(self) -> list[str]:
        """Those of unionfs-mount."""
        return self.argv[len(self.argv) - self.argument_count :]

    def pack(self) -> bytes:
        """The request as it is sent, its length first. No field can contain the zero byte that ends it."""
        numbers = (*self.namespaces, self.argument_count, len(self.argv))
        fields = [encode(text) for text in (*_greeting(), *map(str, numbers), *self.argv)]
        fields += [b"%s=%s" % variable for variable in self.environment.items()]
        body = b"\0".join(fields)
        return len(body).to_bytes(LENGTH_BYTES, sys.byteorder) + body

    @classmethod
    def unpack(cls, body: bytes) -> "Request":
        """The request that was sent, without its length; ValueError for that of another version or installation."""
        greeting, fields = [encode(text) for text in _greeting()], body.split(b"\0")
        if fields[: len(greeting)] != greeting:
            raise ValueError("the caller has another version")
        mount_ns, user_ns, argument_count, argc = map(int, fields[len(greeting) : len(greeting) + 4])
        rest = fields[len(greeting) + 4 :]
        if not 0 <= argument_count <= argc <= len(rest):
            raise ValueError("the numbers of arguments are wrong")
        argv = [argument.decode(*_ENCODING) for argument in rest[:argc]]
        environment = {}
        for field in rest[argc:]:
            name, separator, value = field.partition(b"=")
            if name and separator:
                environment[name] = value
        return cls(argv, argument_count, environment, (mount_ns, user_ns))


def encode(text: str) -> bytes:
    """``os.fsencode``."""
    return text.encode(*_ENCODING)


def _greeting() -> list[str]:
    # Two installations may be of the same version, and their Pythons may differ.
    return [_MAGIC, __version__, _PACKAGE, sys.version]


def own_namespaces() -> tuple[int, int]:
    """The mount and user namespace of this thread. The supervisor cannot see those: it looks at the process."""
    return posix.stat("/proc/thread-self/ns/mnt").st_ino, posix.stat("/proc/thread-self/ns/user").st_ino


def socket_paths(environment: "Mapping[bytes, bytes]") -> list[bytes]:
    """Where a supervisor for this process may listen, the preferred place first; empty when it is switched off."""
    chosen = environment.get(encode(SWITCH))
    if chosen:
        return [chosen] if chosen.startswith(b"/") else []
    name = b"supervisor.sock"
    try:
        namespace = posix.stat("/proc/self/ns/user").st_ino
    except OSError:
        return []  # without /proc nobody can tell who the caller is
    if namespace != _INITIAL_USER_NAMESPACE:
        name = b"supervisor-%d.sock" % namespace  # the directory is shared with the namespace around
    directories = [b"/run/unionfs"] if posix.geteuid() == 0 else []
    runtime = environment.get(b"XDG_RUNTIME_DIR", b"")
    if runtime.startswith(b"/"):
        directories.append(runtime.rstrip(b"/") + b"/unionfs")
    return [directory + b"/" + name for directory in directories]


def mount(
    arguments: "Sequence[str]",
    argv: "Sequence[str]",
    environment: "Mapping[bytes, bytes]",
    stdio: tuple[int, int, int] = (0, 1, 2),
) -> int | None:
    """Have the supervisor start the server for ``unionfs-mount ARGUMENTS``.

    Args:
        arguments: those of unionfs-mount.
        argv: what ``ps`` is to show for the server; it ends with ``arguments``.
        environment: the server's environment variables, as a rule ``os.environb``.
        stdio: the server's standard descriptors until the mount can be used; it says what is wrong on the third.

    Returns:
        0 when the mount can be used, 1 when it failed and that was said, None when the caller has to start the server
        by itself: there is no supervisor, it does not answer, it must not do this for us, or they need a process
        of the caller's own.
    """
    if not _can_be_delegated(arguments, environment):
        return None
    connection = _connect(environment)
    if connection is None:
        return None
    try:
        try:
            _ask(connection, Request(argv, len(arguments), environment, own_namespaces()), stdio)
        except OSError:
            return None  # nothing has been done: it waits for our GO
        connection.settimeout(None)
        try:
            answer = connection.recv(1)
        except OSError:
            answer = b""
    finally:
        connection.close()
    if answer == READY:
        return 0
    if answer == DECLINED:
        return None
    if answer != FAILED:
        posix.write(stdio[2], b"unionfs-mount: the server was ended before the mount was usable; mount again\n")
    return 1


def _can_be_delegated(arguments: "Sequence[str]", environment: "Mapping[bytes, bytes]") -> bool:
    if b"UNIONFS_DEBUG" in environment or environment.get(encode(SWITCH)) == b"0":
        return False
    if any(name.startswith(b"LD_") for name in environment):
        return False  # these change how a program is loaded, and ours is loaded already
    for argument in arguments:
        if argument in _OWN_FLAGS or any(path in argument for path in _OWN_PATHS):
            return False
        if "debug" in argument and any(option.startswith(("debug", "-odebug")) for option in argument.split(",")):
            return False
    return True


def _connect(environment: "Mapping[bytes, bytes]") -> _socket.socket | None:
    for path in socket_paths(environment):
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


def _ask(connection: _socket.socket, request: Request, stdio: "Sequence[int]") -> None:
    """Send the request and say GO once it is taken; OSError when it is not."""
    message = request.pack()
    fds = b"".join(fd.to_bytes(4, sys.byteorder) for fd in stdio)
    sent = connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    connection.sendall(message[sent:])
    if connection.recv(1) != TAKEN:
        raise OSError("the supervisor declines")
    connection.sendall(GO)
