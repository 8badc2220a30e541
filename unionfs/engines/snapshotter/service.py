"""The gRPC service ``containerd.services.snapshots.v1.Snapshots`` over a snapshotter.

Requests name a snapshotter, for servers that have several; containerd has chosen us by our address, so that name is not
looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf import empty_pb2

from unionfs.engines.snapshotter.contract import Snapshotter
from unionfs.engines.snapshotter.messages import SERVICE, message_class, put_info, put_mounts
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotStateError,
    UnionfsError,
)

_log = logging.getLogger(__name__)

# containerd gives 16 MiB to a message; a snapshot with labels is some hundred bytes, at most some thousand.
_INFOS_PER_MESSAGE = 100

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (SnapshotNotFoundError, grpc.StatusCode.NOT_FOUND),
    (SnapshotExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (SnapshotStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (SnapshotArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
)

Context = grpc.ServicerContext
_Unary = Callable[[Any, Context], Any]


def make_handler(snapshotter: Snapshotter) -> grpc.GenericRpcHandler:
    """What a gRPC server is to be given: the service's methods, answered by ``snapshotter``."""
    service = _Service(snapshotter)
    empty = empty_pb2.Empty
    unary: dict[str, tuple[_Unary, str, Any]] = {
        "Prepare": (service.prepare, "PrepareSnapshotRequest", message_class("PrepareSnapshotResponse")),
        "View": (service.view, "ViewSnapshotRequest", message_class("ViewSnapshotResponse")),
        "Mounts": (service.mounts, "MountsRequest", message_class("MountsResponse")),
        "Commit": (service.commit, "CommitSnapshotRequest", empty),
        "Remove": (service.remove, "RemoveSnapshotRequest", empty),
        "Stat": (service.stat, "StatSnapshotRequest", message_class("StatSnapshotResponse")),
        "Update": (service.update, "UpdateSnapshotRequest", message_class("UpdateSnapshotResponse")),
        "Usage": (service.usage, "UsageRequest", message_class("UsageResponse")),
        "Cleanup": (service.cleanup, "CleanupRequest", empty),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _told(name, method),
            request_deserializer=message_class(request).FromString,
            response_serializer=response.SerializeToString,
        )
        for name, (method, request, response) in unary.items()
    }
    handlers["List"] = grpc.unary_stream_rpc_method_handler(
        _told("List", service.list),
        request_deserializer=message_class("ListSnapshotsRequest").FromString,
        response_serializer=message_class("ListSnapshotsResponse").SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


class _Service:
    """One method for each of the service's; they raise what the snapshotter raises."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def prepare(self, request: Any, _: Context) -> Any:
        response = message_class("PrepareSnapshotResponse")()
        put_mounts(response, self._snapshotter.prepare(request.key, request.parent, dict(request.labels)))
        return response

    def view(self, request: Any, _: Context) -> Any:
        response = message_class("ViewSnapshotResponse")()
        put_mounts(response, self._snapshotter.view(request.key, request.parent, dict(request.labels)))
        return response

    def mounts(self, request: Any, _: Context) -> Any:
        response = message_class("MountsResponse")()
        put_mounts(response, self._snapshotter.mounts(request.key))
        return response

    def commit(self, request: Any, _: Context) -> Any:
        if request.parent and request.parent != self._snapshotter.stat(request.key).parent:
            raise SnapshotArgumentError(
                f"snapshot {request.key} cannot get another parent when it is committed; "
                "take 'rebase' out of this plugin's capabilities in containerd's configuration"
            )
        self._snapshotter.commit(request.name, request.key, dict(request.labels))
        return empty_pb2.Empty()

    def remove(self, request: Any, _: Context) -> Any:
        self._snapshotter.remove(request.key)
        return empty_pb2.Empty()

    def stat(self, request: Any, _: Context) -> Any:
        response = message_class("StatSnapshotResponse")()
        put_info(response.info, self._snapshotter.stat(request.key))
        return response

    def update(self, request: Any, _: Context) -> Any:
        info, fields = request.info, list(request.update_mask.paths)
        response = message_class("UpdateSnapshotResponse")()
        put_info(response.info, self._snapshotter.update(info.name, dict(info.labels), fields))
        return response

    def list(self, request: Any, _: Context) -> Iterator[Any]:
        found = self._snapshotter.walk(list(request.filters))
        for at in range(0, len(found), _INFOS_PER_MESSAGE):
            response = message_class("ListSnapshotsResponse")()
            for info in found[at : at + _INFOS_PER_MESSAGE]:
                put_info(response.info.add(), info)
            yield response

    def usage(self, request: Any, _: Context) -> Any:
        usage = self._snapshotter.usage(request.key)
        return message_class("UsageResponse")(size=usage.size_bytes, inodes=usage.inodes)

    def cleanup(self, request: Any, _: Context) -> Any:
        self._snapshotter.cleanup()
        return empty_pb2.Empty()


def _told(name: str, method: _Unary) -> _Unary:
    """``method`` with its errors turned into gRPC's; for a stream it runs when it is made, before it is sent."""

    def answer(request: Any, context: Context) -> Any:
        try:
            result = method(request, context)
            # A generator would raise outside of this block.
            return iter(list(result)) if name == "List" else result
        except UnionfsError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
            if code is grpc.StatusCode.UNKNOWN:
                _log.error("%s: %s", name, error)
            else:
                _log.debug("%s: %s", name, error)
            context.abort(code, str(error))
        except Exception as error:
            _log.exception("%s failed", name)
            context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {error}; report it")

    return answer
