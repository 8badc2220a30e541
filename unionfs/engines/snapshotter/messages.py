"""The messages of ``containerd.services.snapshots.v1`` and their way to and from the contract's types.

The table below has the names, numbers and types of containerd's ``snapshots.proto`` and ``mount.proto``. The messages
are made from it at run time: generated code works with few versions of protobuf only, and says less.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, field_mask_pb2, message_factory, timestamp_pb2

from unionfs.engines.snapshotter.contract import Info, Kind, Mount

PACKAGE = "containerd.services.snapshots.v1"
SERVICE = f"{PACKAGE}.Snapshots"

_NS_PER_S = 10**9

_MOUNT = {"type": (1, "string"), "source": (2, "string"), "target": (3, "string"), "options": (4, "repeated string")}
_NEW = {
    "snapshotter": (1, "string"),
    "key": (2, "string"),
    "parent": (3, "string"),
    "labels": (4, "map<string, string>"),
}
_KEY = {"snapshotter": (1, "string"), "key": (2, "string")}
_MOUNTS = {"mounts": (1, "repeated containerd.types.Mount")}
_INFO = {"info": (1, "Info")}
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "PrepareSnapshotRequest": _NEW,
    "PrepareSnapshotResponse": _MOUNTS,
    "ViewSnapshotRequest": _NEW,
    "ViewSnapshotResponse": _MOUNTS,
    "MountsRequest": _KEY,
    "MountsResponse": _MOUNTS,
    "RemoveSnapshotRequest": _KEY,
    "CommitSnapshotRequest": {
        "snapshotter": (1, "string"),
        "name": (2, "string"),
        "key": (3, "string"),
        "labels": (4, "map<string, string>"),
        "parent": (5, "string"),  # containerd 2.2, for snapshotters with the capability "rebase"
    },
    "StatSnapshotRequest": _KEY,
    "StatSnapshotResponse": _INFO,
    "Info": {
        "name": (1, "string"),
        "parent": (2, "string"),
        "kind": (3, "Kind"),
        "created_at": (4, "google.protobuf.Timestamp"),
        "updated_at": (5, "google.protobuf.Timestamp"),
        "labels": (6, "map<string, string>"),
    },
    "UpdateSnapshotRequest": {
        "snapshotter": (1, "string"),
        "info": (2, "Info"),
        "update_mask": (3, "google.protobuf.FieldMask"),
    },
    "UpdateSnapshotResponse": _INFO,
    "ListSnapshotsRequest": {"snapshotter": (1, "string"), "filters": (2, "repeated string")},
    "ListSnapshotsResponse": {"info": (1, "repeated Info")},
    "UsageRequest": _KEY,
    "UsageResponse": {"size": (1, "int64"), "inodes": (2, "int64")},
    "CleanupRequest": {"snapshotter": (1, "string")},
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": _Field.TYPE_STRING, "int64": _Field.TYPE_INT64}


def message_class(name: str) -> Any:
    """The class of a message, such as ``MountsRequest``."""
    descriptor = _POOL.FindMessageTypeByName(f"{PACKAGE}.{name}")
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    old: Any = message_factory.MessageFactory(_POOL)  # before protobuf 4.22, which is what Debian has
    return old.GetPrototype(descriptor)


def _add_message(file: descriptor_pb2.FileDescriptorProto, name: str, fields: dict[str, tuple[int, str]]) -> None:
    message = file.message_type.add(name=name)
    for field_name, (number, written) in fields.items():
        kind = written.removeprefix("repeated ")
        field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
        if kind.startswith("map<"):
            # What protoc makes of a map: repeated messages of a type of their own.
            entry = message.nested_type.add(name=f"{field_name.capitalize()}Entry")
            entry.options.map_entry = True
            for at, part in enumerate(("key", "value"), 1):
                entry.field.add(name=part, number=at, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
            kind = f"{name}.{entry.name}"
        if written.startswith(("repeated ", "map<")):
            field.label = _Field.LABEL_REPEATED
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
            continue
        field.type = _Field.TYPE_ENUM if kind == "Kind" else _Field.TYPE_MESSAGE
        known_elsewhere = kind.startswith(("google.", "containerd."))
        field.type_name = f".{kind}" if known_elsewhere else f".{file.package}.{kind}"


def _make_pool() -> descriptor_pool.DescriptorPool:
    # One of our own: another package in this process may have generated classes of the same names.
    pool = descriptor_pool.DescriptorPool()
    known = (timestamp_pb2.DESCRIPTOR, field_mask_pb2.DESCRIPTOR)
    for descriptor in known:
        pool.AddSerializedFile(descriptor.serialized_pb)
    types = descriptor_pb2.FileDescriptorProto(name="mount.proto", package="containerd.types", syntax="proto3")
    _add_message(types, "Mount", _MOUNT)
    pool.AddSerializedFile(types.SerializeToString())
    file = descriptor_pb2.FileDescriptorProto(name="snapshots.proto", package=PACKAGE, syntax="proto3")
    file.dependency.extend([*(descriptor.name for descriptor in known), types.name])
    kinds = file.enum_type.add(name="Kind")
    kinds.value.add(name="UNKNOWN", number=0)
    for kind in Kind:
        kinds.value.add(name=kind.name, number=int(kind))
    for name, fields in _MESSAGES.items():
        _add_message(file, name, fields)
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _make_pool()


def put_mounts(response: Any, mounts: tuple[Mount, ...]) -> None:
    """Write ``mounts`` into a response that has such a field."""
    for mount in mounts:
        response.mounts.add(type=mount.type, source=mount.source, options=mount.options)


def get_mounts(response: Any) -> tuple[Mount, ...]:
    """What :func:`put_mounts` wrote."""
    return tuple(Mount(type=mount.type, source=mount.source, options=tuple(mount.options)) for mount in response.mounts)


def put_info(message: Any, info: Info) -> None:
    """Write ``info`` into a message of type ``Info``."""
    message.name = info.name
    message.parent = info.parent
    message.kind = int(info.kind)
    for field, at_ns in ((message.created_at, info.created_ns), (message.updated_at, info.updated_ns)):
        field.seconds, field.nanos = divmod(at_ns, _NS_PER_S)
    message.labels.update(info.labels)


def get_info(message: Any) -> Info:
    """What :func:`put_info` wrote."""
    return Info(
        name=message.name,
        parent=message.parent,
        kind=Kind(message.kind),
        created_ns=message.created_at.seconds * _NS_PER_S + message.created_at.nanos,
        updated_ns=message.updated_at.seconds * _NS_PER_S + message.updated_at.nanos,
        labels=dict(message.labels),
    )
