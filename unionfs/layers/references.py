"""The read-only layers of a store: who needs which of them, and how they go when nobody does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NoReturn

from unionfs.drivers.contract import Driver
from unionfs.errors import LayerDoesNotExistError, LayerNotRetainedError, LayerStoreError, UnionfsError
from unionfs.layers.claims import Claims
from unionfs.layers.identity import ChainID, extend_chain
from unionfs.layers.layer import Layer, LayerHandle
from unionfs.layers.metadata import LayerRecord, MetadataStore, Removal, Transaction
from unionfs.layers.state import LayerMetadata, StoredLayer, metadata_of
from unionfs.layers.trees import TreeKeeper

_log = logging.getLogger(__name__)


class Pin:
    """A layer that is kept while something is made on it."""

    layer: StoredLayer | None = None
    keep = False
    was_unused = False


class ReferenceTable:
    """The layers, their handles and their counts.

    Its lock guards all of that, and is held while a layer's records are put in place or taken off the list. Trees are
    synced and removed outside of it, so that a large one holds nobody up.

    Args:
        layers: as they were loaded.
        driver, records, keeper, claims: the store's.
    """

    def __init__(
        self,
        layers: dict[ChainID, StoredLayer],
        driver: Driver,
        records: MetadataStore,
        keeper: TreeKeeper,
        claims: Claims,
    ) -> None:
        self._lock = threading.RLock()
        self._layers = layers
        self._driver = driver
        self._records = records
        self._keeper = keeper
        self._claims = claims
        keeper.add_owner(self._trees)

    def _trees(self) -> set[str]:
        with self._lock:
            return {layer.record.cache_id for layer in self._layers.values()}

    # Looking

    def get(self, chain_id: str) -> LayerHandle:
        """See :meth:`LayerStore.get`."""
        with self._lock:
            return self._handle(self._existing(chain_id))

    def find(self, chain_id: ChainID) -> LayerHandle | None:
        """A new handle on a layer; None if there is none of this chain id."""
        with self._lock:
            known = self._layers.get(chain_id)
            return None if known is None else self._handle(known)

    def map(self) -> dict[ChainID, Layer]:
        """See :meth:`LayerStore.map`."""
        with self._lock:
            return {chain_id: self.view(stored) for chain_id, stored in self._layers.items()}

    def view(self, stored: StoredLayer) -> Layer:
        """A layer to look at."""
        return Layer(stored, self._driver, self._records)

    def reference_count(self, chain_id: str) -> int:
        """See :meth:`LayerStore.reference_count`."""
        with self._lock:
            return self._existing(chain_id).reference_count

    def _handle(self, stored: StoredLayer) -> LayerHandle:
        handle = LayerHandle(stored, self._driver, self._records, self.release)
        stored.reference_count += 1
        stored.references.add(handle)
        return handle

    def _existing(self, chain_id: str) -> StoredLayer:
        stored = self._layers.get(ChainID(chain_id))
        if stored is None:
            raise LayerDoesNotExistError(
                f"layer does not exist: {chain_id[:100]}; unionfs layer ls shows those that do"
            )
        return stored

    # Coming

    @contextmanager
    def pinned(self, chain_id: str) -> Iterator[Pin]:
        """Keep a layer while something is made on it; for good when the pin says so at the end.

        Args:
            chain_id: the layer; ``""`` for nothing.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        pin = Pin()
        if chain_id:
            with self._lock:
                pin.layer = self._existing(chain_id)
                pin.was_unused = pin.layer.reference_count == 0
                pin.layer.reference_count += 1
        try:
            yield pin
        except BaseException:
            try:
                self._unpin(pin)
            except (UnionfsError, OSError) as error:
                _log.warning("%s", error)  # the first error is the one to tell
            raise
        else:
            self._unpin(pin)

    def _unpin(self, pin: Pin) -> None:
        if pin.layer is None or pin.keep:
            return
        with self._lock:
            if pin.was_unused and pin.layer.reference_count == 1:
                # The layer had no references before; it does not go when the pin goes.
                pin.layer.reference_count = 0
                return
        self.unreference(pin.layer)

    def add(self, transaction: Transaction, record: LayerRecord, pin: Pin) -> LayerHandle:
        """Commit a layer, and give a handle on it. If there is one of that chain, the handle is on that instead.

        Args:
            transaction: holds the layer's stream, and is still to be cancelled unless the pin is kept afterwards.
            record: what is to be recorded.
            pin: on the layer below; kept when the layer is added.
        """
        chain_id = extend_chain(record.parent, record.diff_id)
        with self._lock:
            synced = chain_id not in self._layers
        if synced:
            self._keeper.sync(record.cache_id)
        with self._lock:
            known = self._layers.get(chain_id)
            if known is None:
                if not synced:  # it was there a moment ago
                    self._keeper.sync(record.cache_id)
                transaction.commit(chain_id, record)
                pin.keep = True
                known = self._layers[chain_id] = StoredLayer(chain_id, record, pin.layer)
                self._claims.drop("layer", chain_id)
            return self._handle(known)

    # Going

    def release(self, layer: Layer, *, keep_parents: bool = False) -> list[LayerMetadata]:
        """See :meth:`LayerStore.release`."""
        with self._lock:
            stored = self._layers.get(layer.chain_id)
            if stored is None:
                return []
            if layer not in stored.references:
                raise LayerNotRetainedError(
                    f"layer not retained: this handle on {layer.chain_id} was released, or is none; get another one"
                )
            stored.references.discard(layer)
        try:
            return self.unreference(stored, keep_parents=keep_parents)
        except BaseException:
            with self._lock:
                if self._layers.get(layer.chain_id) is stored:
                    stored.references.add(layer)
                    stored.reference_count += 1
            raise

    def unreference(self, layer: StoredLayer, *, keep_parents: bool = False, keep: bool = False) -> list[LayerMetadata]:
        """Count one down, and remove what that leaves without need.

        Args:
            layer: who had the reference.
            keep_parents: leave the layers below, even if nobody needs them now.
            keep: leave the layer too.

        Returns:
            What was removed, top first.
        """
        removed: list[LayerMetadata] = []
        current: StoredLayer | None = layer
        while current is not None:
            with ExitStack() as working:
                with self._lock:
                    self._count_down(current)
                    if keep or (keep_parents and current is not layer) or not self._is_useless(current):
                        break
                    description = metadata_of(current)
                    working.enter_context(self._keeper.busy(current.record.cache_id))
                    removal = self._records.remove_layer(current.chain_id)
                    del self._layers[current.chain_id]
                self._keeper.remove(removal, partial(self._put_back, current, removal), current.record.cache_id)
            removed.append(description)
            current = current.parent
        return removed

    def _count_down(self, layer: StoredLayer) -> None:
        if layer.reference_count <= 0:
            _inconsistent(f"layer {layer.chain_id} has no reference to give back")
        layer.reference_count -= 1

    def _is_useless(self, layer: StoredLayer) -> bool:
        if layer.reference_count or self._records.read_only:
            return False
        if layer.references:
            layer.reference_count += 1
            _inconsistent(f"layer {layer.chain_id} is to be removed, but has handles")
        if reason := self._claims.why_layer_stays(layer.chain_id):
            _log.warning("layer %s stays: %s", layer.chain_id, reason)
            return False
        return True

    def _put_back(self, layer: StoredLayer, removal: Removal) -> bool:
        with self._lock:
            if layer.chain_id in self._layers:
                return False  # it was registered again meanwhile
            removal.undo()
            self._layers[layer.chain_id] = layer
            return True


def _inconsistent(what: str) -> NoReturn:
    """The counts do not add up: an error in this program. Nothing was removed."""
    raise LayerStoreError(f"internal error: {what}; nothing was removed, please report this")
