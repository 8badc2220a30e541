"""The run-time record of our mounts: one small JSON file for each, for people and programs to find them.

The kernel's mount table says that something is mounted, not of which layers nor by which process. The record is
a convenience: a mount works without it, and whatever the record says is checked against the kernel when read.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from unionfs.host.mounts import Mount, is_mounted_anywhere, read_mounts
from unionfs.host.processes import process_start

_ROOTS_DIRECTORY: Final = "/run/unionfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    """One mount as its server described it."""

    minor: int
    target: str
    pid: int
    started: int
    """Start time of the process in clock ticks since boot: tells it from a later one with the same pid."""
    mounted_at: float
    source: str
    lowerdirs: list[str]
    datadirs: list[str]
    upperdir: str | None
    workdir: str | None
    options: list[str]
    transport: str = "pyfuse3"
    supervised: bool = False
    """Whether the process is a copy of the supervisor."""

    def to_json(self) -> bytes:
        """What is in its file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "surrogateescape")


_FIELDS: Final = frozenset(field.name for field in fields(MountRecord))


@dataclass(frozen=True, slots=True, kw_only=True)
class MountStatus:
    """A mount that exists, with its record where there is one.

    ``state`` is ``serving``; ``dead`` when it is mounted but its server is gone; ``detached`` when the server lives
    but the mount is not in this mount namespace, as after a lazy unmount; ``unknown`` without a record.
    """

    target: str
    state: str
    record: MountRecord | None


def run_directories() -> list[str]:
    """Where records may be, the preferred place first."""
    directories = [_ROOTS_DIRECTORY] if os.geteuid() == 0 else []
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Also for root: in a user namespace it may not write /run.
    if runtime and os.path.isabs(runtime):
        directories.append(os.path.join(runtime, "unionfs"))
    return directories


def _last_directories() -> list[str]:
    """Where the records of a user are for whom no session set XDG_RUNTIME_DIR, as with su, cron and some containers."""
    uid = _uid_outside()
    return [f"/run/user/{uid}/unionfs", f"/tmp/unionfs-{uid}"]


def _uid_outside() -> int:
    """Our user id as the user namespace around sees it: in one of his own, each user is 0."""
    uid = os.geteuid()
    with suppress(OSError, ValueError), open("/proc/self/uid_map", encoding="ascii") as lines:
        for line in lines:
            inside, outside, count = map(int, line.split())
            if inside <= uid < inside + count:
                return outside + uid - inside
    return uid


def _open_directory(path: str, *, make: bool = False) -> int:
    """A descriptor of a directory for records; raises OSError, also for one in /tmp that is somebody else's."""
    if make:
        os.makedirs(path, mode=0o700 if path.startswith("/tmp/") else 0o755, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if path.startswith("/tmp/") and os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
    return fd


def is_alive(record: MountRecord) -> bool:
    """Whether the server that wrote ``record`` still runs."""
    return process_start(record.pid) == record.started


class RecordPlace:
    """Where a server puts its record: directories that are opened before its mount may cover them."""

    def __init__(self) -> None:
        self._directories: list[int] = []
        self._written: tuple[int, str] | None = None
        for directory in run_directories():
            with suppress(OSError):
                self._directories.append(_open_directory(directory, make=True))
        for directory in _last_directories():
            if not any(os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True) for fd in self._directories):
                with suppress(OSError):
                    # /run/user/UID is made by whoever looks after the user's session, or not at all.
                    self._directories.append(_open_directory(directory, make=os.path.isdir(os.path.dirname(directory))))

    def write(self, record: MountRecord) -> None:
        """Write ``record`` to the first of them that takes it; nowhere when none does."""
        name = f"{record.minor}.json"
        temporary = f"{name}.new"  # a minor has one mount, so what a killed server left there is overwritten
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
        for directory in self._directories:
            with suppress(OSError):
                with open(os.open(temporary, flags, 0o644, dir_fd=directory), "wb") as file:
                    os.fchmod(file.fileno(), 0o644)
                    file.write(record.to_json())
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                self._written = directory, name
                return

    def close(self) -> None:
        """Remove what was written, unless the minor was taken over by a mount of another process meanwhile."""
        if self._written is not None:
            directory, name = self._written
            with suppress(OSError):
                record = _read(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory))
                if record is not None and record.pid == os.getpid():
                    os.unlink(name, dir_fd=directory)
        for directory in self._directories:
            os.close(directory)
        self._directories.clear()
        self._written = None


def find(mount: Mount | None) -> MountRecord | None:
    """What the server of a mount said of it; None if that has ended or said nothing, or if it is no mount of ours."""
    if mount is None or not mount.is_union:
        return None
    name = f"{mount.minor}.json"
    records = (_read(path) for path in _files() if os.path.basename(path) == name)
    return next((record for record in records if record is not None and is_alive(record)), None)


def read_all() -> list[MountStatus]:
    """Every union mount that exists, sorted by target; files of those that are gone are deleted."""
    ours: dict[int, list[Mount]] = {}
    for mount in read_mounts():
        if mount.is_union and mount.major == 0:
            ours.setdefault(mount.minor, []).append(mount)
    found = []
    for path in _files():
        record = _read(path)
        if record is None:
            continue
        alive = is_alive(record)
        points = [mount.mount_point for mount in ours.get(record.minor, [])]
        # Minors are used again, so a dead server's record may name somebody else's mount.
        if record.target in points or (alive and points):
            del ours[record.minor]
            target = record.target if record.target in points else points[0]
            state = "serving" if alive else "dead"
            found.append(MountStatus(target=target, state=state, record=record))
        elif alive:
            found.append(MountStatus(target=record.target, state="detached", record=record))
        elif not is_mounted_anywhere(record.minor):  # else it is dead, and in another mount namespace
            _unlink(path)
    found += [MountStatus(target=mounts[0].mount_point, state="unknown", record=None) for mounts in ours.values()]
    return sorted(found, key=lambda status: status.target)


def _all_directories() -> list[str]:
    # Root's mounts are everybody's to see.
    return list(dict.fromkeys([*run_directories(), *_last_directories(), _ROOTS_DIRECTORY]))


def _files() -> list[str]:
    files = []
    for directory in _all_directories():
        try:
            fd = _open_directory(directory)
        except OSError:
            continue
        names = os.listdir(fd)
        os.close(fd)
        files += [os.path.join(directory, name) for name in names if name.endswith(".json")]
    return files


def _read(file_or_path: str | int) -> MountRecord | None:
    try:
        with open(file_or_path, encoding="utf-8", errors="surrogateescape") as file:
            found: dict[str, Any] = json.load(file)
        # A later version may say more.
        return MountRecord(**{name: found[name] for name in _FIELDS & found.keys()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # gone meanwhile, or not one of ours


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
