"""The gRPC service ``containerd.services.snapshots.v1.Snapshots`` over a snapshotter, and its server on a unix socket.

Requests name a snapshotter, for servers that have several; containerd has chosen us by our address, so that name is not
looked at.

gRPC for Python binds its addresses itself and takes no socket that is open already, so systemd's socket activation is
not to be had; a service tells systemd when it is ready instead (:mod:`unionfs.cli.serve_snapshotter`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError

from unionfs.engines.snapshotter.contract import Snapshotter
from unionfs.engines.snapshotter.messages import SERVICE, message_class, put_info, put_mounts
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotStateError,
    SnapshotterError,
    UnionfsError,
)
from unionfs.host.sockets import clear_place, file_identity

_log = logging.getLogger(__name__)

# A call occupies a thread from its headers on, before its message has arrived, so there is a thread for each possible
# call (started on demand). The limit for each connection keeps one client from occupying them all.
_CALLS = 512
_CALLS_PER_CONNECTION = 100
_MESSAGE_BYTES = 4 << 20
# containerd takes 16 MiB in a message, others 4 MiB.
_LIST_BYTES = 1 << 20
# How long a client may take to send its message, or to read a list: its call occupies a thread meanwhile.
_STALL_S = 30.0
# Calls that mount wait for a process to start. Twenty containers at once should not wait for each other.
_AT_ONCE = 32
# Characters of an error's text. gRPC sends it in a header of at most 16 KiB, a character as up to 12 bytes.
_ERROR_MAX = 900


_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (SnapshotNotFoundError, grpc.StatusCode.NOT_FOUND),
    (SnapshotExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (SnapshotStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (SnapshotArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
)

Context = grpc.ServicerContext
_Method = Callable[[Any], Any]

REQUESTS = {
    "Prepare": "PrepareSnapshotRequest",
    "View": "ViewSnapshotRequest",
    "Mounts": "MountsRequest",
    "Commit": "CommitSnapshotRequest",
    "Remove": "RemoveSnapshotRequest",
    "Stat": "StatSnapshotRequest",
    "Update": "UpdateSnapshotRequest",
    "List": "ListSnapshotsRequest",
    "Usage": "UsageRequest",
    "Cleanup": "CleanupRequest",
}
"""The service's methods, and the messages that they take."""


