"""The directory that a driver keeps everything in, and how directories appear in it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import removal
from unionfs.drivers.ids import CREATING
from unionfs.errors import DriverError, LayerExistsError
from unionfs.host.syscalls import renameat2

RENAME_NOREPLACE = 1
_AT_FDCWD = -100


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
    """A directory that is filled under another name and becomes ``directory/name`` when all went well.

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
            renameat2(_AT_FDCWD, os.fsencode(building), _AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise _taken(name, path) from None
            raise
    except BaseException:
        with suppress(DriverError):  # it is swept at the next start; the first error is the one to tell
            removal.delete(building)
        raise


def sync_dir(path: str) -> None:
    """Bring the entries of a directory to stable storage."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _taken(name: str, path: str) -> LayerExistsError:
    return LayerExistsError(f"cannot create layer {name}: {path} exists; use another id or remove that layer first")
