"""Where a server's log goes: to stderr while somebody reads it, to the system's log afterwards.

A server's mount may cover any directory: Python's, this package's, that of the system's log. Whatever asks for a path
in it waits for the server; so the server itself may not, or it waits for ever.
"""

from __future__ import annotations

import linecache
import logging
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import Final

_SYSTEM_LOG: Final = "/dev/log"
_DAEMON: Final = 3 << 3  # syslog(3): LOG_DAEMON
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


def to_stderr(debug: bool, program: str = "unionfs-mount") -> None:
    """Log to stderr, every line with the name of the ``program``: everything with ``debug``, else what an operator
    should know.
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format=f"{program}: %(message)s", force=True)


class SystemLog(logging.Handler):
    """The system's log, reached through its directory as it was when this was made.

    A line that the log does not take at once is dropped: its reader may wait for the mount that we serve.
    """

    def __init__(self) -> None:
        super().__init__()
        self._program = f"unionfs-mount[{os.getpid()}]"
        self._socket: socket.socket | None = None
        directory, self._name = os.path.split(os.path.realpath(_SYSTEM_LOG))
        try:
            self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._directory = -1

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            text = f"<{_DAEMON | _priority(record.levelno)}>{self._program}: {self.format(record)}\0"
            message = text.encode("utf-8", "replace")
            if self._socket is None or not self._sent(message):
                self._socket = self._connected()  # the log may have been started again
                if self._socket is not None:
                    self._sent(message)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Give up what was opened."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
        super().close()

    def _sent(self, message: bytes) -> bool:
        assert self._socket is not None
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass
        except OSError:
            self._socket.close()
            return False
        return True

    def _connected(self) -> socket.socket | None:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            with suppress(OSError):
                made = socket.socket(socket.AF_UNIX, kind)
                made.setblocking(False)
                try:
                    made.connect(f"/proc/self/fd/{self._directory}/{self._name}")
                except OSError:
                    made.close()
                    raise
                return made
        return None


def to_system_log(handler: SystemLog) -> None:
    """Log to the system's log only; a daemon's stderr is /dev/null."""
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)


def read_no_files() -> None:
    """Have nothing that is logged from now on, nor the interpreter when it complains, read a file.

    Tracebacks name files, lines and functions, but do not quote the source.
    """
    logging.raiseExceptions = False  # it would write tracebacks to stderr
    linecache.clearcache()
    linecache.checkcache = lambda filename=None: None
    linecache.updatecache = lambda filename, module_globals=None: []
    time.localtime()  # reads the time zone
    # The interpreter's own ways to write these open the source by themselves.
    sys.excepthook = _log_exception
    sys.unraisablehook = lambda caught: _log_exception(caught.exc_type, caught.exc_value, caught.exc_traceback)
    threading.excepthook = lambda caught: _log_exception(caught.exc_type, caught.exc_value, caught.exc_traceback)


def _log_exception(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    logging.getLogger(__name__).error("unexpected error\n%s", text.rstrip())


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)
