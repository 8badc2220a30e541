"""What is known of the engine that uses the plugin: which home it has, what it said, and which mounts it holds.

An engine calls ``Plugin.Activate`` and ``GraphDriver.Init`` once, at its own start. A plugin that is replaced while
containers run gets no such call, so it has to know from before which home it serves. Nor is it told again which mounts
are held: the mount table says that a container's tree is mounted, but not that a ``docker cp`` has asked for it too.
The file lies beside the socket, in a directory that does not survive a boot, as no engine does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress

from pydantic import Field

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.home import ensure_dir, root_owner
from unionfs.engines.docker_plugin.messages import InitRequest, Request
from unionfs.errors import DriverError
from unionfs.host.disk import replace_file


class SavedSession(Request):
    """An engine's session."""

    init: InitRequest
    """What the engine said at its start."""
    held: dict[str, int] = Field({}, description="how many Gets of a layer have had no Put yet")


class SessionFile:
    """The session of the engine that runs.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> SavedSession | None:
        """What was saved; None when nothing was.

        Raises:
            DriverError: the file cannot be understood.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                return SavedSession.model_validate(json.load(file))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise DriverError(
                f"{self._path}: does not say which home to serve ({error.__class__.__name__}); restart the engine"
            ) from error

    def save(self, session: SavedSession) -> None:
        """Replace what was saved; a crash leaves the old or the new."""
        text = json.dumps(session.model_dump(by_alias=True)) + "\n"
        replace_file(self._path, text.encode())

    def forget(self) -> None:
        """Remove what was saved, if anything was."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)


class HeldLayers:
    """How often the engine holds each mount, written down at every change.

    Args:
        file: where the counts are written to.
        init: what is written with them.
        held: the counts to begin with.
    """

    def __init__(self, file: SessionFile, init: InitRequest, held: Mapping[str, int]) -> None:
        self._file = file
        self._init = init
        self._held = dict(held)
        self._lock = threading.Lock()
        self._save()

    def add(self, layer_id: str, step: int) -> None:
        """Count a Get (1) or a Put (-1); a Put without a Get counts nothing."""
        with self._lock:
            self._set(layer_id, self._held.get(layer_id, 0) + step)

    def forget(self, layer_id: str) -> None:
        """Drop the count of a layer that is removed."""
        with self._lock:
            self._set(layer_id, 0)

    def _set(self, layer_id: str, count: int) -> None:
        before = self._held.pop(layer_id, 0)
        if count > 0:
            self._held[layer_id] = count
        if max(count, 0) != before:
            self._save()

    def _save(self) -> None:
        self._file.save(SavedSession(init=self._init, held=self._held))


class HomeLock:
    """One process at a time serves a driver's home; this one, until :meth:`release`.

    The counts of who uses which mount live in memory, so two processes would unmount each other's layers. The lock is
    on the directory itself, so that the home has no file which Docker does not know. It ends with the process.

    Args:
        home: the directory; it and its parents are made where they are missing, as the drivers would.
        id_mapping: the owners' mapping.

    Raises:
        DriverError: somebody else holds it, or the directory cannot be made.
    """

    def __init__(self, home: str, id_mapping: IdMapping) -> None:
        self.home = home
        self._fd = -1
        ensure_dir(home, 0o710, (os.geteuid(), root_owner(id_mapping)[1]))
        try:
            self._fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise DriverError(f"cannot use {home} as home: {error.strerror}; choose another directory") from error
            raise DriverError(
                f"{home} is served by another process; stop it (fuser -v {home} shows it), or use another home"
            ) from error

    def release(self) -> None:
        """Let others in; releasing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
