"""Where a server's log goes: to stderr while somebody reads it, to the system's log afterwards."""

from __future__ import annotations

import logging
import logging.handlers
import os


def to_stderr(debug: bool, program: str = "unionfs-mount") -> None:
    """Log to stderr, every line with the name of the ``program``: everything with ``debug``, else what an operator
    should know.
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format=f"{program}: %(message)s", force=True)


def to_syslog() -> None:
    """Log to the system's log where there is one; a daemon's stderr is /dev/null."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    try:
        handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
    except OSError:
        root.addHandler(logging.NullHandler())
        return
    handler.setFormatter(logging.Formatter(f"unionfs-mount[{os.getpid()}]: %(message)s"))
    root.addHandler(handler)
