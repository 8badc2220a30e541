"""The forked copy: it rehearses, waits for one request, becomes like whoever sent it, and serves that mount to its end.

The rehearsal is a mount that does not happen: what a server does for the first time takes three times as long as for
the second. Python has to find out which instructions it can specialise, and a forked process has to copy every page
that it writes to, reference counts among them. A rehearsal does that while nobody waits for it. The whole way is gone,
from the arguments to the first listing, with a socket in the place of /dev/fuse at whose other end the first requests
of a kernel are waiting; only mount(2) is left out, an upper directory, and the file of the record.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.session.option_text import parse_options
from unionfs.fuse_ops.session.supervisor import client
from unionfs.fuse_ops.session.supervisor.caller import Identity, examine
from unionfs.fuse_ops.session.supervisor.client import DeclinedError
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.host import mounts
from unionfs.host.daemon import Ready, open_null, release_caller
from unionfs.host.processes import process_start, set_title
from unionfs.host.syscalls import end_with_parent

Serve = Callable[[Sequence[str], Ready], int]
"""Mounts as the arguments of unionfs-mount say, calls its second argument when the mount can be used, and serves it.

What goes wrong before is said on stderr; returns the exit status. Raises DeclinedError, before it has done or said
anything, for arguments with which the program does something else.
"""

BUSY: Final = b"b"
STALE: Final = b"s"
"""What a worker tells the supervisor: it has a request, so another copy is needed; its code is out of date."""

_REQUEST_WITHIN_S: Final = 10.0

_ROOT: Final = 1  # the node of the root directory
_HANDLE: Final = 1  # the first that a server gives
_PAGE_BYTES: Final = 4096


class LoadedCode:
    """The files of our package, and of trio's first module, as they were when this was made.

    A server must never be a mixture: it imports some modules only when they are needed.
    """

    def __init__(self) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] in ("unionfs", "__main__")]
        files = {getattr(sys.modules[name], "__file__", None) for name in [*names, "trio"] if name in sys.modules}
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


def wait_and_serve(listener: socket.socket, report: int, code: LoadedCode, serve: Serve) -> int:
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
                _answer(connection, client.DECLINED)
                return 1
            os.close(report)
            connection.sendall(client.TAKEN)
            if connection.recv(1) != client.GO:
                return 1
            connection.settimeout(None)
            return _serve(connection, request, serve)
        except (DeclinedError, ValueError) as error:
            _answer(connection, client.DECLINED)
            # For whoever looks for the reason with strace: there is nobody to tell it to.
            sys.audit("unionfs.supervisor.declined", str(error))
            return 1
        except OSError:
            return 1  # the caller is gone, or sent something else


def _become_like_caller(connection: socket.socket, ours: Identity) -> client.Request:
    connection.settimeout(_REQUEST_WITHIN_S)
    request, stdio = _receive(connection)
    examine(connection, request.namespaces, ours).become()
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
        os.close(fd)
    _set_environment(request.environment)
    sys.argv = [request.argv[0] if request.argv else "", *request.arguments]
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
    request = client.Request(sys.orig_argv, 0, os.environb, client.own_namespaces())
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


def _receive(connection: socket.socket) -> tuple[client.Request, list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    # A descriptor that stood in the place of a standard one would be overwritten before it is used.
    if len(fds) != 3 or min(fds) <= 2:
        raise DeclinedError("the standard descriptors are missing")
    while len(data) < client.LENGTH_BYTES:
        data += _more(connection)
    length = client.LENGTH_BYTES + int.from_bytes(data[: client.LENGTH_BYTES], sys.byteorder)
    if length > client.MAX_REQUEST_BYTES:
        raise DeclinedError("the request is too long")
    blocks = [data]
    missing = length - len(data)
    while missing > 0:
        blocks.append(_more(connection))
        missing -= len(blocks[-1])
    return client.Request.unpack(b"".join(blocks)[client.LENGTH_BYTES : length]), fds


def _more(connection: socket.socket) -> bytes:
    block = connection.recv(1 << 16)
    if not block:
        raise ConnectionResetError("the caller is gone")
    return block


def _serve(connection: socket.socket, request: client.Request, serve: Serve) -> int:
    null = open_null()

    def ready() -> None:
        release_caller(null)
        # Fails when the caller was killed while it waited: then nobody knows of the mount, and it must end.
        connection.sendall(client.READY)
        connection.close()

    status = serve(request.arguments, ready)
    sys.stderr.flush()
    if status != 0:
        _answer(connection, client.FAILED)  # a mount that was ready has no connection any more
    return status


def _answer(connection: socket.socket, answer: bytes) -> None:
    try:
        connection.sendall(answer)
    except OSError:
        pass


class _CurtainError(BaseException):
    """Ends the rehearsal once the server is ready; not an Exception, which the server would explain to a person."""


def rehearse(serve: Serve) -> bool:
    """Serve a directory to nobody, with ``serve``.

    Returns whether it went as far as the first listing; when it did not, a mount only takes longer. The limit of open
    files and the umask are as before.
    """
    limits, umask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    ended = False
    try:
        for request in _first_requests():
            ours.send(request)
        directory = os.path.dirname(os.path.abspath(__file__))
        # What is not on the way of such a mount. These paths need not exist, and no sign in them is special.
        parse_options(["lowerdir=/lower:/lower,upperdir=/upper,workdir=/work"])
        mounts.top_mount(mounts.canonical(directory))
        _record().to_json()
        arguments = [
            "-o",
            f"lowerdir={directory}:{directory},transport=direct",
            "rehearsal",
            f"/dev/fd/{theirs.detach()}",
        ]
        serve(arguments, _end)
    except BaseExceptionGroup as group:
        ended = group.subgroup(_CurtainError) is not None
    except _CurtainError:
        ended = True
    finally:
        answers = _answers(ours)
        ours.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.umask(umask)
    # ENOSYS tells the kernel not to ask such things at all.
    return ended and len(answers) == len(_first_requests()) and not set(answers) - {0, errno.ENOSYS}


def _end() -> None:
    raise _CurtainError


def _record() -> mount_registry.MountRecord:
    pid = os.getpid()
    return mount_registry.MountRecord(
        minor=0,
        target="rehearsal",
        pid=pid,
        started=process_start(pid) or 0,
        mounted_at=0,
        source="rehearsal",
        lowerdirs=["lower"],
        datadirs=[],
        upperdir=None,
        workdir=None,
        options=[],
    )


def _answers(kernel: socket.socket) -> list[int]:
    """The errno of every answer, 0 for success."""
    errors = []
    try:
        while answer := kernel.recv(p.OUT_HEADER.size):
            errors.append(-p.OUT_HEADER.unpack(answer)[1])
    except OSError:
        pass
    return errors


def _first_requests() -> list[bytes]:
    flags = p.Init.PARALLEL_DIROPS | p.Init.DO_READDIRPLUS | p.Init.INIT_EXT | p.Init.MAX_PAGES
    # The kernel sends more than our server looks at: struct fuse_init_in has 64 bytes.
    init = p.INIT_IN.pack(p.MAJOR, p.MINOR, 1 << 17, flags, 0).ljust(64, b"\0")
    read = p.READ_IN.pack(_HANDLE, 0, _PAGE_BYTES, 0, 0, 0, 0)
    return [
        _request(2, p.Opcode.INIT, 0, init),
        _request(4, p.Opcode.GETATTR, _ROOT, bytes(16)),
        _request(6, p.Opcode.OPENDIR, _ROOT, p.OPEN_IN.pack(os.O_DIRECTORY, 0)),
        _request(8, p.Opcode.READDIRPLUS, _ROOT, read),
        _request(10, p.Opcode.RELEASEDIR, _ROOT, p.READ_IN.pack(_HANDLE, 0, 0, 0, 0, 0, 0)[:24]),
        _request(12, p.Opcode.STATFS, _ROOT, b""),
    ]


def _request(unique: int, code: p.Opcode, node: int, body: bytes) -> bytes:
    length = p.IN_HEADER.size + len(body)
    return p.IN_HEADER.pack(length, code, unique, node, os.getuid(), os.getgid(), os.getpid(), 0, 0) + body
