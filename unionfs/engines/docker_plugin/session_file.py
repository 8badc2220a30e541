"""What a plugin that starts again under a running engine has to know of the one before.

An engine calls ``Plugin.Activate`` and ``GraphDriver.Init`` once, at its own start. A plugin that is replaced while
containers run gets no such call, so it has to know from before which home it serves. Nor is it told again which mounts
are held: the mount table says that a container's tree is mounted, but not that a ``docker cp`` has asked for it too.
The file lies beside the socket, in a directory that does not survive a boot, as no engine does.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress

from pydantic import Field, ValidationError

from unionfs.engines.docker_plugin.messages import InitRequest, Request
from unionfs.errors import DriverError


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
        except (ValueError, ValidationError) as error:
            raise DriverError(
                f"{self._path}: does not say which home to serve ({error.__class__.__name__}); restart the engine"
            ) from error

    def save(self, session: SavedSession) -> None:
        """Replace what was saved; a crash leaves the old or the new."""
        new = f"{self._path}.{secrets.token_hex(4)}"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(session.model_dump(by_alias=True), file)
                file.write("\n")
            os.rename(new, self._path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(new)
            raise

    def forget(self) -> None:
        """Remove what was saved, if anything was."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)
