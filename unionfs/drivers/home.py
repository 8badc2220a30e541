"""The directory that a driver keeps everything in: how directories appear in it, and how they go.

One that is made has another name, ``NAME-RANDOM-creating``, until it is complete. One that is deleted is renamed to
``NAME-removing`` before anything in it is touched, so that no half of a layer is ever taken for a whole one. What a
crash leaves is found by these names and deleted at the next start or the next try.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CREATING, REMOVING
from unionfs.errors import DriverError, LayerBusyError, LayerExistsError
from unionfs.host import disk, mounts, unmount
from unionfs.host.mounts import Holder, holders, mounts_inside

_log = logging.getLogger(__name__)

# Deleting: moby's bound, 50 times 100 ms.
_TRIES = 50
_PAUSE_S = 0.1


def root_owner(id_mapping: IdMapping) -> tuple[int, int]:
    """(uid, gid) on disk of the container's root; our own where we are not privileged to give files away."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    return id_mapping.root()


def make_dir(path: str, mode: int, owner: tuple[int, int]) -> None:
    """Make the directory ``path`` with exactly ``mode`` whatever the umask, owned by ``owner`` (uid, gid)."""
    os.mkdir(path, 0o700)
    os.chown(path, *owner)
    os.chmod(path, mode)


def ensure_dir(path: str, mode: int, owner: tuple[int, int]) -> None:
    """As :func:`make_dir`, but one that exists stays as it is; parents are made with mode 0711.

    Raises:
        DriverError: it cannot be made.
    """
    try:
        if not os.path.isdir(path):
            os.makedirs(os.path.dirname(path) or ".", 0o711, exist_ok=True)
            with suppress(FileExistsError):
                make_dir(path, mode, owner)
    except OSError as error:
        raise DriverError(
            f"cannot make the driver's directory {path}: {error.strerror}; choose another root directory"
        ) from error


@contextmanager
def new_dir(directory: str, name: str, mode: int, owner: tuple[int, int]) -> Iterator[str]:
    """A directory that is filled under another name and becomes ``directory/name`` for good when all went well.

    Raises:
        LayerExistsError: the name is taken.
    """
    path = os.path.join(directory, name)
    if os.path.lexists(path):
        raise _taken(name, path)
    building = f"{path}-{secrets.token_hex(4)}{CREATING}"
    make_dir(building, mode, owner)
    try:
        yield building
        try:
            disk.move(building, path)
        except FileExistsError:
            raise _taken(name, path) from None
    except BaseException:
        with suppress(DriverError):  # it is swept at the next start; the first error is the one to tell
            delete(building)
        raise


def _taken(name: str, path: str) -> LayerExistsError:
    return LayerExistsError(f"cannot create layer {name}: {path} exists; use another id or remove that layer first")


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
            disk.delete(path)
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


def _detach_below(path: str) -> None:
    """Take every mount at or below ``path`` out of sight, the deepest first."""
    points = [*mounts_inside(path), *([path] if mounts.top_mount(path) is not None else [])]
    for point in points:
        try:
            unmount.unmount(point, lazy=True)
        except OSError as error:
            _log.warning("cannot unmount %s: %s", point, error.strerror)


def _mounted_at(path: str) -> str:
    points = mounts_inside(os.path.realpath(path))
    return f" ({points[0]} is mounted)" if points else ""
