"""Files that are there whole or not at all, after a crash too."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress

from unionfs.layers.disk import sync_dir


def replace_file(path: str, contents: bytes, mode: int = 0o600) -> None:
    """Write a file, which takes its name when it is on stable storage.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    parent = os.path.dirname(path)
    # Docker's name for such a file, which it ignores where it reads a directory.
    fd, begun = tempfile.mkstemp(prefix=".tmp-", dir=parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(contents)
            file.flush()
            os.fsync(fd)
        os.replace(begun, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(begun)
        raise
    sync_dir(parent)
