"""Taking read-only layers in: from a stream, or from a tree that the driver has already."""

from __future__ import annotations

from contextlib import ExitStack

from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver, capabilities_of
from unionfs.errors import DigestMismatchError, MaxDepthExceededError
from unionfs.host.locks import NamedLocks
from unionfs.layers.identity import NO_CHAIN, ChainID, DiffID, extend_chain, new_id, parse_digest
from unionfs.layers.ingest import Ingested, Progress, ingest, read_tree
from unionfs.layers.layer import LayerHandle, StoredLayer
from unionfs.layers.metadata import Descriptor, LayerRecord, MetadataStore, Transaction
from unionfs.layers.read_only import Pin, ReadOnlyLayers

MAX_DEPTH = 125
"""Layers in a chain: the 127 of Docker's drivers, less an init layer and a container's own."""


class Registration(ReadOnlyLayers):
    """The part of a :class:`LayerStore` that takes read-only layers in."""

    def __init__(self, driver: Driver, records: MetadataStore) -> None:
        super().__init__(driver, records)
        self._record_streams = not capabilities_of(driver).reproduces_exact_diffs
        self._registering = NamedLocks()  # of expected chain ids; taken before _layer_lock

    def register(
        self,
        stream: Readable,
        parent: str = "",
        *,
        expected_diff_id: str = "",
        progress: Progress | None = None,
    ) -> LayerHandle:
        """Store a layer and return a handle on it. One that is there already is not stored twice.

        Args:
            stream: the layer as a tar archive, plain or compressed with gzip, zstd, xz or bzip2; read to its end unless
                the expected layer is there already, and not closed. What cannot be rewound is copied aside on the way.
            parent: the chain id of the layer below, ``""`` for none.
            expected_diff_id: the digest that the uncompressed stream must have.
            progress: called with the number of uncompressed bytes read so far, now and then, on another thread.

        Raises:
            LayerDoesNotExistError: there is no ``parent``.
            MaxDepthExceededError: ``parent`` has as many layers as a chain may have.
            DigestMismatchError: the stream is not the expected one. Nothing is stored.
            ArchiveError: the archive is damaged or hostile. Nothing is stored.
        """
        return self.register_with_descriptor(stream, parent, None, expected_diff_id=expected_diff_id, progress=progress)

    def register_with_descriptor(
        self,
        stream: Readable,
        parent: str = "",
        descriptor: Descriptor | None = None,
        *,
        expected_diff_id: str = "",
        progress: Progress | None = None,
    ) -> LayerHandle:
        """As :meth:`register`, and remember where the layer came from.

        Args:
            stream, parent, expected_diff_id, progress: see :meth:`register`.
            descriptor: kept with the layer when its digest is not empty.
        """
        if not expected_diff_id:
            return self._register(stream, parent, descriptor, None, progress)
        expected = DiffID(parse_digest(expected_diff_id, "expected digest"))
        chain_id = extend_chain(ChainID(parent), expected)
        # Two that bring the same layer at the same time: the second one finds it there.
        with self._registering.hold(chain_id):
            with self._layer_lock:
                known = self._layers.get(chain_id)
                if known is not None:
                    return self._handle(known)
            return self._register(stream, parent, descriptor, expected, progress)

    def _register(
        self,
        stream: Readable,
        parent_id: str,
        descriptor: Descriptor | None,
        expected: DiffID | None,
        progress: Progress | None,
    ) -> LayerHandle:
        self.records.check_writable()
        with ExitStack() as stack:
            pin = stack.enter_context(self._pinned(parent_id))
            parent = pin.layer
            _check_depth(parent)
            cache_id = stack.enter_context(self._at_work(new_id()))
            transaction = self.records.begin(cache_id)
            try:
                self.driver.create(cache_id, parent.record.cache_id if parent is not None else "")
                taken = self._ingest(stream, cache_id, parent, transaction, progress)
                if expected is not None and taken.diff_id != expected:
                    raise DigestMismatchError(
                        f"the layer is {taken.diff_id}, but {expected} was expected; fetch it again"
                    )
                record = LayerRecord(
                    diff_id=taken.diff_id,
                    size=taken.size,
                    cache_id=cache_id,
                    parent=parent.chain_id if parent is not None else NO_CHAIN,
                    descriptor=descriptor,
                )
                return self._commit(transaction, record, pin)
            finally:
                if not pin.keep:
                    self._abandon(transaction.cancel, cache_id)

    def _commit(self, transaction: Transaction, record: LayerRecord, pin: Pin) -> LayerHandle:
        """Make it a layer, and a handle on it. If there is one of that chain, the handle is on that instead."""
        chain_id = extend_chain(record.parent, record.diff_id)
        with self._layer_lock:
            known = self._layers.get(chain_id)
        synced = known is None
        if synced:
            self._sync(record.cache_id)
        with self._layer_lock:
            known = self._layers.get(chain_id)
            if known is None:
                if not synced:  # it was there a moment ago
                    self._sync(record.cache_id)
                transaction.commit(chain_id, record)
                pin.keep = True
                known = self._layers[chain_id] = StoredLayer(chain_id, record, pin.layer)
                self.claims.drop("layer", chain_id)
            return self._handle(known)

    def adopt(self, tree: str, parent: str = "", *, record: Readable | None = None) -> LayerHandle:
        """Make a tree that the driver has already a layer (Docker's RegisterByGraphID), and return a handle on it.

        If there is a layer of these contents already, the handle is on that, and the tree is left alone; so it is when
        this fails.

        Args:
            tree: the driver's id; the tree must have been made on the one of ``parent``.
            parent: the chain id of the layer below, ``""`` for none.
            record: a tar-split record of the stream that the tree was unpacked from; None: the driver's ``diff``
                becomes the layer's stream.

        Raises:
            LayerDoesNotExistError: there is no ``parent``.
            LayerStoreError: there is no such tree, or it belongs to a layer.
            LayerDamagedError: the tree is not what the record is of.
        """
        self.records.check_writable()
        self._check_exists(tree)
        with self._pinned(parent) as pin, self._claimed(tree):
            _check_depth(pin.layer)
            below = pin.layer.record.cache_id if pin.layer is not None else ""
            transaction = self.records.begin(tree, adopting=True)
            try:
                diff_id = read_tree(self.driver, tree, below, record, transaction)
                found = LayerRecord(
                    diff_id=diff_id,
                    size=self.driver.diff_size(tree, below),
                    cache_id=tree,
                    parent=pin.layer.chain_id if pin.layer is not None else NO_CHAIN,
                )
                return self._commit(transaction, found, pin)
            finally:
                if not pin.keep:
                    self._abandon(transaction.cancel)

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
            lambda plain: self.driver.apply_diff(cache_id, below, plain),
            transaction.tar_split_writer if self._record_streams else None,
            transaction.spool,
            progress,
        )


def _check_depth(parent: StoredLayer | None) -> None:
    if parent is not None and parent.depth() >= MAX_DEPTH:
        raise MaxDepthExceededError(
            f"max depth exceeded: {parent.chain_id} has {MAX_DEPTH} layers already; make do with fewer"
        )
