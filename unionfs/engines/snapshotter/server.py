"""A gRPC server on a unix socket.

gRPC for Python binds its addresses itself and takes no socket that is open already, so systemd's socket activation is
not to be had; a service tells systemd when it is ready instead (:mod:`unionfs.cli.serve_snapshotter`).
"""

from __future__ import annotations

import os
import socket
import stat
from concurrent import futures
from contextlib import suppress

import grpc

from unionfs.errors import SnapshotterError

# What clients may take. A call has its thread from its first byte on, so there are as many as there may be calls; they
# are made when they are needed. One client can take a part of them only.
_CALLS = 512
_CALLS_PER_CONNECTION = 100
_MESSAGE_BYTES = 4 << 20
_PATH_MAX_BYTES = 107  # of sockaddr_un, with its final zero


class SocketServer:
    """Serves one handler until :meth:`stop`.

    Args:
        path: the socket, open to its owner only; one whose server is gone is replaced.
        handler: what it serves.

    Raises:
        SnapshotterError: another server uses the socket, or it cannot be made.
    """

    def __init__(self, path: str, handler: grpc.GenericRpcHandler) -> None:
        self.path = os.path.abspath(path)
        if len(os.fsencode(self.path)) > _PATH_MAX_BYTES:
            raise SnapshotterError(f"{self.path}: is longer than a socket's name may be; choose a shorter --socket")
        try:
            os.makedirs(os.path.dirname(self.path), 0o711, exist_ok=True)
            _check_unused(self.path)
        except OSError as error:
            raise SnapshotterError(f"{self.path}: {error.strerror}; choose another --socket") from error
        options = [
            # Two servers on one port, which gRPC allows, are for TCP; here the second would take the socket away.
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", _CALLS_PER_CONNECTION),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
        ]
        pool = futures.ThreadPoolExecutor(_CALLS, thread_name_prefix="snapshotter")
        self._server = grpc.server(pool, options=options, maximum_concurrent_rpcs=_CALLS)
        self._server.add_generic_rpc_handlers((handler,))
        mask = os.umask(0o177)  # containerd is root too; nobody else is to remove snapshots
        try:
            self._server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError as error:
            raise SnapshotterError(f"{self.path}: cannot listen ({error}); choose another --socket") from error
        finally:
            os.umask(mask)
        self._made = _identity(self.path)

    def start(self) -> None:
        """Begin to answer; returns at once."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give those that run ``grace_s`` seconds to end, and remove the socket."""
        self._server.stop(grace_s).wait()
        if self._made is not None and _identity(self.path) == self._made:
            with suppress(FileNotFoundError):
                os.unlink(self.path)


def _check_unused(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SnapshotterError(f"{path}: exists and is no socket; remove it, or choose another --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return  # left by a server that was killed; gRPC replaces it
    raise SnapshotterError(f"{path}: another server answers there; stop it, or choose another --socket")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino
