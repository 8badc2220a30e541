"""From the records of a store to its layers in memory, without those that cannot be used."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from unionfs.drivers.contract import Driver
from unionfs.errors import MetadataError
from unionfs.layers.identity import ChainID, extend_chain
from unionfs.layers.layer import StoredLayer
from unionfs.layers.metadata import LayerRecord, MetadataStore, Unreadable
from unionfs.layers.rw_layer import StoredMount

_log = logging.getLogger(__name__)

_LAYER_ADVICE = "run unionfs fsck, or register the layer again"


@dataclass(slots=True)
class Loaded:
    """What a store consists of. Layers are counted by the layers and read-write layers above them."""

    layers: dict[ChainID, StoredLayer] = field(default_factory=dict)
    mounts: dict[str, StoredMount] = field(default_factory=dict)
    unreadable: list[Unreadable] = field(default_factory=list)


def load(records: MetadataStore, driver: Driver) -> Loaded:
    """Read everything. What cannot be used is listed with the reason, and logged.

    Raises:
        OSError: the records cannot be listed.
    """
    loader = _Loader(records, driver)
    for chain_id in records.list_layers():
        try:
            loader.layer(chain_id)
        except (MetadataError, OSError) as error:
            loader.cannot_read("layer", chain_id, error)
    for name in records.list_mounts():
        try:
            loader.mount(name)
        except (MetadataError, OSError) as error:
            loader.cannot_read("mount", name, error)
    return loader.loaded


class _Loader:
    def __init__(self, records: MetadataStore, driver: Driver) -> None:
        self._records = records
        self._driver = driver
        self.loaded = Loaded()

    def cannot_read(self, kind: str, name: str, error: Exception) -> None:
        _log.warning("%s", error)
        where = str(error).partition(": ")[0]
        self.loaded.unreadable.append(Unreadable(kind, name, where, str(error)))

    def layer(self, chain_id: ChainID) -> StoredLayer:
        """The layer, with all below it; each is loaded once."""
        above: list[tuple[ChainID, LayerRecord]] = []
        parent: StoredLayer | None = None
        wanted = chain_id
        while wanted:
            if (parent := self.loaded.layers.get(wanted)) is not None:
                break
            # No loop can come of this: a chain id that fits its record is the digest of the one below.
            record = self._readable(wanted)
            above.append((wanted, record))
            wanted = record.parent
        for name, record in reversed(above):
            stored = StoredLayer(name, record, parent)
            if parent is not None:
                parent.reference_count += 1
            self.loaded.layers[name] = parent = stored
        assert parent is not None
        return parent

    def _readable(self, chain_id: ChainID) -> LayerRecord:
        record = self._records.layer(chain_id)
        where = os.path.dirname(self._records.tar_split_path(chain_id))
        if extend_chain(record.parent, record.diff_id) != chain_id:
            raise MetadataError(f"{where}: its diff and parent belong to another layer; {_LAYER_ADVICE}")
        if not self._driver.exists(record.cache_id):
            raise MetadataError(
                f"{where}: the {self._driver.name} driver has no tree {record.cache_id}; {_LAYER_ADVICE}"
            )
        return record

    def mount(self, name: str) -> None:
        """The read-write layer, with all below it."""
        record = self._records.mount(name)
        for tree in (record.mount_id, record.init_id):
            if tree and not self._driver.exists(tree):
                raise MetadataError(f"{name}: the {self._driver.name} driver has no tree {tree}; run unionfs fsck")
        parent = None
        if record.parent:
            parent = self.layer(record.parent)
            parent.reference_count += 1
        self.loaded.mounts[name] = StoredMount(name, record, parent)
