"""Who a container's process is: ``USER[:GROUP]`` looked up in the container's own passwd and group files.

The rules are those of the OCI image configuration's ``User`` and of Docker's ``--user``: names come from the
container's files, numbers need not be in them, and only a user without an explicit group gets supplementary groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import RunError

_MAX_ID = 2**31 - 1
_LIMIT_BYTES = 16 << 20  # no true passwd file is larger, and a hostile one does not fill our memory


@dataclass(frozen=True, slots=True)
class User:
    """Ids for a process.

    Attributes:
        groups: all that it is in, ``gid`` among them: files may be closed to a group, and leaving one is no way around
            that (CVE-2022-36109).
        home: for ``HOME``; ``/`` when the container does not say.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = (0,)
    home: str = "/"


def resolve_user(rootfs: RootFs, text: str) -> User:
    """The ids that ``text`` stands for in this container.

    Args:
        rootfs: the container's files.
        text: ``USER``, ``USER:GROUP`` or empty for root; each is a name or a number.

    Raises:
        RunError: a name that the container does not have, or a number that is none.
    """
    user_text, _, group_text = text.partition(":")
    user_text = user_text or "0"
    entry = _find_user(rootfs, user_text)
    if entry is not None:
        name, uid, gid, home = entry
    else:
        name, uid, gid, home = "", _number(user_text, "user", "/etc/passwd"), 0, "/"
    if group_text:
        gid = _find_group(rootfs, group_text)
        return User(uid, gid, (gid,), home)
    more = [number for _, number, members in _groups(rootfs) if name and name in members]
    return User(uid, gid, tuple(dict.fromkeys([gid, *more])), home)


def _find_user(rootfs: RootFs, text: str) -> tuple[str, int, int, str] | None:
    """(name, uid, gid, home); a name goes before an equal number."""
    by_number = None
    for fields in _lines(rootfs, "/etc/passwd", 6):
        if not (fields[2].isdecimal() and fields[3].isdecimal()):
            continue
        entry = fields[0], int(fields[2]), int(fields[3]), fields[5] or "/"
        if fields[0] == text:
            return entry
        if by_number is None and text.isdecimal() and entry[1] == int(text):
            by_number = entry
    return by_number


def _find_group(rootfs: RootFs, text: str) -> int:
    for name, number, _ in _groups(rootfs):
        if name == text:
            return number
    return _number(text, "group", "/etc/group")


def _groups(rootfs: RootFs) -> Iterator[tuple[str, int, list[str]]]:
    for fields in _lines(rootfs, "/etc/group", 3):
        if fields[2].isdecimal():
            yield fields[0], int(fields[2]), fields[3].split(",") if len(fields) > 3 else []


def _lines(rootfs: RootFs, path: str, least: int) -> Iterator[list[str]]:
    """The fields of each line that has enough of them; none if the file cannot be read."""
    try:
        text = rootfs.read(path, _LIMIT_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return
    for line in text.split("\n"):
        fields = line.strip().split(":")
        if len(fields) >= least:
            yield fields


def _number(text: str, what: str, path: str) -> int:
    if text.isdecimal() and text.isascii() and int(text) <= _MAX_ID:
        return int(text)
    raise RunError(f"{what} {text[:100]}: the container's {path} does not have it; give a number (--user)")
