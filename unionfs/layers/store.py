"""The layer store: which layers there are, who needs them, and how they come and go.

The semantics of the calls, of handles and of the counts are those of Docker's ``layer`` package (spec section 2); what
is different is said where it is. Locks are taken in this order: a read-write layer's name, ``_mount_lock``,
``_layer_lock``. Trees are made, filled and removed outside of both, but for a release that removes several layers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import NoReturn

from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import CreateOptions, Driver, SyncingDriver, capabilities_of
from unionfs.drivers.locks import NamedLocks
from unionfs.errors import (
    ActiveMountError,
    DigestMismatchError,
    LayerDoesNotExistError,
    LayerNotRetainedError,
    LayerStoreError,
    MaxDepthExceededError,
    MountDoesNotExistError,
    MountNameConflictError,
    UnionfsError,
)
from unionfs.fuse_ops import mountinfo
from unionfs.layers.adoption import read_tree
from unionfs.layers.identity import NO_CHAIN, ChainID, DiffID, extend_chain, parse_digest
from unionfs.layers.ingest import Ingested, Progress, ingest
from unionfs.layers.layer import Layer, LayerHandle, LayerMetadata, StoredLayer, metadata_of
from unionfs.layers.loading import load
from unionfs.layers.lock import StoreLock
from unionfs.layers.metadata import (
    Descriptor,
    LayerRecord,
    Leftover,
    MetadataStore,
    MountRecord,
    MountTransaction,
    Removal,
    Transaction,
    Unreadable,
)
from unionfs.layers.random_ids import INIT_SUFFIX, is_valid_id, new_id
from unionfs.layers.rw_layer import RWLayer, StoredMount

_log = logging.getLogger(__name__)

MAX_DEPTH = 125
"""Layers in a chain: the 127 of Docker's drivers, less an init layer and a container's own."""


class LayerStore:
    """All layers of one driver.

    Args:
        driver: keeps the trees.
        records: keeps what is known about them.
        lock: held as long as the store is open, and released by :meth:`close`; None: the caller sees to that.
        recover: finish what a crash left half done. Only to look at a store as it is, leave it off.

    Raises:
        OSError: the metadata cannot be listed. A layer that cannot be read is no error: see :attr:`unreadable`.
    """

    def __init__(
        self, driver: Driver, records: MetadataStore, lock: StoreLock | None = None, *, recover: bool = True
    ) -> None:
        self.driver = driver
        self.records = records
        self.counting = threading.Lock()
        """Guards the numbers of mounts."""
        loaded = load(records, driver)
        self.unreadable: list[Unreadable] = loaded.unreadable
        """What is stored but cannot be used, with reasons. Such a layer can be registered again, a read-write layer of
        such a name created again."""
        self._lock = lock
        self._record_streams = not capabilities_of(driver).reproduces_exact_diffs
        self._layers: dict[ChainID, StoredLayer] = loaded.layers
        self._mounts: dict[str, StoredMount] = loaded.mounts
        self._layer_lock = threading.RLock()
        self._mount_lock = threading.Lock()
        self._names = NamedLocks()
        self._registering = NamedLocks()
        self._busy: set[str] = set()  # trees that are being made or removed just now
        if recover:
            self.recover()

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open the store. Mounts stay; :meth:`cleanup` ends them. Closing twice is harmless."""
        if self._lock is not None:
            self._lock.release()

    # Start

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
        needed = self.driver_ids()
        try:
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

    # Read-only layers

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

    def _commit(self, transaction: Transaction, record: LayerRecord, pin: _Pin) -> LayerHandle:
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
                self.unreadable = [one for one in self.unreadable if one.name != chain_id]
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
        if not self.driver.exists(tree):
            raise _no_tree(self.driver, tree)
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

    @contextmanager
    def _claimed(self, tree: str, *more: str) -> Iterator[None]:
        """While the block runs, a tree that is no layer's yet is at work, and nobody else gets it."""
        with self._mount_lock, self._layer_lock:
            if tree in self._driver_ids():
                raise LayerStoreError(f"{tree} belongs to a layer already; give the id of a tree of no layer")
            self._busy.update((tree, *more))
        try:
            yield
        finally:
            with self._layer_lock:
                self._busy.difference_update((tree, *more))

    @contextmanager
    def _at_work(self, *trees: str) -> Iterator[str]:
        """While the block runs, what is recorded of these trees is no leftover."""
        with self._layer_lock:
            self._busy.update(trees)
        try:
            yield trees[0]
        finally:
            with self._layer_lock:
                self._busy.difference_update(trees)

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

    def release(self, layer: Layer, *, keep_parents: bool = False) -> list[LayerMetadata]:
        """Give a handle back. Layers that nobody needs any more are removed.

        Args:
            layer: the handle.
            keep_parents: leave the layers below, even if nobody needs them now.

        Returns:
            What was removed, top first; nothing for a handle on a layer that is gone already.

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

    def _remove_trees(self, removal: Removal, *trees: str) -> None:
        """Remove what ``removal`` took off the list, or put it back.

        It comes off the list first, so that a crash on the way leaves something to clean up and never half a layer.
        """
        try:
            for tree in trees:
                if tree:
                    self.driver.remove(tree)
        except BaseException:
            removal.undo()
            raise
        try:
            removal.finish()
        except OSError as error:
            _log.warning("cannot delete the records of something removed, the next start will: %s", error)

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
    def _pinned(self, chain_id: str) -> Iterator[_Pin]:
        """Keep a layer while something is made on it; for good when the pin says so at the end."""
        pin = _Pin()
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

    def _unpin(self, pin: _Pin) -> None:
        if pin.layer is None or pin.keep:
            return
        with self._layer_lock:
            if pin.was_unused and pin.layer.reference_count == 1:
                # Nobody had asked for this layer since the start, so nobody has given it up either.
                pin.layer.reference_count = 0
            else:
                self._unreference(pin.layer)

    # Read-write layers

    def create_rw_layer(
        self,
        name: str,
        parent: str = "",
        *,
        mount_label: str = "",
        init: Callable[[str], None] | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> RWLayer:
        """Make a read-write layer and return a handle on it.

        Args:
            name: what it is called; a container's id, usually.
            parent: the chain id of the layer below, ``""`` for none.
            mount_label: SELinux context of the init layer.
            init: fills a layer of its own between the two, mounted at the path it is given. What it does is never
                among the layer's changes.
            storage_options: the driver's for this layer, such as ``size``.

        Raises:
            MountNameConflictError: the name is taken.
            LayerDoesNotExistError: there is no ``parent``.
        """
        with self._names.hold(name):
            with self._mount_lock:
                if name in self._mounts:
                    raise MountNameConflictError(
                        f"mount already exists with name {name}; choose another name, or remove that one first"
                    )
            mount_id = new_id()
            with self._pinned(parent) as pin, self._at_work(mount_id):
                record = MountRecord(
                    mount_id=mount_id,
                    init_id=mount_id + INIT_SUFFIX if init is not None else "",
                    parent=pin.layer.chain_id if pin.layer is not None else NO_CHAIN,
                )
                stored = StoredMount(name, record, pin.layer)
                transaction = self.records.begin_mount(name, record)
                try:
                    self._create_trees(stored, mount_label, init, dict(storage_options or {}))
                    self._commit_mount(transaction, stored, pin)
                finally:
                    if not pin.keep:
                        self._abandon(transaction.cancel, record.mount_id, record.init_id)
                return self._rw_handle(stored)

    def adopt_rw_layer(self, name: str, tree: str, parent: str = "") -> RWLayer:
        """Make a tree that the driver has already a read-write layer (Docker's CreateRWLayerByGraphID); a handle on it.

        A tree ``TREE-init`` becomes its init layer. Adopting the same once more only gives another handle.

        Args:
            name: what it is to be called.
            tree: the driver's id, which must have the form of a mount-id: 64 hexadecimal digits. The tree must have
                been made on its init layer, or else on the tree of ``parent``.
            parent: the chain id of the layer below, ``""`` for none.

        Raises:
            MountNameConflictError: the name is taken by another tree, or by this one on another parent.
            LayerDoesNotExistError: there is no ``parent``.
            LayerStoreError: there is no such tree, or it belongs to something else. It stays as it is.
        """
        if not is_valid_id(tree) or tree.endswith(INIT_SUFFIX):
            raise LayerStoreError(
                f"invalid mount id value {tree[:100]!r}; a tree is adopted by its 64 hexadecimal digits"
            )
        if not self.driver.exists(tree):
            raise _no_tree(self.driver, tree)
        init = tree + INIT_SUFFIX
        record = MountRecord(mount_id=tree, init_id=init if self.driver.exists(init) else "", parent=ChainID(parent))
        with self._names.hold(name):
            with self._mount_lock:
                known = self._mounts.get(name)
            if known is not None:
                _check_same_mount(known, record)
                return self._rw_handle(known)
            with self._pinned(parent) as pin, self._claimed(tree, init):
                stored = StoredMount(name, record, pin.layer)
                transaction = self.records.begin_mount(name, record, adopting=True)
                try:
                    self._commit_mount(transaction, stored, pin)
                finally:
                    if not pin.keep:
                        self._abandon(transaction.cancel)
                return self._rw_handle(stored)

    def _commit_mount(self, transaction: MountTransaction, stored: StoredMount, pin: _Pin) -> None:
        """Make it a read-write layer, once its trees are on the disk."""
        self._sync(stored.record.init_id, stored.record.mount_id)
        transaction.commit()
        pin.keep = True
        with self._mount_lock:
            self._mounts[stored.name] = stored
            self.unreadable = [one for one in self.unreadable if one.name != stored.name]

    def _create_trees(
        self, stored: StoredMount, mount_label: str, init: Callable[[str], None] | None, options: dict[str, str]
    ) -> None:
        record = stored.record
        below = stored.parent.record.cache_id if stored.parent is not None else ""
        if init is not None:
            labelled = CreateOptions(mount_label=mount_label, storage_options=options)
            self.driver.create_read_write(record.init_id, below, labelled)
            path = self.driver.get(record.init_id)
            try:
                init(path)
            finally:
                self.driver.put(record.init_id)
            below = record.init_id
        self.driver.create_read_write(record.mount_id, below, CreateOptions(storage_options=options))

    def get_rw_layer(self, name: str) -> RWLayer:
        """A new handle on a read-write layer, to be released on its own.

        Raises:
            MountDoesNotExistError: there is none of this name.
        """
        with self._names.hold(name):
            return self._rw_handle(self._existing_mount(name))

    def get_mount_id(self, name: str) -> str:
        """The driver's id of a read-write layer's tree.

        Raises:
            MountDoesNotExistError: there is none of this name.
        """
        return self._existing_mount(name).record.mount_id

    def reference_count(self, chain_id: str) -> int:
        """How many handles, layers and read-write layers need a layer directly.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        with self._layer_lock:
            return self._existing(chain_id).reference_count

    def rw_layers(self) -> dict[str, StoredMount]:
        """All read-write layers by name, to look at."""
        with self._mount_lock:
            return dict(sorted(self._mounts.items()))

    def release_rw_layer(
        self, layer: RWLayer, *, force: bool = True, keep_parents: bool = False
    ) -> list[LayerMetadata]:
        """Give a handle back; the last one removes the read-write layer with all that is in it.

        Args:
            layer: the handle.
            force: remove it even if it is mounted, as Docker does.
            keep_parents: leave the layers below, even if nobody needs them now.

        Returns:
            The read-only layers that went with it, top first.

        Raises:
            LayerNotRetainedError: the handle was released before, and the layer is still there.
            ActiveMountError: it is mounted, and ``force`` is off. The handle stays good.
            DriverError: a tree could not be removed. If it was the layer's own, the handle is good again: release it
                once more when the cause is gone. Otherwise the read-only layer below stays, unreferenced.
        """
        name = layer.name
        with self._names.hold(name):
            with self._mount_lock:
                stored = self._mounts.get(name)
            if stored is None:
                return []
            if layer not in stored.references:
                raise LayerNotRetainedError(
                    f"layer not retained: this handle on {name} was released before; get another one"
                )
            if len(stored.references) == 1:
                if not force and layer.is_mounted():
                    raise ActiveMountError(f"mount still active: {name} is mounted; unmount it first, or use force")
                self._delete_mount(stored)
            stored.references.discard(layer)
            if stored.references:
                return []
            with self._mount_lock:
                del self._mounts[name]
            if stored.parent is None:
                return []
            with self._layer_lock:
                if keep_parents:
                    stored.parent.reference_count -= 1
                    return []
                return self._unreference(stored.parent)

    def _delete_mount(self, stored: StoredMount) -> None:
        record = stored.record
        with self._at_work(record.mount_id):
            self._remove_trees(self.records.remove_mount(stored.name), record.mount_id, record.init_id)

    def _rw_handle(self, stored: StoredMount) -> RWLayer:
        handle = RWLayer(stored, self)
        stored.references.add(handle)
        return handle

    def _existing_mount(self, name: str) -> StoredMount:
        with self._mount_lock:
            stored = self._mounts.get(name)
        if stored is None:
            raise MountDoesNotExistError(
                f"mount does not exist: {name[:100]}; unionfs container ls shows those that do"
            )
        return stored

    def is_in_mount_table(self, tree: str) -> bool:
        """Whether the host shows a mount for a tree."""
        try:
            point = self.driver.get_metadata(tree).get("MergedDir", "")
        except UnionfsError:
            return False
        return bool(point) and mountinfo.top_mount(mountinfo.canonical(point)) is not None

    # The rest

    def cleanup(self) -> None:
        """Finish removals that failed, and end all mounts: for the end of the program that runs the containers."""
        self.recover()
        self.driver.cleanup()

    @property
    def driver_name(self) -> str:
        """The driver's name."""
        return self.driver.name

    def driver_status(self) -> list[tuple[str, str]]:
        """The driver's facts about itself, in order."""
        return self.driver.status()


def _check_depth(parent: StoredLayer | None) -> None:
    if parent is not None and parent.depth() >= MAX_DEPTH:
        raise MaxDepthExceededError(
            f"max depth exceeded: {parent.chain_id} has {MAX_DEPTH} layers already; make do with fewer"
        )


def _no_tree(driver: Driver, tree: str) -> LayerStoreError:
    return LayerStoreError(
        f"graph ID does not exist: {tree[:100]!r}; give the id of a tree of the {driver.name} driver"
    )


def _check_same_mount(known: StoredMount, record: MountRecord) -> None:
    if known.record.mount_id != record.mount_id:
        raise MountNameConflictError(
            f"mount already exists: {known.name} is of the tree {known.record.mount_id}; choose another name"
        )
    if known.record.parent != record.parent:
        raise MountNameConflictError(
            f"name conflict, mismatched parent: {known.name} stands on {known.record.parent or 'nothing'}; name that"
        )


class _Pin:
    """A layer that is kept while something is made on it."""

    layer: StoredLayer | None = None
    keep = False
    was_unused = False


def _inconsistent(what: str) -> NoReturn:
    """The counts do not add up: an error in this program. Nothing was removed."""
    raise LayerStoreError(f"internal error: {what}; nothing was removed, please report this")
