"""The trees of a layer store: who needs them, which are at work just now, and how they come to stay or to go.

Here are also the locks that all parts of a store share. They are taken in this order:

1. a read-write layer's name, for as long as something happens to it: these locks are :class:`ReadWriteLayers`' own;
2. ``_mount_lock``: which read-write layers there are;
3. ``_layer_lock``: which read-only layers there are, their handles and counts, which trees are at work, and what cannot
   be read.

Trees are made, filled and removed outside of 2 and 3, but for those of read-only layers that a release removes. The
locks that a single part has beside these are told there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unionfs.drivers.contract import Driver, ListingDriver, SyncingDriver
from unionfs.errors import LayerStoreError, UnionfsError
from unionfs.layers.claims import Claims
from unionfs.layers.identity import ChainID
from unionfs.layers.layer import StoredLayer
from unionfs.layers.loading import load
from unionfs.layers.metadata import Leftover, MetadataStore, Removal, Unreadable
from unionfs.layers.rw_layer import StoredMount

_log = logging.getLogger(__name__)


class Trees:
    """The part of a :class:`LayerStore` that looks after the driver's trees.

    Args:
        driver: keeps the trees.
        records: keeps what is known about them.

    Raises:
        OSError: the metadata cannot be listed.
    """

    def __init__(self, driver: Driver, records: MetadataStore) -> None:
        self.driver = driver
        self.records = records
        loaded = load(records, driver)
        self._mount_lock = threading.Lock()
        self._mounts: dict[str, StoredMount] = loaded.mounts
        self._layer_lock = threading.RLock()
        self._layers: dict[ChainID, StoredLayer] = loaded.layers
        self._busy: set[str] = set()  # trees that are being made or removed just now
        self.claims = Claims(loaded.unreadable, driver.exists, self._layers.__contains__)
        """What may be needed without being counted."""

    @property
    def unreadable(self) -> list[Unreadable]:
        """What is stored but cannot be used, with reasons. Such a layer can be registered again; the name of such a
        read-write layer is taken until the record is put right or removed."""
        return self.claims.unreadable

    def recover(self) -> list[Leftover]:
        """Finish what a crash or a failure left half done; returns what is still left, which is tried again later."""
        return [leftover for leftover in self.leftovers() if not self.finish(leftover)]

    def leftovers(self) -> list[Leftover]:
        """What a crash or a failure left half done, without the operations that are under way."""
        found = self.records.leftovers()
        with self._layer_lock:
            # One that names no tree may be an operation of another thread that is about to begin.
            return [
                one for one in found if self._busy.isdisjoint(one.driver_ids) and (one.driver_ids or not self._busy)
            ]

    def finish(self, leftover: Leftover) -> bool:
        """Remove what belongs to it; False if that failed, with a line in the log."""
        needed = self.driver_ids() | self.claims.trees()
        try:
            self.records.check_writable()
            for tree in leftover.driver_ids:
                if tree not in needed:
                    self.driver.remove(tree)
            self.records.forget(leftover)
        except (UnionfsError, OSError) as error:
            _log.warning("%s: %s cannot be cleaned up yet: %s", leftover.path, leftover.what, error)
            return False
        return True

    def driver_ids(self) -> set[str]:
        """The trees that layers and read-write layers of this store stand on, and those that are just being made."""
        with self._mount_lock, self._layer_lock:
            return self._driver_ids()

    def _driver_ids(self) -> set[str]:
        """As :meth:`driver_ids`, for who holds both locks."""
        ids = {layer.record.cache_id for layer in self._layers.values()} | self._busy
        for mount in self._mounts.values():
            ids |= {mount.record.mount_id, mount.record.init_id}
        return ids - {""}

    @contextmanager
    def _claimed(self, tree: str, *more: str, by: Unreadable | None = None) -> Iterator[None]:
        """While the block runs, a tree that is no layer's yet is at work, and nobody else gets it.

        ``by`` is the damaged record that names the tree and is replaced now.
        """
        with self._mount_lock, self._layer_lock:
            if tree in self._driver_ids() | self.claims.trees(but=by):
                raise LayerStoreError(f"{tree} belongs to a layer already; give the id of a tree of no layer")
            self._busy.update((tree, *more))
        try:
            yield
        finally:
            with self._layer_lock:
                self._busy.difference_update((tree, *more))

    @contextmanager
    def _at_work(self, *trees: str) -> Iterator[str]:
        """While the block runs, what is recorded of these trees is no leftover, and none is an orphan.

        Those of empty names are none; the first one is what the block gets.
        """
        named = set(trees) - {""}
        with self._layer_lock:
            self._busy |= named
        try:
            yield trees[0]
        finally:
            with self._layer_lock:
                self._busy -= named

    def _sync(self, *trees: str) -> None:
        """What the metadata is going to promise must be on disk before it."""
        if isinstance(self.driver, SyncingDriver):
            for tree in trees:
                if tree:
                    self.driver.sync(tree)

    def _abandon(self, cancel: Callable[[], None], *trees: str) -> None:
        """Undo what was begun. Where that fails its record stays, so that it is finished at the next start."""
        try:
            for tree in trees:
                if tree:
                    self.driver.remove(tree)
            cancel()
        except (UnionfsError, OSError) as error:
            _log.warning("cannot undo all of a failed operation, the next start will: %s", error)

    def _remove_trees(self, removal: Removal, *trees: str) -> None:
        """Remove what ``removal`` took off the list, or put it back.

        It comes off the list first, so that a crash on the way leaves something to clean up and never half a layer.
        Nor is it put back when a tree is gone already, though not all of its files could be deleted.
        """
        present = [tree for tree in trees if tree and self.driver.exists(tree)]
        try:
            for tree in trees:
                if tree:
                    self.driver.remove(tree)
        except BaseException as error:
            if all(map(self.driver.exists, present)):
                removal.undo()
                raise
            if not isinstance(error, UnionfsError | OSError):
                raise
            _log.warning("cannot delete all of something removed, the next start will: %s", error)
            return
        try:
            removal.finish()
        except OSError as error:
            _log.warning("cannot delete the records of something removed, the next start will: %s", error)

    def orphans(self) -> dict[str, str]:
        """Trees that no record names, each with the reason why it stays all the same, empty for one of no use.

        None for a driver that cannot list what it has.
        """
        if not isinstance(self.driver, ListingDriver):
            return {}
        # First the trees and then who needs them: what is made in between is not taken for an orphan.
        trees = self.driver.layer_ids()
        needed = self.driver_ids() | self.claims.trees()
        for leftover in self.leftovers():
            needed.update(leftover.driver_ids)
        return {tree: self.claims.why_tree_stays(tree) for tree in trees if tree not in needed}

    def is_gone(self, tree: str) -> bool:
        """Whether a tree is neither there nor named nor possibly meant by anything."""
        if self.driver.exists(tree) or tree in self.driver_ids() | self.claims.trees():
            return False
        return not self.claims.why_unnamed_trees_stay()

    def _check_exists(self, tree: str) -> None:
        if not self.driver.exists(tree):
            raise LayerStoreError(
                f"graph ID does not exist: {tree[:100]!r}; give the id of a tree of the {self.driver.name} driver"
            )
