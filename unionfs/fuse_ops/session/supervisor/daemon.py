"""The supervisor itself, a program: it keeps one forked copy waiting for the next request.

It takes no part in a mount. The copies accept connections by themselves, so no caller, however slow or hostile, can
keep the supervisor from its work; and a mount that is served does not notice when the supervisor ends.

Started by ``unionfs serve supervisor``, and by itself when its code has been replaced. Its size is what a copy is made
of, so it loads what a server needs and nothing that only people need, and is not that command itself.
"""

from __future__ import annotations

import enum
import gc
import os
import select
import signal
import socket
import sys
import time
from contextlib import closing
from types import FrameType
from typing import Final, NoReturn

from unionfs.errors import ListenError, MountError, UnionfsError
from unionfs.fuse_ops.session.mount_server import serve_in_copy
from unionfs.fuse_ops.session.supervisor.worker import STALE, LoadedCode, Serve, rehearse, wait_and_serve
from unionfs.host import sockets
from unionfs.host.daemon import inherited_fds, open_standard_fds
from unionfs.host.syscalls import end_with_parent

# Making the next copy takes a processor from the mount that was just asked for. It can wait, unless somebody else asks.
_NEXT_COPY_S: Final = 0.02
_FAILED_PAUSE_S: Final = 1.0  # after a copy that ended by itself: what killed it may kill the next one too


class End(enum.Enum):
    """Why the supervisor has ended."""

    IDLE = enum.auto()
    STALE = enum.auto()


def supervise(listener: socket.socket, serve: Serve, *, idle_s: float = 0) -> End:
    """Keep a copy of this process waiting on ``listener`` until there is a reason to end.

    Args:
        listener: a listening stream socket of the family AF_UNIX.
        serve: what a copy does with a request.
        idle_s: end after so many seconds without a request; 0 is never.

    The calling process must have no other threads, and have imported all that a server needs. Ended copies are
    reaped by the kernel, as SIGCHLD is ignored from now on.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    code = LoadedCode()
    # Whatever is there now stays for good. Frozen, the collector does not write into it, so that it stays shared.
    gc.collect()
    gc.freeze()
    poll = select.poll()
    waiting = _start(listener, code, serve)
    poll.register(waiting, select.POLLIN)
    asked = time.monotonic()
    while True:
        remaining_s = asked + idle_s - time.monotonic() if idle_s > 0 else None
        if remaining_s is not None and remaining_s <= 0:
            return End.IDLE
        for fd, _ in poll.poll(None if remaining_s is None else remaining_s * 1000 + 1):
            said = os.read(fd, 16)
            if STALE in said:
                return End.STALE
            if not said:
                poll.unregister(fd)
                os.close(fd)
            if fd == waiting:
                asked = time.monotonic()
                if not said:
                    time.sleep(_FAILED_PAUSE_S)
                else:
                    select.select([listener], [], [], _NEXT_COPY_S)
                waiting = _start(listener, code, serve)
                poll.register(waiting, select.POLLIN)


def _start(listener: socket.socket, code: LoadedCode, serve: Serve) -> int:
    """Fork a copy that waits; returns the pipe on which it reports."""
    reading, writing = os.pipe()
    supervisor = os.getpid()
    # A signal that is meant for the supervisor must not run its handlers in the copy.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_copy(supervisor, mask, listener, writing, code, serve)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(writing)
    return reading


def _run_copy(
    supervisor: int,
    mask: set[signal.Signals | int],
    listener: socket.socket,
    report: int,
    code: LoadedCode,
    serve: Serve,
) -> NoReturn:
    status = 1
    try:
        end_with_parent(signal.SIGKILL)
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in inherited_fds():
            if fd not in (listener.fileno(), report):
                os.close(fd)  # of the supervisor, and those on which it hears from other copies
        if os.getppid() == supervisor:
            status = wait_and_serve(listener, report, code, serve)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Not sys.exit: what the supervisor does at its end is not the copy's to do.
        sys.stderr.flush()
        os._exit(status)


def command(socket_path: str | None, idle_s: float) -> list[str]:
    """The command line that runs this program.

    Args:
        socket_path: where to listen; None for a socket that is passed (sd_listen_fds(3)).
        idle_s: end after so many seconds without a request; 0 is never.
    """
    # -P: nothing is to be imported from whatever directory we are started in.
    return [sys.executable, "-P", "-m", "unionfs.fuse_ops.session.supervisor.daemon", socket_path or "-", str(idle_s)]


def main(socket_path: str | None, idle_s: float) -> int:
    """Run the supervisor as :func:`command` says and return its exit status."""
    open_standard_fds()
    signal.signal(signal.SIGTERM, _end)
    try:
        end = _listen_and_supervise(socket_path, idle_s)
    except UnionfsError as error:
        print(f"unionfs: {error}".replace("\n", "\\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if end is End.STALE:
        # The same process with the new code. Whoever asks before it listens again starts a server by himself.
        os.execv(sys.executable, command(socket_path, idle_s))
    return 0


def _listen_and_supervise(socket_path: str | None, idle_s: float) -> End:
    passed = sockets.passed()
    if passed is None and socket_path is None:
        raise ListenError("no socket is passed and none is named; see unionfs serve supervisor --help")
    import logging.handlers  # what a server imports only once it needs it

    _ = logging.handlers
    # A signal that ends us may come meanwhile, and the mount that is rehearsed takes it for its own.
    if not rehearse(serve_in_copy):
        raise MountError("cannot rehearse a mount, so no server can be kept ready; mounts work without")
    if passed is not None:
        end = supervise(passed.socket, serve_in_copy, idle_s=idle_s)
        if end is End.STALE:
            sockets.pass_on(passed)
        return end
    assert socket_path is not None
    with closing(sockets.listen(socket_path, private=True)) as listener:
        return supervise(listener.socket, serve_in_copy, idle_s=idle_s)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    _path, _idle_s = sys.argv[1:]
    sys.exit(main(None if _path == "-" else _path, float(_idle_s)))
