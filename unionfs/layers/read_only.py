"""The read-only layers of a store: who needs which of them, and how they go when nobody does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from unionfs.errors import LayerDoesNotExistError, LayerNotRetainedError, LayerStoreError, UnionfsError
from unionfs.layers.identity import ChainID
from unionfs.layers.layer import Layer, LayerHandle, LayerMetadata, StoredLayer, metadata_of
from unionfs.layers.trees import Trees

_log = logging.getLogger(__name__)


class ReadOnlyLayers(Trees):
    """The part of a :class:`LayerStore` that has the read-only layers, with their handles and counts."""

    def get(self, chain_id: str) -> LayerHandle:
        """A new handle on a layer, to be released on its own.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        with self._layer_lock:
            return self._handle(self._existing(chain_id))

    def map(self) -> dict[ChainID, Layer]:
        """All layers. These views pin nothing and cannot be released."""
        with self._layer_lock:
            return {chain_id: self.view(stored) for chain_id, stored in self._layers.items()}

    def view(self, stored: StoredLayer) -> Layer:
        """A layer to look at."""
        return Layer(stored, self.driver, self.records)

    def reference_count(self, chain_id: str) -> int:
        """How many handles, layers and read-write layers need a layer directly.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        with self._layer_lock:
            return self._existing(chain_id).reference_count

    def release(self, layer: Layer, *, keep_parents: bool = False) -> list[LayerMetadata]:
        """Give a handle back. Layers that nobody needs any more are removed.

        Args:
            layer: the handle.
            keep_parents: leave the layers below, even if nobody needs them now.

        Returns:
            What was removed, top first; nothing for a handle on a layer that is gone already. What something that
            cannot be read may need stays (:mod:`unionfs.layers.claims`).

        Raises:
            LayerNotRetainedError: ``layer`` is no handle, or was released before.
            DriverError: a tree could not be removed. If it was the layer's own, the handle is good again: release it
                once more when the cause is gone. Otherwise the layer below stays, unreferenced.
        """
        with self._layer_lock:
            stored = self._layers.get(layer.chain_id)
            if stored is None:
                return []
            if layer not in stored.references:
                raise LayerNotRetainedError(
                    f"layer not retained: this handle on {layer.chain_id} was released, or is none; get another one"
                )
            stored.references.discard(layer)
            try:
                return self._unreference(stored, keep_parents)
            except BaseException:
                if self._layers.get(layer.chain_id) is stored:
                    stored.references.add(layer)
                    stored.reference_count += 1
                raise

    def _unreference(self, layer: StoredLayer, keep_parents: bool = False) -> list[LayerMetadata]:
        """Count one down, and remove what that leaves without need. The caller holds the layer lock."""
        removed: list[LayerMetadata] = []
        current: StoredLayer | None = layer
        while current is not None:
            if current.reference_count <= 0:
                _inconsistent(f"layer {current.chain_id} has no reference to give back")
            current.reference_count -= 1
            if current.reference_count or (keep_parents and current is not layer):
                break
            if self.records.read_only:
                break
            if reason := self.claims.why_layer_stays(current.chain_id):
                _log.warning("layer %s stays: %s", current.chain_id, reason)
                break
            if current.references:
                current.reference_count += 1
                _inconsistent(f"layer {current.chain_id} is to be removed, but has handles")
            description = metadata_of(current)
            self._delete(current)
            removed.append(description)
            current = current.parent
        return removed

    def _delete(self, layer: StoredLayer) -> None:
        record = layer.record
        with self._at_work(record.cache_id):
            self._remove_trees(self.records.remove_layer(layer.chain_id), record.cache_id)
        del self._layers[layer.chain_id]

    def _handle(self, stored: StoredLayer) -> LayerHandle:
        handle = LayerHandle(stored, self.driver, self.records, self)
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

    @contextmanager
    def _pinned(self, chain_id: str) -> Iterator[Pin]:
        """Keep a layer while something is made on it; for good when the pin says so at the end."""
        pin = Pin()
        if chain_id:
            with self._layer_lock:
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
        with self._layer_lock:
            if pin.was_unused and pin.layer.reference_count == 1:
                # Nobody had asked for this layer since the start, so nobody has given it up either.
                pin.layer.reference_count = 0
            else:
                self._unreference(pin.layer)


class Pin:
    """A layer that is kept while something is made on it."""

    layer: StoredLayer | None = None
    keep = False
    was_unused = False


def _inconsistent(what: str) -> NoReturn:
    """The counts do not add up: an error in this program. Nothing was removed."""
    raise LayerStoreError(f"internal error: {what}; nothing was removed, please report this")
