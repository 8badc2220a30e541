"""Which names a layer may have in a driver's home."""

from __future__ import annotations

from unionfs.errors import DriverError

REMOVING = "-removing"
"""Ends the name of a directory that is being deleted, and is deleted on when a driver finds it at start-up."""

CREATING = "-creating"
"""Ends the name of a directory that is not complete yet, and is deleted when a driver finds it at start-up."""

# ``l`` and the block device are overlay2's; ``tmp`` and ``dir`` are kept for layouts with room for more.
_RESERVED = frozenset({".", "..", "l", "tmp", "dir", "backingFsBlockDev"})

# NAME_MAX is 255, and a name grows by a random part and one of the endings above.
_MAX_BYTES = 220


def is_layer_id(name: str) -> bool:
    """Whether ``name`` may be a layer's."""
    return fault_of(name) is None


def check_layer_id(layer_id: str, doing: str) -> None:
    """Raise :class:`DriverError` unless ``layer_id`` may be a layer's; ``doing`` is the verb for the message."""
    fault = fault_of(layer_id)
    if fault is not None:
        raise DriverError(
            f"cannot {doing} layer {layer_id!r}: the id {fault}; use a name such as 64 hexadecimal digits"
        )


def fault_of(layer_id: str) -> str | None:
    """What is wrong with ``layer_id``, or None."""
    if not layer_id:
        return "is empty"
    if "/" in layer_id or "\0" in layer_id:
        return "has a slash or a NUL in it"
    if layer_id in _RESERVED or layer_id.endswith((REMOVING, CREATING)):
        return "is one that the driver uses itself"
    if len(layer_id.encode("utf-8", "surrogateescape")) > _MAX_BYTES:
        return f"is longer than {_MAX_BYTES} bytes"
    return None
