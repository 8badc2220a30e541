"""How read-only layers come into a store: from a stream, or from a tree that the driver has already."""

from __future__ import annotations

from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver, capabilities_of
from unionfs.drivers.files import file_getter
from unionfs.errors import DigestMismatchError, MaxDepthExceededError
from unionfs.host.locks import NamedLocks
from unionfs.layers.identity import NO_CHAIN, ChainID, DiffID, extend_chain, new_id, parse_digest
from unionfs.layers.ingest import Ingested, Progress, ingest, read_tree
from unionfs.layers.layer import LayerHandle
from unionfs.layers.metadata import Descriptor, LayerRecord, MetadataStore, Transaction
from unionfs.layers.references import ReferenceTable
from unionfs.layers.state import StoredLayer
from unionfs.layers.trees import TreeKeeper

MAX_DEPTH = 125
"""Layers in a chain: the 127 of Docker's drivers, less an init layer and a container's own."""


class Registrar:
    """Registers and adopts layers. It holds the lock of an expected chain id while its layer comes in.

    Args:
        driver, records, keeper: the store's.
        layers: gets the layers.
    """

    def __init__(self, driver: Driver, records: MetadataStore, keeper: TreeKeeper, layers: ReferenceTable) -> None:
        self._driver = driver
        self._records = records
        self._keeper = keeper
        self._layers = layers
        self._record_streams = not capabilities_of(driver).reproduces_exact_diffs
        self._registering = NamedLocks()

    def register(
        self,
        stream: Readable,
        parent: str,
        descriptor: Descriptor | None,
        expected_diff_id: str,
        progress: Progress | None,
    ) -> LayerHandle:
        """See :meth:`LayerStore.register_with_descriptor`."""
        if not expected_diff_id:
            return self._register(stream, parent, descriptor, None, progress)
        expected = DiffID(parse_digest(expected_diff_id, "expected digest"))
        chain_id = extend_chain(ChainID(parent), expected)
        # Two that bring the same layer at the same time: the second one finds it there.
        with self._registering.hold(chain_id):
            known = self._layers.find(chain_id)
            return known or self._register(stream, parent, descriptor, expected, progress)

    def _register(
        self,
        stream: Readable,
        parent_id: str,
        descriptor: Descriptor | None,
        expected: DiffID | None,
        progress: Progress | None,
    ) -> LayerHandle:
        self._records.check_writable()
        cache_id = new_id()
        with self._layers.pinned(parent_id) as pin, self._keeper.busy(cache_id):
            parent = pin.layer
            _check_depth(parent)
            transaction = self._records.begin(cache_id)
            try:
                self._driver.create(cache_id, parent.record.cache_id if parent is not None else "")
                ingested = self._ingest(stream, cache_id, parent, transaction, progress)
                if expected is not None and ingested.diff_id != expected:
                    raise DigestMismatchError(
                        f"the layer is {ingested.diff_id}, but {expected} was expected; fetch it again"
                    )
                record = LayerRecord(
                    diff_id=ingested.diff_id,
                    size=ingested.size,
                    cache_id=cache_id,
                    parent=parent.chain_id if parent is not None else NO_CHAIN,
                    descriptor=descriptor,
                )
                return self._layers.add(transaction, record, pin)
            finally:
                if not pin.keep:
                    self._keeper.roll_back(transaction.cancel, cache_id)

    def _ingest(
        self,
        stream: Readable,
        cache_id: str,
        parent: StoredLayer | None,
        transaction: Transaction,
        progress: Progress | None,
    ) -> Ingested:
        below = parent.record.cache_id if parent is not None else ""
        return ingest(
            stream,
            lambda plain: self._driver.apply_diff(cache_id, below, plain),
            transaction.tar_split_writer if self._record_streams else None,
            transaction.spool,
            progress,
            (lambda: file_getter(self._driver, cache_id)) if below else None,
        )

    def adopt(self, tree: str, parent: str, record: Readable | None) -> LayerHandle:
        """See :meth:`LayerStore.adopt`."""
        self._records.check_writable()
        self._keeper.check_exists(tree)
        with self._layers.pinned(parent) as pin, self._keeper.reserved(tree):
            _check_depth(pin.layer)
            below = pin.layer.record.cache_id if pin.layer is not None else ""
            transaction = self._records.begin(tree, adopting=True)
            try:
                diff_id = read_tree(self._driver, tree, below, record, transaction)
                found = LayerRecord(
                    diff_id=diff_id,
                    size=self._driver.diff_size(tree, below),
                    cache_id=tree,
                    parent=pin.layer.chain_id if pin.layer is not None else NO_CHAIN,
                )
                return self._layers.add(transaction, found, pin)
            finally:
                if not pin.keep:
                    self._keeper.roll_back(transaction.cancel)


def _check_depth(parent: StoredLayer | None) -> None:
    if parent is not None and parent.depth() >= MAX_DEPTH:
        raise MaxDepthExceededError(
            f"max depth exceeded: {parent.chain_id} has {MAX_DEPTH} layers already; make do with fewer"
        )
