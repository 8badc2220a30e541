"""The path of a layer without the id mapping of the mount that it lies on.

containers/storage 1.43 hands a mount program both ``uidmapping=`` and lower layers on id-mapped mounts of the kernel
(it tests only whether the kernel's overlayfs could use those, 5.19). Mapping the ids of such a layer once more shows
wrong owners. So the layer is opened by another way to the same directory, where the ids are those on disk, as those
in the upper directory are. (Linux 6.15 can take the mapping off a clone of the mount; this works on all.)
"""

from __future__ import annotations

import os

from unionfs.errors import LayerError
from unionfs.host import syscalls
from unionfs.host.mountinfo import Mount, read_mounts


def unmapped_path(path: str) -> str:
    """A path of the directory ``path`` through a mount that maps no ids; ``path`` itself as a rule.

    Raises LayerError when its file system is mounted nowhere without a mapping.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return path  # whoever opens the layer says what is wrong with it
    try:
        mounts = {mount.mount_id: mount for mount in read_mounts()}
        here = mounts.get(syscalls.mount_id(fd))
        if here is None or not here.id_mapped:
            return path
        shown = os.readlink(f"/proc/self/fd/{fd}")
        wanted = os.stat(fd)
        inside = os.path.normpath(os.path.join(here.root, os.path.relpath(shown, here.mount_point)))
        for mount in mounts.values():
            if mount.device == here.device and not mount.id_mapped:
                candidate = _path_in(mount, inside)
                if candidate is not None and _is(candidate, wanted, mount):
                    return candidate
    finally:
        os.close(fd)
    raise LayerError(
        f"lower layer {path}: the mount that it lies on maps ids, as uidmapping= does too, and there is no other "
        "mount of its file system; leave one of the two mappings out"
    )


def _path_in(mount: Mount, inside: str) -> str | None:
    """Where ``mount`` shows the path ``inside`` of its file system."""
    below = os.path.relpath(inside, mount.root)
    return None if below.startswith("..") else os.path.normpath(os.path.join(mount.mount_point, below))


def _is(path: str, wanted: os.stat_result, mount: Mount) -> bool:
    """Whether ``path`` is that directory, seen through that mount and not through one on top of it."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.path.samestat(os.stat(fd), wanted) and syscalls.mount_id(fd) == mount.mount_id
    finally:
        os.close(fd)
