"""The forked copy: it waits for one request, becomes like whoever sent it, and serves that mount to its end."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from unionfs.fuse_ops.session.supervisor import wire
from unionfs.fuse_ops.session.supervisor.caller import Identity, examine
from unionfs.fuse_ops.session.supervisor.rehearsal import rehearse
from unionfs.fuse_ops.session.supervisor.wire import DeclinedError, LoadedCode
from unionfs.host.daemon import Ready, open_null, release_caller
from unionfs.host.process_title import set_title
from unionfs.host.syscalls import end_with_parent

Serve = Callable[[Sequence[str], Ready], int]
"""Mounts as the words of unionfs-mount say, calls its second argument when the mount can be used, and serves it.

What goes wrong before is said on stderr; returns the exit status. Raises DeclinedError, before it has done or said
anything, for words with which the program does something else.
"""

BUSY: Final = b"b"
STALE: Final = b"s"
"""What a worker tells the supervisor: it has a request, so another copy is needed; its code is out of date."""

_REQUEST_WITHIN_S: Final = 10.0


def run(listener: socket.socket, report: int, code: LoadedCode, serve: Serve) -> int:
    """Wait for one caller and serve his mount; returns this process' exit status.

    Args:
        listener: the supervisor's socket, shared by all copies that wait.
        report: a pipe to the supervisor.
        code: what was loaded before the fork.
        serve: the mount program's way to serve.
    """
    supervisor = os.getppid()
    ours = Identity.of(os.getpid())
    if not select.select([listener], [], [], 0)[0]:
        _rehearse_asking(ours)
        code.is_current()
        rehearse(serve)
    connection, _ = listener.accept()
    os.write(report, BUSY)
    end_with_parent(0)
    if os.getppid() != supervisor:
        return 1  # it ended before; nobody has been promised anything
    listener.close()
    with connection:
        try:
            request = _become_like_caller(connection, ours)
            if not code.is_current():
                os.write(report, STALE)
                _answer(connection, wire.DECLINED)
                return 1
            os.close(report)
            connection.sendall(wire.TAKEN)
            if connection.recv(1) != wire.GO:
                return 1
            connection.settimeout(None)
            return _serve(connection, request, serve)
        except (DeclinedError, ValueError) as error:
            _answer(connection, wire.DECLINED)
            # For whoever looks for the reason with strace: there is nobody to tell it to.
            sys.audit("unionfs.supervisor.declined", str(error))
            return 1
        except OSError:
            return 1  # the caller is gone, or sent something else


def _become_like_caller(connection: socket.socket, ours: Identity) -> wire.Request:
    connection.settimeout(_REQUEST_WITHIN_S)
    request, stdio = _receive(connection)
    examine(connection, request.namespaces, ours).become()
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
        os.close(fd)
    _set_environment(request.environment)
    sys.argv = [request.argv[0] if request.argv else "", *request.words]
    set_title("unionfs-mount", request.argv, request.environment)
    return request


def _set_environment(wanted: Mapping[bytes, bytes]) -> None:
    # Most variables are the same for all who are logged in, and each change is a call of setenv(3).
    present = dict(os.environb)
    for name in present.keys() - wanted.keys():
        del os.environb[name]
    for name, value in wanted.items():
        if present.get(name) != value:
            os.environb[name] = value


def _rehearse_asking(ours: Identity) -> None:
    """Take a request of this process' own, and become what it is already."""
    request = wire.Request(sys.orig_argv, 0, os.environb, wire.own_namespaces())
    asking, asked = socket.socketpair()
    with asking, asked:
        for end in (asking, asked):
            end.setblocking(False)  # nobody would read, or send, the rest of an environment that is too long
        try:
            socket.send_fds(asking, [request.pack()], [asking.fileno()] * 3)
            received, fds = _receive(asked)
            for fd in fds:
                os.close(fd)
            examine(asked, received.namespaces, ours).become()
            _set_environment(received.environment)
            with open("/proc/self/comm", encoding="utf-8", errors="surrogateescape") as file:
                set_title(file.read().rstrip("\n"), received.argv, received.environment)
        except (DeclinedError, ValueError, OSError):
            pass  # whoever asks will be declined too, and a rehearsal is worth nothing then


def _receive(connection: socket.socket) -> tuple[wire.Request, list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    # A descriptor that stood in the place of a standard one would be overwritten before it is used.
    if len(fds) != 3 or min(fds) <= 2:
        raise DeclinedError("the standard descriptors are missing")
    while len(data) < wire.LENGTH_BYTES:
        data += _more(connection)
    length = wire.LENGTH_BYTES + int.from_bytes(data[: wire.LENGTH_BYTES], sys.byteorder)
    if length > wire.MAX_REQUEST_BYTES:
        raise DeclinedError("the request is too long")
    blocks = [data]
    missing = length - len(data)
    while missing > 0:
        blocks.append(_more(connection))
        missing -= len(blocks[-1])
    return wire.Request.unpack(b"".join(blocks)[wire.LENGTH_BYTES : length]), fds


def _more(connection: socket.socket) -> bytes:
    block = connection.recv(1 << 16)
    if not block:
        raise ConnectionResetError("the caller is gone")
    return block


def _serve(connection: socket.socket, request: wire.Request, serve: Serve) -> int:
    null = open_null()

    def ready() -> None:
        release_caller(null)
        # Fails when the caller was killed while it waited: then nobody knows of the mount, and it must end.
        connection.sendall(wire.READY)
        connection.close()

    status = serve(request.words, ready)
    sys.stderr.flush()
    if status != 0:
        _answer(connection, wire.FAILED)  # a mount that was ready has no connection any more
    return status


def _answer(connection: socket.socket, answer: bytes) -> None:
    try:
        connection.sendall(answer)
    except OSError:
        pass
