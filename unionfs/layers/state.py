"""What a layer store knows in memory: plain data, read from its records without what cannot be used."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from unionfs.drivers.contract import Driver
from unionfs.errors import MetadataError, UnionfsError
from unionfs.layers.identity import INIT_SUFFIX, ChainID, DiffID, extend_chain
from unionfs.layers.metadata import LayerRecord, MetadataStore, MountRecord, Unreadable

_log = logging.getLogger(__name__)

_LAYER_ADVICE = "run unionfs fsck, or register the layer again"


@dataclass(eq=False, slots=True)
class StoredLayer:
    """A layer in the store's memory; the lock of :class:`unionfs.layers.references.ReferenceTable` guards the counts.

    Attributes:
        references: handles that are out; they compare by identity.
        reference_count: those, and the layers and read-write layers directly above, and what is being made.
    """

    chain_id: ChainID
    record: LayerRecord
    parent: StoredLayer | None
    reference_count: int = 0
    references: set[object] = field(default_factory=set)

    def chain(self) -> Iterator[StoredLayer]:
        """This layer and all below it, top first."""
        layer: StoredLayer | None = self
        while layer is not None:
            yield layer
            layer = layer.parent

    def depth(self) -> int:
        """How many layers the chain has, 1 for a base layer."""
        return sum(1 for _ in self.chain())

    def chain_size(self) -> int:
        """Bytes in all layers of the chain."""
        return sum(layer.record.size for layer in self.chain())


@dataclass(frozen=True, slots=True)
class LayerMetadata:
    """What is told about a layer that was removed.

    Attributes:
        chain_id, diff_id: its names.
        size: bytes of the layer and all below it.
        diff_size: bytes of the layer's own.
    """

    chain_id: ChainID
    diff_id: DiffID
    size: int
    diff_size: int


def metadata_of(stored: StoredLayer) -> LayerMetadata:
    """The description of a layer."""
    return LayerMetadata(stored.chain_id, stored.record.diff_id, stored.chain_size(), stored.record.size)


@dataclass(eq=False, slots=True)
class StoredMount:
    """A read-write layer in the store's memory; the lock of its name guards it.

    Attributes:
        references: handles that are out; they compare by identity.
        mounts: how often this process has it mounted.
    """

    name: str
    record: MountRecord
    parent: StoredLayer | None
    references: set[object] = field(default_factory=set)
    mounts: int = 0

    @property
    def driver_parent(self) -> str:
        """What the driver compares the tree with: the init layer hides what it put there."""
        if self.record.init_id:
            return self.record.init_id
        return self.parent.record.cache_id if self.parent is not None else ""


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
    for chain_id in loader.layer_records:
        try:
            loader.layer(chain_id)
        except (MetadataError, OSError) as error:
            if chain_id in records.list_layers():  # or else another process has removed it since, and this is a look
                loader.cannot_use("layer", chain_id, error)
    for name in loader.mount_records:
        try:
            loader.mount(name)
        except (MetadataError, OSError) as error:
            if name in records.list_mounts():
                loader.cannot_use("mount", name, error)
    for stray in records.strays():
        _log.info("%s", stray.reason)
        loader.loaded.unreadable.append(stray)
    return loader.loaded


class _Loader:
    def __init__(self, records: MetadataStore, driver: Driver) -> None:
        self._records = records
        self._driver = driver
        self.loaded = Loaded()
        self.layer_records: dict[ChainID, LayerRecord | Exception] = {}
        self.mount_records: dict[str, MountRecord | Exception] = {}
        for chain_id in records.list_layers():
            try:
                self.layer_records[chain_id] = records.layer(chain_id)
            except (MetadataError, OSError) as error:
                self.layer_records[chain_id] = error
        for name in records.list_mounts():
            try:
                self.mount_records[name] = records.mount(name)
            except (MetadataError, OSError) as error:
                self.mount_records[name] = error
        named = Counter(one.cache_id for one in self.layer_records.values() if isinstance(one, LayerRecord))
        named.update(one.mount_id for one in self.mount_records.values() if isinstance(one, MountRecord))
        self._shared = {tree for tree, count in named.items() if count > 1}

    def cannot_use(self, kind: str, name: str, error: Exception) -> None:
        _log.info("%s", error)  # who opens the store shows the list
        found = self._records.unreadable(kind, name, str(error))
        self.loaded.unreadable.append(replace(found, shared=not self._shared.isdisjoint(found.trees)))

    def layer(self, chain_id: ChainID) -> StoredLayer:
        """The layer, with all below it; each is loaded once."""
        above: list[tuple[ChainID, LayerRecord]] = []
        parent: StoredLayer | None = None
        wanted = chain_id
        while wanted:
            if (parent := self.loaded.layers.get(wanted)) is not None:
                break
            # No loop can come of this: a chain id that fits its record is the digest of the one below.
            record = self._usable(wanted)
            above.append((wanted, record))
            wanted = record.parent
        for name, record in reversed(above):
            stored = StoredLayer(name, record, parent)
            if parent is not None:
                parent.reference_count += 1
            self.loaded.layers[name] = parent = stored
        assert parent is not None
        return parent

    def _usable(self, chain_id: ChainID) -> LayerRecord:
        record = self.layer_records.get(chain_id)
        if record is None:
            record = self._records.layer(chain_id)  # it came while the others were read, or this says what is missing
        if isinstance(record, Exception):
            raise record
        where = os.path.dirname(self._records.tar_split_path(chain_id))
        if extend_chain(record.parent, record.diff_id) != chain_id:
            raise MetadataError(f"{where}: its diff and parent belong to another layer; {_LAYER_ADVICE}")
        self._check_tree(where, record.cache_id, _LAYER_ADVICE)
        return record

    def mount(self, name: str) -> None:
        """The read-write layer, with all below it."""
        record = self.mount_records[name]
        if isinstance(record, Exception):
            raise record
        for tree in (record.mount_id, record.init_id):
            if tree:
                self._check_tree(f"container {name}", tree, "run unionfs fsck")
        if not record.init_id and self._driver.exists(record.mount_id + INIT_SUFFIX):
            raise MetadataError(
                f"container {name}: has a tree {record.mount_id}{INIT_SUFFIX}, but no file init-id that names it"
            )
        parent = None
        if record.parent:
            parent = self.layer(record.parent)
            parent.reference_count += 1
        elif self._stands_on_something(record.init_id or record.mount_id):
            raise MetadataError(f"container {name}: its tree stands on another one, but no file parent names that")
        self.loaded.mounts[name] = StoredMount(name, record, parent)

    def _check_tree(self, where: str, tree: str, advice: str) -> None:
        if not self._driver.exists(tree):
            raise MetadataError(f"{where}: the {self._driver.name} driver has no tree {tree}; {advice}")
        if tree in self._shared:
            raise MetadataError(f"{where}: names the tree {tree}, as another record does; run unionfs fsck")

    def _stands_on_something(self, tree: str) -> bool:
        try:
            # What Docker's layered drivers tell about a tree with a parent; others do not know.
            return "LowerDir" in self._driver.get_metadata(tree)
        except (UnionfsError, OSError):
            return False
