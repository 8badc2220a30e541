"""Making an image of a container: the image it stands on, with what the container changed as one more layer."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from unionfs.engines.images.model import Image, ImageConfig, Platform
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.store import ImageStore
from unionfs.layers import RWLayer


def commit(
    images: ImageStore,
    container: RWLayer,
    name: Reference,
    *,
    base: Image | None,
    config: ImageConfig | None = None,
    author: str = "",
    message: str = "",
    command: str = "",
) -> Image:
    """Store an image of a container's files.

    A container that changed nothing gives an image of the same layers.

    Args:
        images: where it goes.
        container: may be running; what it writes meanwhile may be in the image or not.
        name: what the image is called.
        base: the image that the container stands on, whose configuration and history go on; None if there is none.
        config: how containers of it are started, where there is no ``base``.
        author, message: for people.
        command: what made the changes, for the history.

    Raises:
        MaxDepthExceededError: the container stands on as many layers as a chain may have.
        OSError: it could not be written.
    """
    layers = images.layers
    below = container.parent
    made = None
    if container.changes():
        with container.tar_stream() as stream:
            made = layers.register(stream, below.chain_id if below is not None else "")
    try:
        made_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        file: dict[str, Any] = json.loads(base.config_bytes) if base is not None else _new_file(config)
        diff_ids = [layer.record.diff_id for layer in below.stored.chain()][::-1] if below is not None else []
        if made is not None:
            diff_ids.append(made.diff_id)
        step: dict[str, object] = {"created": made_at, "created_by": command, "author": author, "comment": message}
        if made is None:
            step["empty_layer"] = True
        file |= {"created": made_at, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        file["history"] = [*_history(file, len(diff_ids) - (made is not None)), {k: v for k, v in step.items() if v}]
        if author:
            file["author"] = author
        # Docker's notes on the container of the last step, which was another one.
        for key in ("container", "container_config", "parent", "id"):
            file.pop(key, None)
        return images.add(json.dumps(file, ensure_ascii=False, separators=(",", ":")).encode(), [name])
    finally:
        if made is not None and layers.reference_count(made.chain_id) > 1:
            layers.release(made, keep_parents=True)


def _new_file(config: ImageConfig | None) -> dict[str, Any]:
    platform = Platform.of_this_machine()
    chosen = (config or ImageConfig.model_validate({})).model_dump(by_alias=True, mode="json", exclude_defaults=True)
    for key in ("ExposedPorts", "Volumes"):  # Go's sets
        if key in chosen:
            chosen[key] = {one: {} for one in chosen[key]}
    return {"os": platform.os, "architecture": platform.architecture, "config": chosen}


def _history(file: dict[str, Any], layers: int) -> list[Any]:
    """The steps so far, which must account for each layer below the new one: others are left out, and these told."""
    steps = file.get("history")
    if isinstance(steps, list):
        told = sum(1 for step in steps if isinstance(step, dict) and not step.get("empty_layer"))
        if told == layers:
            return steps
    return [{"comment": "without history"} for _ in range(layers)]
