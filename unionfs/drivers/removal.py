"""Deleting a layer's directory: out of the way first, then for good, with a second chance at every step.

A directory is renamed to ``NAME-removing`` before anything in it is touched, so that no half-deleted layer is ever
taken for a whole one. What a crash leaves is found by that name and deleted at the next start or the next try.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator

from unionfs.drivers.ids import CREATING, REMOVING
from unionfs.errors import DriverError, LayerBusyError
from unionfs.host import mountinfo, unmount
from unionfs.host.files import remove_tree
from unionfs.host.mount_holders import Holder, holders, mounts_inside

_log = logging.getLogger(__name__)

# moby's bound: 50 times 100 ms.
_TRIES = 50
_PAUSE_S = 0.1


def set_aside(directory: str, name: str) -> str:
    """Rename ``directory/name`` out of the way and return its new path, for :func:`delete`. Absent is fine.

    What an earlier try left under the new name is deleted first.

    Raises:
        LayerBusyError: see :func:`delete`.
        DriverError: the file system refuses.
    """
    path = os.path.join(directory, name)
    trash = path + REMOVING
    if os.path.lexists(trash):
        delete(trash)
    try:
        os.rename(path, trash)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DriverError(
            f"cannot remove layer {name}: {path}: {error.strerror}{_mounted_at(path)}; "
            "unmount what is mounted there and try again"
        ) from error
    return trash


def sweep(directory: str) -> list[str]:
    """Delete what unfinished removals and creations left in ``directory``; the names that could not be."""
    left = []
    for name in sorted(os.listdir(directory)):
        if name.endswith((REMOVING, CREATING)):
            try:
                delete(os.path.join(directory, name))
            except DriverError as error:
                _log.warning("%s", error)
                left.append(name)
    return left


def delete(path: str) -> None:
    """Delete the directory ``path`` with everything in it, and detach whatever is mounted there. Absent is fine.

    Raises:
        LayerBusyError: it did not get empty in five seconds.
        DriverError: the file system refuses.
    """
    # Without links, as the mount table shows it; the directory itself is never a link.
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for tries_left in attempts():
        _detach_below(path)
        try:
            _remove(path)
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                advice = "; chattr -i what is immutable in it" if error.errno == errno.EPERM else ""
                raise DriverError(f"cannot delete {path}: {error.strerror}{advice}; then try again") from error
            if not tries_left:
                raise LayerBusyError(
                    f"cannot delete {path}: {error.strerror}{used_by(path)}; end what uses it and try again"
                ) from error


def attempts() -> Iterator[int]:
    """The tries for something that may be busy, as how many are left; it pauses between them, five seconds in all."""
    for left in reversed(range(_TRIES)):
        yield left
        if left:
            time.sleep(_PAUSE_S)


def used_by(path: str) -> str:
    """Who uses something below ``path``, for the middle of a message; empty when nobody is found."""
    found = holders(path)
    own = _own_file_below(path)
    if own is not None:
        found = [Holder(os.getpid(), "this process", f"has {own} open"), *found]
    if not found:
        return ""
    shown = "; ".join(f"process {who.pid} ({who.name}) {who.what}" for who in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f", because {shown}{more}"


def _own_file_below(path: str) -> str | None:
    """A file below ``path`` that this process has open itself, which ``holders`` does not look for."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if name == path or name.startswith(path + "/"):
            return name
    return None


def _remove(path: str) -> None:
    parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, os.fsencode(os.path.basename(path)))
    finally:
        os.close(parent)


def _detach_below(path: str) -> None:
    """Take every mount at or below ``path`` out of sight, the deepest first."""
    points = [*mounts_inside(path), *([path] if mountinfo.top_mount(path) is not None else [])]
    for point in points:
        try:
            unmount.unmount(point, lazy=True)
        except OSError as error:
            _log.warning("cannot unmount %s: %s", point, error.strerror)


def _mounted_at(path: str) -> str:
    points = mounts_inside(os.path.realpath(path))
    return f" ({points[0]} is mounted)" if points else ""
