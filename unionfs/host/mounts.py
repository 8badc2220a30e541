"""The mounts of this mount namespace, as /proc/self/mountinfo tells them; whether one answers; who keeps one busy.

Whether the server of a mount is alive is asked without waiting for one that hangs. The kernel tells of each FUSE file
system, by its device minor, in its control file system as long as it is mounted anywhere
(Documentation/filesystems/fuse.rst, "Control filesystem").
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final, NamedTuple

from unionfs.host import syscalls

SUBTYPE: Final = "unionfs-mount"
"""What mount(8) calls to remount, so it is the name of our program. Another package has one called ``unionfs``."""
OUR_TYPE: Final = f"fuse.{SUBTYPE}"

_OCTAL = re.compile(r"\\([0-7]{3})")
_SPECIAL = re.compile(r"[\s\\#]")  # what the kernel writes as octal numbers, or may some day

_CONTROL = "/sys/fs/fuse/connections"

# Enough for a server on a machine that swaps; one that takes longer is told from one that is gone all the same.
_LIMIT_S = 5.0
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Mount(NamedTuple):
    """One line of mountinfo."""

    mount_id: int
    """Stays the same when the mount is moved."""
    minor: int
    """Device minor: FUSE mounts have no real device, so the minor alone names the mounted file system."""
    major: int
    root: str
    mount_point: str
    fs_type: str
    source: str
    id_mapped: bool = False
    """Whether the kernel shows other owners through it than those on disk (mount_setattr(2), MOUNT_ATTR_IDMAP)."""

    options: tuple[str, ...] = ()
    """Of the mount, then of its file system."""

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of the mounted file system, one for all of its mounts."""
        return self.major, self.minor

    @property
    def is_union(self) -> bool:
        """Whether it is one of ours."""
        return self.fs_type == OUR_TYPE


def read_mounts() -> list[Mount]:
    """All mounts, in the order they are stacked; empty where /proc is missing."""
    return [_parse(line) for line in _lines()]


def _lines() -> list[str]:
    try:
        # Only a line feed ends a line: a path may contain the other characters that Python takes for one.
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            return list(lines)
    except FileNotFoundError:
        return []


def top_mount(mount_point: str) -> Mount | None:
    """The mount that a lookup of ``mount_point``, an absolute path without links, ends on."""
    # Hosts have hundreds of mounts, and each start of a server looks for one. What is written otherwise, with a space
    # in it, say, is parsed to be compared.
    plain = None if _SPECIAL.search(mount_point) else f" {mount_point} "
    found = None
    for line in _lines():
        if plain is None or plain in line:
            mount = _parse(line)
            if mount.mount_point == mount_point:
                found = mount
    return found


def is_mounted_here(minor: int) -> bool:
    """Whether the FUSE file system of this device minor is mounted somewhere in this mount namespace."""
    return any(mount.minor == minor and mount.major == 0 for mount in read_mounts())


def canonical(target: str) -> str:
    """``target`` as mountinfo writes it, without asking the file system that is mounted there.

    A dead server answers every question about its root with an error, and a busy one may take its time.
    """
    parent, name = os.path.split(os.path.join(os.getcwd(), target).rstrip("/"))
    if name in ("", ".", "..") or _is_link(target):
        return os.path.realpath(target)
    return os.path.join(os.path.realpath(parent), name)


def _is_link(path: str) -> bool:
    """As os.path.islink, but without a request for attributes."""
    try:
        os.readlink(path)
    except OSError:
        return False
    return True


def _parse(line: str) -> Mount:
    # The number of optional fields before the dash varies.
    fields, _, tail = line.rstrip("\n").partition(" - ")
    mount_id, _parent, device, root, mount_point, options, *_rest = fields.split(" ")
    fs_type, source, super_options, *_ = [*tail.split(" "), ""]
    major, minor = device.split(":")
    return Mount(
        mount_id=int(mount_id),
        minor=int(minor),
        major=int(major),
        root=_unescape(root),
        mount_point=_unescape(mount_point),
        fs_type=fs_type,
        source=_unescape(source),
        id_mapped="idmapped" in options.split(","),
        options=(*options.split(","), *super_options.split(",")),
    )


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), field)


class Answer(Enum):
    """What a mount says when it is asked."""

    ALIVE = auto()
    DEAD = auto()
    """Errors only: the server of this FUSE mount is gone."""
    SILENT = auto()
    """Nothing in time: its server hangs, or is very slow."""


class _Question:
    """One question on its way, in a thread of its own: no signal ends the wait for a FUSE server but SIGKILL."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._answer = Answer.SILENT
        self._thread = threading.Thread(target=self._ask, name="statfs", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            os.statvfs(self._path)  # the one question that the kernel never answers from memory
        except OSError as error:
            self._answer = Answer.DEAD if error.errno in _GONE else Answer.ALIVE
        else:
            self._answer = Answer.ALIVE
        with _lock:
            if _asked.get(self._path) is self:
                del _asked[self._path]

    def wait(self, limit_s: float) -> Answer:
        self._thread.join(limit_s)
        return self._answer


_lock = threading.Lock()
_asked: dict[str, _Question] = {}  # a server that hangs is asked once, and not again by everybody who comes


def probe(path: str, limit_s: float | None = None) -> Answer:
    """Ask the file system at ``path`` for a sign of life.

    Args:
        path: an absolute path.
        limit_s: how long to wait for it; None for five seconds.
    """
    with _lock:
        question = _asked.get(path)
        if question is None:
            question = _asked[path] = _Question(path)
    return question.wait(_LIMIT_S if limit_s is None else limit_s)


def is_dead(path: str) -> bool:
    """Whether the server of the FUSE mount at ``path`` is gone. One that does not answer in time is not."""
    return probe(path) is Answer.DEAD


def is_mounted_anywhere(minor: int) -> bool | None:
    """Whether the FUSE file system of this device minor is mounted in any mount namespace, or used unseen.

    None where nobody can tell: the control file system is not mounted, and we may not do that.
    """
    with _control() as fd:
        if fd is None:
            return None
        try:
            os.stat(str(minor), dir_fd=fd)
        except FileNotFoundError:
            return False
        return True


def waiting_requests(minor: int) -> int | None:
    """How many requests the server of a FUSE file system has not answered; None where nobody can tell."""
    with _control() as fd:
        if fd is None:
            return None
        try:
            with open(os.open(f"{minor}/waiting", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            return None


@contextmanager
def _control() -> Iterator[int | None]:
    """The control file system's root: where it is mounted, as systemd does it, or else mounted for us alone."""
    fd = None
    try:
        if os.path.ismount(_CONTROL):
            fd = os.open(_CONTROL, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = syscalls.mount_detached(b"fusectl")
    except OSError:
        pass
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


class Holder(NamedTuple):
    """A process and the first thing found that it uses below the mount."""

    pid: int
    name: str
    what: str


def mounts_inside(mount_point: str) -> list[str]:
    """Mount points below ``mount_point``, the deepest first."""
    inside = [mount.mount_point for mount in read_mounts() if mount.mount_point.startswith(mount_point + "/")]
    return sorted(inside, key=lambda point: point.count("/"), reverse=True)


def holders(mount_point: str) -> list[Holder]:
    """The other processes that use something below ``mount_point``, as far as we may see.

    Only the names that /proc gives are compared: asking about a file would be a request to its server, which may
    be the one that does not answer.
    """
    found = []
    for name in os.listdir("/proc"):
        # Ourselves we know: at most we inherited a descriptor of the shell that started us.
        if name.isdigit() and int(name) != os.getpid():
            what = next((what for what, path in _used(name) if _is_below(path, mount_point)), None)
            if what is not None:
                found.append(Holder(int(name), _command(name), what))
    return sorted(found)


def _used(pid: str) -> Iterator[tuple[str, str]]:
    """What process ``pid`` uses, as a word for people and a path."""
    for link, what in (("cwd", "works in {}"), ("root", "has its root in {}"), ("exe", "runs {}")):
        path = _read_link(f"/proc/{pid}/{link}")
        yield what.format(path), path
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        fds = []
    for fd in fds:
        path = _read_link(f"/proc/{pid}/fd/{fd}")
        yield f"has {path} open", path
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6:
                    yield f"has {fields[5]} mapped", fields[5]
    except OSError:
        pass


def _is_below(path: str, mount_point: str) -> bool:
    return path == mount_point or path.startswith(mount_point.rstrip("/") + "/")


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
