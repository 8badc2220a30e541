"""What a server logs, where, and without reading a file."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.fuse_ops.session import logs

# All ways in which a program complains of something unexpected, without one of them reading its source. Of the hooks
# that cannot be taken back, so in a process of its own.
COMPLAIN = """
    import logging, sys, threading, warnings

    from unionfs.fuse_ops.session import logs

    opened = []
    logs.to_stderr(False)
    logs.read_no_files()
    sys.addaudithook(lambda event, args: opened.append((event, args[0])) if event in ("open", "import") else None)

    class Sick:
        def __del__(self):
            raise ValueError("in a finalizer")

    def fail():
        raise OSError(5, "in a handler")

    try:
        fail()
    except OSError:
        logging.getLogger("any").exception("request failed")
    try:
        try:
            fail()
        except OSError as error:
            raise ExceptionGroup("several", [ValueError("one"), error]) from error
    except ExceptionGroup:
        logging.getLogger("any").exception("group")
    Sick()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    logging.getLogger("any").info("wrong number of %s", "arguments", "here")
    warnings.warn("a warning", stacklevel=1)
    print(opened)
    fail()
"""


def test_complaints_read_no_source(tmp_path: Path) -> None:
    script = tmp_path / "complain.py"
    script.write_text(textwrap.dedent(COMPLAIN))
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    for said in ("request failed", "in a handler", "group", "in a finalizer", "unexpected error", "a warning"):
        assert said in done.stderr, done.stderr
    assert f'File "{script}", line 16, in fail' in done.stderr  # where it was is said all the same


@pytest.fixture
def log_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place of the system's log, behind a link as systemd has it."""
    directory = tmp_path / "journal"
    directory.mkdir()
    (tmp_path / "log").symlink_to("journal/dev-log")
    monkeypatch.setattr(logs, "_SYSTEM_LOG", str(tmp_path / "log"))
    yield directory / "dev-log"


def listening(path: Path, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    made.settimeout(10)
    return made


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("any", level, __file__, 1, text, (), None)


def test_system_log(log_socket: Path) -> None:
    with listening(log_socket) as log:
        handler = logs.SystemLog()
        handler.handle(record(logging.WARNING, "carefully"))
        assert log.recv(1000) == b"<28>unionfs-mount[%d]: carefully\0" % os.getpid()
        handler.handle(record(logging.INFO, "by the way"))
        assert log.recv(1000).startswith(b"<30>")
    handler.close()


def test_system_log_that_is_started_again_though_its_path_leads_elsewhere(log_socket: Path) -> None:
    handler = logs.SystemLog()
    handler.handle(record(logging.ERROR, "nobody hears this"))
    with listening(log_socket) as log:
        (log_socket.parent.parent / "log").unlink()
        handler.handle(record(logging.ERROR, "one"))
        assert log.recv(1000).startswith(b"<27>")
    log_socket.unlink()
    with listening(log_socket) as log:
        handler.handle(record(logging.ERROR, "two"))
        assert b"two" in log.recv(1000)
    handler.close()


def test_system_log_that_does_not_read(log_socket: Path) -> None:
    with listening(log_socket) as log:
        handler = logs.SystemLog()
        for number in range(2000):  # more than a socket holds; it would wait for ever
            handler.handle(record(logging.ERROR, f"{number} {'x' * 1000}"))
        assert log.recv(2000).startswith(b"<27>unionfs-mount[%d]: 0 x" % os.getpid())
    handler.close()


def test_no_system_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_SYSTEM_LOG", str(tmp_path / "none/log"))
    handler = logs.SystemLog()
    handler.handle(record(logging.ERROR, "nobody hears this"))
    handler.close()
