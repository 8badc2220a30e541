"""Read-write layers: a container's own tree over a chain of read-only ones; how they are made, mounted and removed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from unionfs.archive.changes import Change
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import CreateOptions, Driver
from unionfs.errors import (
    ActiveMountError,
    LayerNotRetainedError,
    LayerStoreError,
    MountDoesNotExistError,
    MountNameConflictError,
    NotMountedError,
    UnionfsError,
)
from unionfs.host import mounts
from unionfs.host.locks import NamedLocks
from unionfs.layers.claims import Claims
from unionfs.layers.identity import INIT_SUFFIX, NO_CHAIN, ChainID, is_valid_id, new_id
from unionfs.layers.layer import Layer
from unionfs.layers.metadata import MetadataStore, MountRecord, MountTransaction
from unionfs.layers.references import Pin, ReferenceTable
from unionfs.layers.state import LayerMetadata, StoredMount
from unionfs.layers.trees import TreeKeeper


class RWLayer:
    """A reference to a read-write layer, which is removed with its last reference.

    Not a context manager, because leaving the block would remove a container's data; :meth:`mounted` is one.
    """

    def __init__(self, stored: StoredMount, table: RWTable) -> None:
        self.stored = stored
        self._table = table

    def __repr__(self) -> str:
        return f"<RWLayer {self.name}>"

    @property
    def name(self) -> str:
        """The name it was made with."""
        return self.stored.name

    @property
    def mount_id(self) -> str:
        """The driver's id of the tree."""
        return self.stored.record.mount_id

    @property
    def parent(self) -> Layer | None:
        """The read-only layer below it, unpinned; None when it stands on nothing."""
        return None if self.stored.parent is None else self._table.layers.view(self.stored.parent)

    def mount(self, mount_label: str = "") -> str:
        """Mount it if it is not yet, and return the path of its root. To be undone by one :meth:`unmount`.

        Args:
            mount_label: SELinux context for all files; empty for none.

        Raises:
            MountError: the mount failed.
            LayerNotFoundError: the tree is gone.
        """
        self._table.records.check_writable()
        path = self._table.driver.get(self.stored.record.mount_id, mount_label)
        with self._table.counting:
            self.stored.mounts += 1
        return path

    def unmount(self) -> None:
        """Undo one :meth:`mount`, also one of a process that had the store open before.

        Raises:
            NotMountedError: it is not mounted.
        """
        self._table.records.check_writable()
        with self._table.counting:
            known = self.stored.mounts > 0
            if known:
                self.stored.mounts -= 1
        if not known and not self.is_mounted():
            raise NotMountedError(f"container {self.name} is not mounted; mount it first")
        self._table.driver.put(self.stored.record.mount_id)

    def is_mounted(self) -> bool:
        """Whether somebody has it mounted: this process, or the host's mount table says so."""
        return self.stored.mounts > 0 or self._table.is_in_mount_table(self.stored.record.mount_id)

    @contextmanager
    def mounted(self, mount_label: str = "") -> Iterator[str]:
        """The path of its root, mounted until the block ends."""
        path = self.mount(mount_label)
        try:
            yield path
        finally:
            self.unmount()

    def size(self) -> int:
        """Bytes that its changes hold, without those of the init layer."""
        return self._table.driver.diff_size(self.stored.record.mount_id, self.stored.driver_parent)

    def changes(self) -> list[Change]:
        """What was changed in it, without what the init layer did."""
        return self._table.driver.changes(self.stored.record.mount_id, self.stored.driver_parent)

    def tar_stream(self) -> BinaryIO:
        """The changes as a layer: an uncompressed tar stream, which the caller closes."""
        return self._table.driver.diff(self.stored.record.mount_id, self.stored.driver_parent)

    def apply_diff(self, stream: Readable) -> int:
        """Apply a layer's uncompressed tar stream to it; the size of what it holds then, in bytes."""
        self._table.records.check_writable()
        return self._table.driver.apply_diff(self.stored.record.mount_id, self.stored.driver_parent, stream)

    def metadata(self) -> dict[str, str]:
        """The driver's facts about the tree, and its name as ``ID``."""
        return {"ID": self.name, **self._table.driver.get_metadata(self.stored.record.mount_id)}

    def release(self) -> list[LayerMetadata]:
        """Give the reference back; see :meth:`LayerStore.release_rw_layer`."""
        return self._table.release(self)


