"""What a client and the supervisor say to each other, and where they meet.

The client sends one request, with its descriptors 0, 1 and 2 beside it (SCM_RIGHTS). Then both say single bytes:

========== ================== =======================================================================================
worker     ``TAKEN``          it has become like the caller, and waits
client     ``GO``             it still waits for this mount; without it the worker does nothing
worker     ``READY``          the mount can be used
worker     ``FAILED``         it cannot be mounted, and the caller's stderr says why
worker     ``DECLINED``       nothing has been done: start a server yourself. Also the meaning of an end before ``GO``
========== ================== =======================================================================================

The mount program reads this module before it does anything else, so only what Python has loaded anyhow is imported:
``posix`` is what the module os is made of, without the millisecond that the rest of it takes. Annotations are quoted
since even ``__future__`` is a module.
"""

from __future__ import annotations

import os
import posix
import sys

from unionfs import __version__


class LoadedCode:
    """The files of our package, and of trio's first module, as they were when this was made.

    A server must never be a mixture: it imports some modules only when they are needed.
    """

    def __init__(self) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] == "unionfs"]
        files = {sys.modules[name].__file__ for name in [*names, "trio"] if name in sys.modules}
        self._states = {path: _state(path) for path in sorted(path for path in files if path)}

    def is_current(self) -> bool:
        """Whether each of them is still the same file, as seen from this process' root."""
        return all(_state(path) == state for path, state in self._states.items())


def _state(path: str) -> tuple[int, int, int] | None:
    # Not the device: a mount that shows the same files may cover the installation.
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


TYPE_CHECKING = False  # the module typing takes 3 ms
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Final

SWITCH: Final = "UNIONFS_SUPERVISOR"
"""The environment variable: ``0`` for no supervisor, or the path of another socket."""

TAKEN: Final = b"t"
GO: Final = b"g"
READY: Final = b"r"
FAILED: Final = b"f"
DECLINED: Final = b"d"

MAX_REQUEST_BYTES: Final = 16 << 20  # more than execve(2) takes: a quarter of the stack limit, 6 MiB at most
LENGTH_BYTES: Final = 4

_MAGIC: Final = "unionfs supervisor 1"
_PACKAGE: Final = __file__.rsplit("/", 3)[0]
_ENCODING: Final = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
_INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # linux/nsfs.h: USER_NS_INIT_INO


class DeclinedError(Exception):
    """The supervisor must not, or cannot, do this; the caller is to do it himself."""


class Request:
    """One wish for a mount.

    Args:
        argv: the command line as ``ps`` is to show it; its last words are those of unionfs-mount.
        word_count: how many they are.
        environment: the caller's environment variables (``os.environb``).
        namespaces: the inode numbers of the caller's mount and user namespace, as it sees them.
    """

    __slots__ = ("argv", "environment", "namespaces", "word_count")

    def __init__(
        self, argv: Sequence[str], word_count: int, environment: Mapping[bytes, bytes], namespaces: tuple[int, int]
    ) -> None:
        self.argv = list(argv)
        self.word_count = word_count
        self.environment = dict(environment)
        self.namespaces = namespaces

    @property
    def words(self) -> list[str]:
        """The words of unionfs-mount."""
        return self.argv[len(self.argv) - self.word_count :]

    def pack(self) -> bytes:
        """The request as it is sent, its length first. No field can contain the zero byte that ends it."""
        numbers = (*self.namespaces, self.word_count, len(self.argv))
        fields = [encode(text) for text in (*_greeting(), *map(str, numbers), *self.argv)]
        fields += [b"%s=%s" % variable for variable in self.environment.items()]
        body = b"\0".join(fields)
        return len(body).to_bytes(LENGTH_BYTES, sys.byteorder) + body

    @classmethod
    def unpack(cls, body: bytes) -> Request:
        """The request that was sent, without its length; ValueError for that of another version or installation."""
        greeting, fields = [encode(text) for text in _greeting()], body.split(b"\0")
        if fields[: len(greeting)] != greeting:
            raise ValueError("the caller has another version")
        mount_ns, user_ns, word_count, argc = map(int, fields[len(greeting) : len(greeting) + 4])
        rest = fields[len(greeting) + 4 :]
        if not 0 <= word_count <= argc <= len(rest):
            raise ValueError("the numbers of words are wrong")
        argv = [word.decode(*_ENCODING) for word in rest[:argc]]
        environment = {}
        for field in rest[argc:]:
            name, separator, value = field.partition(b"=")
            if name and separator:
                environment[name] = value
        return cls(argv, word_count, environment, (mount_ns, user_ns))


def encode(text: str) -> bytes:
    """``os.fsencode``."""
    return text.encode(*_ENCODING)


def _greeting() -> list[str]:
    # Two installations may be of the same version, and their Pythons may differ.
    return [_MAGIC, __version__, _PACKAGE, sys.version]


def own_namespaces() -> tuple[int, int]:
    """The mount and user namespace of this thread. The supervisor cannot see those: it looks at the process."""
    return posix.stat("/proc/thread-self/ns/mnt").st_ino, posix.stat("/proc/thread-self/ns/user").st_ino


def socket_paths(environment: Mapping[bytes, bytes]) -> list[bytes]:
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
