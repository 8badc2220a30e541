"""What the engine said when it started, kept for a plugin that starts again under it.

An engine calls ``Plugin.Activate`` and ``GraphDriver.Init`` once, at its own start. A plugin that is replaced while
containers run gets no such call, so it has to know from before which home it serves. The file lies beside the socket,
in a directory that does not survive a boot, as no engine does.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress

from pydantic import ValidationError

from unionfs.engines.docker_plugin.messages import InitRequest
from unionfs.errors import DriverError


class SessionFile:
    """The last ``Init``.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> InitRequest | None:
        """What was saved; None when nothing was.

        Raises:
            DriverError: the file cannot be understood.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                return InitRequest.model_validate(json.load(file))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError) as error:
            raise DriverError(
                f"{self._path}: does not say which home to serve ({error.__class__.__name__}); restart the engine"
            ) from error

    def save(self, request: InitRequest) -> None:
        """Replace what was saved; a crash leaves the old or the new."""
        new = f"{self._path}.{secrets.token_hex(4)}"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(request.model_dump(by_alias=True), file)
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
