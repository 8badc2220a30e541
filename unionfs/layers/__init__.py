"""The layer store: content-addressed, reference-counted layers and exact tar streams.

::

    with open_store("layers") as store, open("layer.tar.gz", "rb") as archive:
        layer = store.register(archive)
        container = store.create_rw_layer("my-container", layer.chain_id)
        with container.mounted() as root:
            print(root)

What is meant for callers is named here; the modules behind are the store's own.
"""

from unionfs.layers.fsck import Problem, fsck
from unionfs.layers.gc import Garbage, collect
from unionfs.layers.identity import ChainID, DiffID, create_chain_id
from unionfs.layers.layer import Layer, LayerHandle
from unionfs.layers.metadata import Descriptor
from unionfs.layers.opening import default_root, open_store
from unionfs.layers.registration import MAX_DEPTH
from unionfs.layers.rw_layers import RWLayer
from unionfs.layers.state import LayerMetadata
from unionfs.layers.store import LayerStore

__all__ = [
    "MAX_DEPTH",
    "ChainID",
    "Descriptor",
    "DiffID",
    "Garbage",
    "Layer",
    "LayerHandle",
    "LayerMetadata",
    "LayerStore",
    "Problem",
    "RWLayer",
    "collect",
    "create_chain_id",
    "default_root",
    "fsck",
    "open_store",
]
