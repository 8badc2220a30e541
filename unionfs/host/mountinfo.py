"""The mounts of this mount namespace, as /proc/self/mountinfo tells them."""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

SUBTYPE: Final = "unionfs-mount"
"""What mount(8) calls to remount, so it is the name of our program. Another package has one called ``unionfs``."""
OUR_TYPE: Final = f"fuse.{SUBTYPE}"

_OCTAL = re.compile(r"\\([0-7]{3})")
_SPECIAL = re.compile(r"[\s\\#]")  # what the kernel writes as octal numbers, or may some day


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
