"""A client of the snapshots service: a `Snapshotter` whose calls go through gRPC, as containerd's do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import empty_pb2

from unionfs.engines.snapshotter.contract import Info, Mount, Usage
from unionfs.engines.snapshotter.messages import SERVICE, get_info, get_mounts, message_class
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotStateError,
    SnapshotterError,
)

NAME = "unionfs"
_ERRORS = {
    grpc.StatusCode.NOT_FOUND: SnapshotNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: SnapshotExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: SnapshotStateError,
    grpc.StatusCode.INVALID_ARGUMENT: SnapshotArgumentError,
}
_CALL_S = 60.0


class SnapshotterClient:
    """A `Snapshotter` at the other end of a unix socket; with a namespace, containerd's own over ours."""

    def __init__(self, socket: str, namespace: str = "") -> None:
        self._metadata = (("containerd-namespace", namespace),) if namespace else ()
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self.messages = 0
        """How many pieces the last list came in."""

    def _call(self, method: str, request: str, response: Any, **fields: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=message_class(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return call(message_class(request)(snapshotter=NAME, **fields), timeout=_CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _told(error) from None

    def stat(self, key: str) -> Info:
        """See `Snapshotter`."""
        response = self._call("Stat", "StatSnapshotRequest", message_class("StatSnapshotResponse"), key=key)
        return get_info(response.info)

    def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] = ()) -> Info:
        """See `Snapshotter`."""
        info = message_class("Info")(name=name, parent="not looked at", labels=labels)
        mask = message_class("UpdateSnapshotRequest")().update_mask
        mask.paths.extend(fields)
        words: dict[str, Any] = {"info": info, "update_mask": mask}
        response = self._call("Update", "UpdateSnapshotRequest", message_class("UpdateSnapshotResponse"), **words)
        return get_info(response.info)

    def usage(self, key: str) -> Usage:
        """See `Snapshotter`."""
        response = self._call("Usage", "UsageRequest", message_class("UsageResponse"), key=key)
        return Usage(response.size, response.inodes)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """See `Snapshotter`."""
        return get_mounts(self._call("Mounts", "MountsRequest", message_class("MountsResponse"), key=key))

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter`."""
        fields = {"key": key, "parent": parent, "labels": labels or {}}
        return get_mounts(
            self._call("Prepare", "PrepareSnapshotRequest", message_class("PrepareSnapshotResponse"), **fields)
        )

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See `Snapshotter`."""
        fields = {"key": key, "parent": parent, "labels": labels or {}}
        return get_mounts(self._call("View", "ViewSnapshotRequest", message_class("ViewSnapshotResponse"), **fields))

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        """See `Snapshotter`; ``parent`` is what containerd 2.2 may send."""
        fields = {"name": name, "key": key, "labels": labels or {}, "parent": parent}
        self._call("Commit", "CommitSnapshotRequest", empty_pb2.Empty, **fields)

    def remove(self, key: str) -> None:
        """See `Snapshotter`."""
        self._call("Remove", "RemoveSnapshotRequest", empty_pb2.Empty, key=key)

    def walk(self, filters: Sequence[str] = ()) -> list[Info]:
        """See `Snapshotter`."""
        call = self._channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=message_class("ListSnapshotsRequest").SerializeToString,
            response_deserializer=message_class("ListSnapshotsResponse").FromString,
        )
        request = message_class("ListSnapshotsRequest")(snapshotter=NAME, filters=filters)
        try:
            pieces = list(call(request, timeout=_CALL_S, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _told(error) from None
        self.messages = len(pieces)
        return [get_info(info) for piece in pieces for info in piece.info]

    def cleanup(self) -> None:
        """See `Snapshotter`."""
        self._call("Cleanup", "CleanupRequest", empty_pb2.Empty)

    def close(self) -> None:
        """Close the connection; the service goes on."""
        self._channel.close()


def _told(error: grpc.RpcError) -> SnapshotterError:
    assert isinstance(error, grpc.Call)
    return _ERRORS.get(error.code(), SnapshotterError)(str(error.details()))
