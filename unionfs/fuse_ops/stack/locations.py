"""Where the directories of a mount lie: apart from each other, and reached without a mapping of ids.

A layer that is written to changes under every mount that has it. Paths alone do not tell: links, ``..`` and bind
mounts lead to one directory by many. The kernel's overlayfs compares the directories themselves, up to the root of
their file system. It accepts a writable directory in a lower layer (since Linux 5.13); here that is refused.

containers/storage 1.43 hands a mount program both ``uidmapping=`` and lower layers on id-mapped mounts of the kernel
(it tests only whether the kernel's overlayfs could use those, 5.19). Mapping the ids of such a layer once more shows
wrong owners. So the layer is opened by another way to the same directory, where the ids are those on disk, as those
in the upper directory are. (Linux 6.15 can take the mapping off a clone of the mount; this works on all.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from unionfs.errors import LayerError
from unionfs.host import syscalls
from unionfs.host.mounts import Mount, read_mounts


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory: how the options call it, and where it is."""

    name: str
    fd: int
    info: os.stat_result
    mount_id: int
    path: str
    """Without links; what is on one mount is compared by it."""


def check_separate(lowers: Iterable[str], upperdir: str, workdir: str) -> None:
    """Raise :class:`LayerError` when ``upperdir``, ``workdir`` and one of ``lowers`` overlap.

    Lower layers may overlap with each other. What cannot be opened is left to whoever opens it as a layer.
    """
    mounts: dict[int, Mount] = {}
    with ExitStack() as opened:
        upper = _open(f"upperdir {upperdir}", upperdir, opened)
        work = _open(f"workdir {workdir}", workdir, opened)
        if upper and work and (_contains(upper, work, mounts) or _contains(work, upper, mounts)):
            if os.path.samestat(upper.info, work.info):
                raise LayerError(f"{upper.name} and {work.name} are the same directory; use separate directories")
            raise LayerError(f"{work.name} and {upper.name} lie inside each other; use separate directories")
        for path in lowers:
            with ExitStack() as opened_lower:
                lower = _open(f"lower layer {path}", path, opened_lower)
                for writable in (upper, work):
                    if lower and writable:
                        _check_lower(lower, writable, mounts)


def _check_lower(lower: _Place, writable: _Place, mounts: dict[int, Mount]) -> None:
    if os.path.samestat(lower.info, writable.info):
        raise LayerError(f"{writable.name} is {lower.name} too, which is never written to; use another directory")
    if _contains(lower, writable, mounts):
        raise LayerError(
            f"{writable.name} lies in {lower.name}, which is never written to; choose a directory outside of it"
        )
    if _contains(writable, lower, mounts):
        raise LayerError(f"{lower.name} lies in {writable.name}, where it would be written to; move one of them")


def _open(name: str, path: str, opened: ExitStack) -> _Place | None:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        return _Place(name, fd, os.stat(fd), syscalls.mount_id(fd), os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return None


def _contains(outer: _Place, inner: _Place, mounts: dict[int, Mount]) -> bool:
    """Whether ``inner`` is ``outer`` or lies below it on the same file system."""
    if os.path.samestat(outer.info, inner.info):
        return True
    if outer.mount_id == inner.mount_id:
        return _is_below(inner.path, outer.path)
    if not mounts:
        mounts.update((mount.mount_id, mount) for mount in read_mounts())
    outer_mount, inner_mount = mounts.get(outer.mount_id), mounts.get(inner.mount_id)
    if outer_mount is None or inner_mount is None or outer_mount.device != inner_mount.device:
        return False
    inside = _in_file_system(inner, inner_mount)
    above = _in_file_system(outer, outer_mount)
    if not _is_below(inside, above):
        return False
    # NFS calls the root of each of its mounts "/". Where the way up stays on the mount, the directory itself tells.
    up = len(_parts(inside)) - len(_parts(above))
    if up > len(_parts(inside)) - len(_parts(inner_mount.root)):
        return True
    return os.path.samestat(os.stat(f"/proc/self/fd/{inner.fd}" + "/.." * up), outer.info)


def _in_file_system(place: _Place, mount: Mount) -> str:
    """The path of a directory from the root of its file system."""
    return os.path.normpath(os.path.join(mount.root, os.path.relpath(place.path, mount.mount_point)))


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def path_without_idmap(path: str) -> str:
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
