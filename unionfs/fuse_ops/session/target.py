"""The directory that a mount is made on, checked before anything else is done."""

from __future__ import annotations

import os
import stat

from unionfs.errors import MountError
from unionfs.host import mounts


def checked_target(target: str) -> str:
    """``target`` as an absolute path without links, known to be a directory that we can mount on.

    Raises:
        MountError: it is not, or a union is mounted there already.
    """
    path = mounts.canonical(target)
    if path == "/proc":
        raise MountError("mount point /proc: the server itself needs what is there; choose another")
    top = mounts.top_mount(path)
    if top is not None and top.is_union:
        raise MountError(_occupied(target, path))
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise MountError(f"mount point {target} does not exist; create it with: mkdir -p {target}") from None
    except OSError as error:
        raise MountError(f"mount point {target} cannot be used: {error.strerror}; choose another") from None
    if not is_directory:
        raise MountError(f"mount point {target} is not a directory; name a directory")
    return path


def _occupied(target: str, path: str) -> str:
    from unionfs.host.mounts import is_dead  # a mount that goes well does not need it

    if is_dead(path):
        return (
            f"mount point {target} has a dead mount, whose server is gone; "
            f"remove it with: unionfs umount --lazy {target}"
        )
    return f"mount point {target} is busy: a union is mounted there; unmount it with: unionfs umount {target}"
