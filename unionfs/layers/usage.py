"""What the layers and containers of a store take on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unionfs.layers.gc import disk_usage
from unionfs.layers.identity import ChainID
from unionfs.layers.store import LayerStore


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes on the disk.

    Attributes:
        layers: of each layer's own files, by chain id.
        containers: of each container's own files, by name.
    """

    layers: dict[ChainID, int]
    containers: dict[str, int]


def measure(store: LayerStore, progress: Callable[[int, int], None] = lambda done, total: None) -> Usage:
    """Look at all files. What is counted are blocks, so that a file with holes takes what it has.

    Args:
        store: may be only looked at.
        progress: called with how many trees were measured, and how many there are.
    """
    layers = {chain_id: layer.cache_id for chain_id, layer in store.map().items()}
    containers = {name: mount.record for name, mount in store.rw_layers().items()}
    total = len(layers) + len(containers)
    sizes: dict[ChainID, int] = {}
    for done, (chain_id, tree) in enumerate(layers.items()):
        progress(done, total)
        sizes[chain_id] = disk_usage(store, tree)
    own: dict[str, int] = {}
    for done, (name, record) in enumerate(containers.items(), len(layers)):
        progress(done, total)
        own[name] = disk_usage(store, record.mount_id) + (disk_usage(store, record.init_id) if record.init_id else 0)
    return Usage(sizes, own)