def make_handler(snapshotter: Snapshotter) -> grpc.GenericRpcHandler:
    """What a gRPC server is to be given: the service's methods, answered by ``snapshotter``.

    The methods are declared with streams of requests, which look the same on the wire: for a single request, gRPC waits
    without a time limit before it calls the method.
    """
    service = _Service(snapshotter)
    working = threading.BoundedSemaphore(_AT_ONCE)
    handlers: dict[str, Any] = {}
    for name, request in REQUESTS.items():
        call = _Call(name, message_class(request), getattr(service, name.lower()), working)
        if name == "List":
            handlers[name] = grpc.stream_stream_rpc_method_handler(call.answers, response_serializer=_serialized)
        else:
            handlers[name] = grpc.stream_unary_rpc_method_handler(call.answer, response_serializer=_serialized)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class _Service:
    """One method for each of the service's; they raise what the snapshotter raises."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def prepare(self, request: Any) -> Any:
        response = message_class("PrepareSnapshotResponse")()
        put_mounts(response, self._snapshotter.prepare(request.key, request.parent, dict(request.labels)))
        return response

    def view(self, request: Any) -> Any:
        response = message_class("ViewSnapshotResponse")()
        put_mounts(response, self._snapshotter.view(request.key, request.parent, dict(request.labels)))
        return response

    def mounts(self, request: Any) -> Any:
        response = message_class("MountsResponse")()
        put_mounts(response, self._snapshotter.mounts(request.key))
        return response

    def commit(self, request: Any) -> Any:
        if request.parent and request.parent != self._snapshotter.stat(request.key).parent:
            raise SnapshotArgumentError(
                f"snapshot {request.key} cannot get another parent when it is committed; "
                "take 'rebase' out of this plugin's capabilities in containerd's configuration"
            )
        self._snapshotter.commit(request.name, request.key, dict(request.labels))
        return empty_pb2.Empty()

    def remove(self, request: Any) -> Any:
        self._snapshotter.remove(request.key)
        return empty_pb2.Empty()

    def stat(self, request: Any) -> Any:
        response = message_class("StatSnapshotResponse")()
        put_info(response.info, self._snapshotter.stat(request.key))
        return response

    def update(self, request: Any) -> Any:
        info, fields = request.info, list(request.update_mask.paths)
        response = message_class("UpdateSnapshotResponse")()
        put_info(response.info, self._snapshotter.update(info.name, dict(info.labels), fields))
        return response

    def list(self, request: Any) -> list[Any]:
        responses: list[Any] = []
        room = 0
        for info in self._snapshotter.walk(list(request.filters)):
            message = message_class("Info")()
            put_info(message, info)
            size = message.ByteSize()
            if size > room:
                responses.append(message_class("ListSnapshotsResponse")())
                room = _LIST_BYTES
            responses[-1].info.append(message)
            room -= size
        return responses

    def usage(self, request: Any) -> Any:
        usage = self._snapshotter.usage(request.key)
        return message_class("UsageResponse")(size=usage.size_bytes, inodes=usage.inodes)

    def cleanup(self, request: Any) -> Any:
        self._snapshotter.cleanup()
        return empty_pb2.Empty()


class _Call:
    """One of the service's methods as gRPC calls it.

    Args:
        name: of the method.
        request: the class of its message.
        method: answers it.
        working: held while ``method`` runs.
    """

    def __init__(self, name: str, request: Any, method: _Method, working: threading.BoundedSemaphore) -> None:
        self._name = name
        self._request = request
        self._method = method
        self._working = working

    def answer(self, messages: Iterator[bytes], context: Context) -> Any:
        """The one response."""
        with _patience(context):
            sent = next(messages, None)
        return self._answered(sent, context)

    def answers(self, messages: Iterator[bytes], context: Context) -> Iterable[Any]:
        """The responses, one after the other as the client reads them."""
        with _patience(context):
            yield from self._answered(next(messages, None), context)

    def _answered(self, sent: bytes | None, context: Context) -> Any:
        try:
            request = self._decoded(sent)
            with self._working:
                return self._method(request)
        except UnionfsError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
            level = logging.ERROR if code is grpc.StatusCode.UNKNOWN else logging.DEBUG
            _log.log(level, "%s: %s", self._name, error)
            _abort(context, code, str(error))
        except Exception as error:
            text = f"internal error: {type(error).__name__}: {error}"
            debug = _log.isEnabledFor(logging.DEBUG)
            _log.error("%s: %s", self._name, text, exc_info=error if debug else None)
            _abort(context, grpc.StatusCode.INTERNAL, f"{text}; report it")

    def _decoded(self, sent: bytes | None) -> Any:
        with suppress(DecodeError):
            if sent is not None:
                return self._request.FromString(sent)
        raise SnapshotArgumentError(f"{self._name}: the request is no {self._request.DESCRIPTOR.name}")


@contextmanager
def _patience(context: Context) -> Iterator[None]:
    """Cancel the call if the block takes longer than :data:`_STALL_S`."""
    timer = threading.Timer(_STALL_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    if len(text) > _ERROR_MAX:
        text = text[: _ERROR_MAX // 2] + "…" + text[-_ERROR_MAX // 2 :]
    context.abort(code, text)
    raise AssertionError  # abort has raised


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


class SocketServer:
    """Serves one handler until :meth:`stop`.

    Args:
        path: the socket, open to its owner only; one whose server is gone is replaced.
        handler: what it serves.

    Raises:
        ListenError: another server uses the socket, or its path cannot be one.
        SnapshotterError: it cannot be made.
    """

    def __init__(self, path: str, handler: grpc.GenericRpcHandler) -> None:
        self.path = os.path.abspath(path)
        try:
            os.makedirs(os.path.dirname(self.path), 0o711, exist_ok=True)
            clear_place(self.path)
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
        self._made = file_identity(self.path)

    def start(self) -> None:
        """Begin to answer; returns at once."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give those that run ``grace_s`` seconds to end, and remove the socket."""
        self._server.stop(grace_s).wait()
        if self._made is not None and file_identity(self.path) == self._made:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
