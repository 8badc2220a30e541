"""Who keeps a mount busy, found in /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from unionfs.host.mountinfo import read_mounts


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
