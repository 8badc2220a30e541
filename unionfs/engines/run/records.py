"""What is known of a container beside its files, on disk: how it is run, and whether somebody is running it.

One directory for each, named after the read-write layer's mount id, beside the layer store's own files::

    image/DRIVER/containers/<mount id>/
        container.json    a Record
        running.json      a Running; only while it runs, or after whoever ran it died
        lock              held (flock(2)) by whoever runs it: the kernel lets go of it with the process
        config.json ...   what the runtime is given, and its log and state
        output            what a container in the background has written
        ended.json        an Ended; of the last time

A directory whose read-write layer is gone is useless, and removed by the next one who looks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unionfs.engines.images.model import ImageConfig
from unionfs.engines.run.options import RunOptions
from unionfs.errors import RunError
from unionfs.host.disk import ensure_dir, replace_file

_LOOK_S = 0.01

_Model = TypeVar("_Model", bound=BaseModel)


class Record(BaseModel):
    """How a container is run.

    Attributes:
        name: of the read-write layer.
        image: what a person called it.
        remove: the container goes when it ends.
        created: seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    image: str
    config: ImageConfig
    options: RunOptions
    remove: bool = False
    created: float = 0.0


class Running(BaseModel):
    """A container that is started.

    Attributes:
        pid: whose child it is.
        boot: where process ids mean what they meant then; see :func:`boot_id`.
        runtime, path: the runtime's name and program.
        started: seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    pid: int
    boot: str
    runtime: str
    path: str
    rootless: bool = False
    started: float = 0.0


class Ended(BaseModel):
    """How a container ended the last time.

    Attributes:
        status: its exit status, 128 + N after signal N.
        started, ended: seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    status: int
    started: float
    ended: float


class Place:
    """The directory of one container.

    Args:
        parent: the directory of all of them.
        mount_id: the container's read-write layer.
    """

    def __init__(self, parent: str, mount_id: str) -> None:
        self.mount_id = mount_id
        self.path = os.path.join(parent, mount_id)
        self._lock = -1

    @property
    def state(self) -> str:
        """The directory for the runtime."""
        return os.path.join(self.path, "runtime")

    @property
    def log(self) -> str:
        """The file for the runtime's errors."""
        return os.path.join(self.path, "log")

    @property
    def pid_file(self) -> str:
        """The file for the number of the container's process 1."""
        return os.path.join(self.path, "pid")

    @property
    def output(self) -> str:
        """The file for what a container in the background writes; both streams, as they come."""
        return os.path.join(self.path, "output")

    @property
    def lock(self) -> str:
        """The file that whoever runs the container holds a lock on."""
        return self._file("lock")

    @property
    def spec(self) -> str:
        """The runtime configuration."""
        return os.path.join(self.path, "config.json")

    def make(self, record: Record) -> None:
        """Make the directory.

        Raises:
            OSError: it cannot be made.
        """
        ensure_dir(self.path, 0o700)
        replace_file(self._file("container.json"), record.model_dump_json().encode())

    def exists(self) -> bool:
        """Whether it was made."""
        return os.path.exists(self._file("container.json"))

    def record(self) -> Record:
        """How the container is run.

        Raises:
            RunError: the file is damaged or missing.
        """
        found = _read(self._file("container.json"), Record)
        if found is None:
            raise RunError(f"{self.path} has no container.json; remove the container")
        return found

    def running(self) -> Running | None:
        """Who runs it; None if nobody does. To be believed about a process only while the lock is held by others."""
        return _read(self._file("running.json"), Running)

    def is_marked_running(self) -> bool:
        """Whether it was started and the end was not noted."""
        return os.path.exists(self._file("running.json"))

    def mark_running(self, running: Running) -> None:
        """Note that it is started; before that, so that nothing is started that nobody knows of."""
        replace_file(self._file("running.json"), running.model_dump_json().encode())

    def mark_ended(self) -> None:
        """Note that it has ended, and remove what was only needed while it ran."""
        shutil.rmtree(self.state, ignore_errors=True)
        for name in ("pid", "running.json"):
            with suppress(FileNotFoundError):
                os.unlink(self._file(name))

    def ended(self) -> Ended | None:
        """How it ended the last time; None if it never did, or nobody was there to see it."""
        return _read(self._file("ended.json"), Ended)

    def note_end(self, status: int) -> None:
        """Keep the exit status; while it is still marked as running."""
        running = self.running()
        found = Ended(status=status, started=running.started if running is not None else 0.0, ended=time.time())
        replace_file(self._file("ended.json"), found.model_dump_json().encode())

    def is_running(self) -> bool:
        """Whether somebody runs it now."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            # A shared lock: two who ask do not see each other.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.is_marked_running()
        finally:
            os.close(fd)
        return False

    def take(self, tries: int = 1) -> bool:
        """Take the lock; False if somebody runs the container.

        Args:
            tries: how often; whoever only looks (:meth:`is_running`) holds the lock for a moment.
        """
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        for number in range(tries):
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = fd
                return True
            if number + 1 < tries:
                time.sleep(_LOOK_S)
        os.close(fd)
        return False

    def let_go(self) -> None:
        """Give the lock back; twice is harmless."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the directory. What cannot be removed now is next time."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


def boot_id() -> str:
    """What tells this boot of the machine from others, and our PID namespace from others."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"


def _read(path: str, model: type[_Model]) -> _Model | None:
    try:
        with open(path, "rb") as file:
            return model.model_validate_json(file.read())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RunError(f"{path} is damaged; remove the container with: unionfs container rm --force") from error
