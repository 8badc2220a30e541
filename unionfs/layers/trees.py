"""The driver's trees: which are at work just now, which nothing needs, and how they come to stay or to go."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unionfs.drivers.contract import Driver, ListingDriver, SyncingDriver
from unionfs.errors import LayerStoreError, UnionfsError
from unionfs.layers.claims import Claims
from unionfs.layers.metadata import IncompleteTransaction, MetadataStore, Removal, Unreadable

_log = logging.getLogger(__name__)


class TreeKeeper:
    """Looks after the trees of one driver. Its lock, which guards what is busy, is held for moments; it is the last.

    Owners of trees take them for good before they stop being busy, and mark them busy before they give them up. So a
    tree that is needed is found by looking at what is busy, at what is owned, and at what is busy again.

    Args:
        driver: keeps the trees.
        records: keeps what is known about them.
        claims: what may be needed without being owned.
    """

    def __init__(self, driver: Driver, records: MetadataStore, claims: Claims) -> None:
        self._driver = driver
        self._records = records
        self._claims = claims
        self._lock = threading.Lock()
        self._busy: Counter[str] = Counter()  # trees that are being made, adopted or removed
        self._owners: list[Callable[[], set[str]]] = []

    def add_owner(self, trees: Callable[[], set[str]]) -> None:
        """Ask ``trees`` too, from any thread, which trees are in use."""
        self._owners.append(trees)

    def needed(self) -> set[str]:
        """The trees that layers and read-write layers stand on, and those that are busy."""
        found = self._busy_now()
        for trees in self._owners:
            found |= trees()
        return (found | self._busy_now()) - {""}

    def _busy_now(self) -> set[str]:
        with self._lock:
            return set(self._busy)

    @contextmanager
    def busy(self, *trees: str) -> Iterator[None]:
        """Until the block ends, what is recorded of these trees is under way, and none is an orphan.

        Empty names are ignored.
        """
        named = Counter(filter(None, trees))
        with self._lock:
            self._busy += named
        try:
            yield
        finally:
            with self._lock:
                self._busy -= named

    @contextmanager
    def reserved(self, tree: str, *more: str, by: Unreadable | None = None) -> Iterator[None]:
        """Until the block ends, a tree that is no layer's yet is busy, and nobody else gets it.

        Args:
            tree: the tree.
            more: trees that go with it.
            by: the damaged record that names the tree and is replaced now.

        Raises:
            LayerStoreError: it belongs to something.
        """
        with self._lock:
            taken = tree in self._busy
            if not taken:
                self._busy.update((tree, *more))
        try:
            if taken or any(tree in trees() for trees in self._owners) or tree in self._claims.trees(but=by):
                raise LayerStoreError(f"{tree} belongs to a layer already; give the id of a tree of no layer")
            yield
        finally:
            if not taken:
                with self._lock:
                    self._busy -= Counter((tree, *more))

    def check_exists(self, tree: str) -> None:
        """Raise :class:`LayerStoreError` unless the driver has the tree."""
        if not self._driver.exists(tree):
            raise LayerStoreError(
                f"graph ID does not exist: {tree[:100]!r}; give the id of a tree of the {self._driver.name} driver"
            )

    def sync(self, *trees: str) -> None:
        """Bring trees to stable storage: what the metadata is going to promise must be on disk before it."""
        if isinstance(self._driver, SyncingDriver):
            for tree in filter(None, trees):
                self._driver.sync(tree)

    def roll_back(self, cancel: Callable[[], None], *trees: str) -> None:
        """Undo what was begun. Where that fails its record stays, so that it is finished at the next start."""
        try:
            for tree in filter(None, trees):
                self._driver.remove(tree)
            cancel()
        except (UnionfsError, OSError) as error:
            _log.warning("cannot undo all of a failed operation, the next start will: %s", error)

    def remove(self, removal: Removal, put_back: Callable[[], bool], *trees: str) -> None:
        """Remove the trees of what ``removal`` took off the list.

        It comes off the list first, so that a crash on the way leaves something to clean up and never half a layer.

        Args:
            removal: is finished.
            put_back: puts it back on the list, called when a tree cannot be removed and all of them are still there;
                False when it has been replaced meanwhile.
            trees: in the order in which they are removed.

        Raises:
            DriverError, OSError: it is back on the list. Otherwise what could not be done is left to the next start.
        """
        present = [tree for tree in trees if tree and self._driver.exists(tree)]
        try:
            for tree in filter(None, trees):
                self._driver.remove(tree)
        except BaseException as error:
            # A tree may be gone though not all of its files could be deleted.
            if (all(map(self._driver.exists, present)) and put_back()) or not isinstance(error, UnionfsError | OSError):
                raise
            _log.warning("cannot delete all of something removed, the next start will: %s", error)
            return
        try:
            removal.finish()
        except OSError as error:
            _log.warning("cannot delete the records of something removed, the next start will: %s", error)

    # What crashes and failures left

    def incomplete(self) -> list[IncompleteTransaction]:
        """See :meth:`LayerStore.incomplete`."""
        found = self._records.incomplete()
        busy = self._busy_now()
        # One that names no tree may be an operation of another thread that is about to begin.
        return [one for one in found if busy.isdisjoint(one.driver_ids) and (one.driver_ids or not busy)]

    def finish(self, one: IncompleteTransaction) -> bool:
        """See :meth:`LayerStore.finish`."""
        needed = self.needed() | self._claims.trees()
        try:
            self._records.check_writable()
            for tree in one.driver_ids:
                if tree not in needed:
                    self._driver.remove(tree)
            self._records.forget(one)
        except (UnionfsError, OSError) as error:
            _log.warning("%s: %s cannot be cleaned up yet: %s", one.path, one.what, error)
            return False
        return True

    def orphans(self) -> dict[str, str]:
        """See :meth:`LayerStore.orphans`."""
        if not isinstance(self._driver, ListingDriver):
            return {}
        # First the trees and then who needs them: what is made in between is not taken for an orphan.
        trees = self._driver.layer_ids()
        needed = self.needed() | self._claims.trees()
        for one in self.incomplete():
            needed.update(one.driver_ids)
        return {tree: self._claims.why_tree_stays(tree) for tree in trees if tree not in needed}

    def is_gone(self, tree: str) -> bool:
        """See :meth:`LayerStore.is_gone`."""
        if self._driver.exists(tree) or tree in self.needed() | self._claims.trees():
            return False
        return not self._claims.why_unnamed_trees_stay()
