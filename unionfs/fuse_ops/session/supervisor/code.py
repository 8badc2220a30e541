"""Whether the code that was loaded is still what is installed."""

from __future__ import annotations

import os
import sys


class LoadedCode:
    """The files of our package, and of trio's first module, as they were when this was made.

    A server must never be a mixture: it imports some modules only when they are needed.
    """

    def __init__(self) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] == "unionfs"]
        files = {sys.modules[name].__file__ for name in [*names, "trio"] if name in sys.modules}
        self._states = {path: _state(path) for path in sorted(path for path in files if path)}

    def is_current(self) -> bool:
        """Whether each of them is still the same file, as seen from this process' root."""
        return all(_state(path) == state for path, state in self._states.items())


def _state(path: str) -> tuple[int, int, int] | None:
    # Not the device: a mount that shows the same files may cover the installation.
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size