class RWTable:
    """The read-write layers and their handles.

    It has a lock for each name, held for as long as something happens to that read-write layer; one for the list of
    them, taken after that of a name; and :attr:`counting`, which guards the numbers of mounts and is taken alone.

    Args:
        mounts: as they were loaded.
        driver, records, keeper, claims: the store's.
        layers: what they stand on.
    """

    def __init__(
        self,
        mounts: dict[str, StoredMount],
        driver: Driver,
        records: MetadataStore,
        keeper: TreeKeeper,
        claims: Claims,
        layers: ReferenceTable,
    ) -> None:
        self.driver = driver
        self.records = records
        self.layers = layers
        self.counting = threading.Lock()
        self._keeper = keeper
        self._claims = claims
        self._names = NamedLocks()
        self._lock = threading.Lock()
        self._mounts = mounts
        keeper.add_owner(self._trees)

    def _trees(self) -> set[str]:
        with self._lock:
            return {tree for one in self._mounts.values() for tree in (one.record.mount_id, one.record.init_id)}

    # Making

    def create(
        self,
        name: str,
        parent: str,
        mount_label: str,
        init: Callable[[str], None] | None,
        storage_options: Mapping[str, str] | None,
    ) -> RWLayer:
        """See :meth:`LayerStore.create_rw_layer`."""
        self.records.check_writable()
        with self._names.hold(name):
            self._check_free(name)
            mount_id = new_id()
            init_id = mount_id + INIT_SUFFIX if init is not None else ""
            with self.layers.pinned(parent) as pin, self._keeper.busy(mount_id, init_id):
                record = MountRecord(
                    mount_id=mount_id,
                    init_id=init_id,
                    parent=pin.layer.chain_id if pin.layer is not None else NO_CHAIN,
                )
                stored = StoredMount(name, record, pin.layer)
                transaction = self.records.begin_mount(name, record)
                try:
                    self._create_trees(stored, mount_label, init, dict(storage_options or {}))
                    self._commit(transaction, stored, pin)
                finally:
                    if not pin.keep:
                        self._keeper.roll_back(transaction.cancel, mount_id, init_id)
                return self._handle(stored)

    def _check_free(self, name: str) -> None:
        with self._lock:
            if name in self._mounts:
                raise MountNameConflictError(
                    f"there is a container {name} already; choose another name, or remove that one first"
                )
        if damaged := self._claims.find("mount", name):
            # Its files would be nobody's then.
            raise MountNameConflictError(
                f"there is a container {name} already, but it cannot be read: {damaged.reason}; put that right, or "
                f"remove it with its files: unionfs container rm --force {name}"
            )

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

    def adopt(self, name: str, tree: str, parent: str) -> RWLayer:
        """See :meth:`LayerStore.adopt_rw_layer`."""
        self.records.check_writable()
        if not is_valid_id(tree) or tree.endswith(INIT_SUFFIX):
            raise LayerStoreError(
                f"invalid mount id value {tree[:100]!r}; a tree is adopted by its 64 hexadecimal digits"
            )
        self._keeper.check_exists(tree)
        init = tree + INIT_SUFFIX
        record = MountRecord(mount_id=tree, init_id=init if self.driver.exists(init) else "", parent=ChainID(parent))
        with self._names.hold(name):
            with self._lock:
                known = self._mounts.get(name)
            if known is not None:
                _check_same_mount(known, record)
                return self._handle(known)
            damaged = self._claims.find("mount", name)
            if damaged is not None and any(
                one not in (tree, init) and self.driver.exists(one) for one in damaged.trees
            ):
                raise MountNameConflictError(
                    f"there is a container {name} already, of the tree {damaged.trees[0]}, but it cannot be read: "
                    f"{damaged.reason}; choose another name"
                )
            with self.layers.pinned(parent) as pin, self._keeper.reserved(tree, init, by=damaged):
                stored = StoredMount(name, record, pin.layer)
                transaction = self.records.begin_mount(name, record, adopting=True)
                try:
                    self._commit(transaction, stored, pin)
                finally:
                    if not pin.keep:
                        self._keeper.roll_back(transaction.cancel)
                return self._handle(stored)

    def _commit(self, transaction: MountTransaction, stored: StoredMount, pin: Pin) -> None:
        """Make it a read-write layer, once its trees are on the disk."""
        self._keeper.sync(stored.record.init_id, stored.record.mount_id)
        transaction.commit()
        pin.keep = True
        with self._lock:
            self._mounts[stored.name] = stored
        self._claims.drop("mount", stored.name)

    # Looking

    def get(self, name: str) -> RWLayer:
        """See :meth:`LayerStore.get_rw_layer`."""
        with self._names.hold(name):
            return self._handle(self._existing(name))

    def mount_id(self, name: str) -> str:
        """See :meth:`LayerStore.get_mount_id`."""
        return self._existing(name).record.mount_id

    def all(self) -> dict[str, StoredMount]:
        """See :meth:`LayerStore.rw_layers`."""
        with self._lock:
            return dict(sorted(self._mounts.items()))

    def _handle(self, stored: StoredMount) -> RWLayer:
        handle = RWLayer(stored, self)
        stored.references.add(handle)
        return handle

    def _existing(self, name: str) -> StoredMount:
        with self._lock:
            stored = self._mounts.get(name)
        if stored is None and (damaged := self._claims.find("mount", name)):
            raise MountDoesNotExistError(
                f"container {name} cannot be read: {damaged.reason.partition('; ')[0]}; run unionfs fsck"
            )
        if stored is None:
            raise MountDoesNotExistError(
                f"there is no container {name[:100]}; unionfs container ls shows those that are there"
            )
        return stored

    def is_in_mount_table(self, tree: str) -> bool:
        """Whether the host shows a mount for a tree."""
        try:
            point = self.driver.get_metadata(tree).get("MergedDir", "")
        except UnionfsError:
            return False
        return bool(point) and mounts.top_mount(mounts.canonical(point)) is not None

    # Removing

    def release(self, layer: RWLayer, *, force: bool = True, keep_parents: bool = False) -> list[LayerMetadata]:
        """See :meth:`LayerStore.release_rw_layer`."""
        name = layer.name
        with self._names.hold(name):
            with self._lock:
                stored = self._mounts.get(name)
            if stored is None:
                return []
            if layer not in stored.references:
                raise LayerNotRetainedError(
                    f"layer not retained: this handle on {name} was released before; get another one"
                )
            if len(stored.references) > 1:
                stored.references.discard(layer)
                return []
            if not force and layer.is_mounted():
                raise ActiveMountError(f"container {name} is mounted; unmount it first, or remove it with --force")
            with self._keeper.busy(stored.record.mount_id, stored.record.init_id):
                self._remove_trees(name, stored.record.mount_id, stored.record.init_id)
                stored.references.discard(layer)
                with self._lock:
                    del self._mounts[name]
            if stored.parent is None:
                return []
            return self.layers.unreference(stored.parent, keep=keep_parents)

    def remove_unreadable(self, name: str) -> bool:
        """See :meth:`LayerStore.remove_unreadable_rw_layer`."""
        self.records.check_writable()
        with self._names.hold(name):
            damaged = self._claims.find("mount", name)
            if damaged is None:
                raise MountDoesNotExistError(
                    f"there is no damaged container {name[:100]}; unionfs fsck tells what is damaged"
                )
            needed = self._keeper.needed() | self._claims.trees(but=damaged)
            trees = [tree for tree in damaged.trees if tree not in needed and not damaged.shared]
            with self._keeper.busy(*trees):
                self._remove_trees(name, *trees)
            self._claims.drop("mount", name)
            return bool(trees)

    def _remove_trees(self, name: str, *trees: str) -> None:
        removal = self.records.remove_mount(name)

        def put_back() -> bool:
            removal.undo()
            return True

        self._keeper.remove(removal, put_back, *trees)


def _check_same_mount(known: StoredMount, record: MountRecord) -> None:
    if known.record.mount_id != record.mount_id:
        raise MountNameConflictError(
            f"there is a container {known.name} already, of the tree {known.record.mount_id}; choose another name"
        )
    if known.record.parent != record.parent:
        raise MountNameConflictError(f"container {known.name} stands on {known.record.parent or 'nothing'}; name that")
