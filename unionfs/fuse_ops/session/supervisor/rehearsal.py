"""A mount that does not happen: what a server does for the first time takes three times as long as for the second.

Python has to find out which instructions it can specialise, and a forked process has to copy every page that it
writes to, reference counts among them. A rehearsal does that while nobody waits for it. The whole way is gone, from
the words of the command line to the first listing, with a socket in the place of /dev/fuse at whose other end the
first requests of a kernel are waiting; only mount(2) is left out, an upper directory, and the file of the record.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Sequence
from typing import Final

from unionfs.fuse_ops.options import parse_options
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.host import mountinfo
from unionfs.host.daemon import Ready
from unionfs.host.processes import process_start

_ROOT: Final = 1  # the node of the root directory
_HANDLE: Final = 1  # the first that a server gives
_PAGE_BYTES: Final = 4096


class _CurtainError(BaseException):
    """Ends the rehearsal once the server is ready; not an Exception, which the server would explain to a person."""


def rehearse(serve: Callable[[Sequence[str], Ready], int]) -> bool:
    """Serve a directory to nobody, with ``serve`` (:data:`unionfs.fuse_ops.session.supervisor.worker.Serve`).

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
        mountinfo.top_mount(mountinfo.canonical(directory))
        _record().to_json()
        words = ["-o", f"lowerdir={directory}:{directory},transport=direct", "rehearsal", f"/dev/fd/{theirs.detach()}"]
        serve(words, _end)
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
