"""The read-write layers of a store: how they are made on read-only ones, and how they go with their last handle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from unionfs.drivers.contract import CreateOptions, Driver
from unionfs.errors import (
    ActiveMountError,
    LayerNotRetainedError,
    LayerStoreError,
    MountDoesNotExistError,
    MountNameConflictError,
    UnionfsError,
)
from unionfs.host import mountinfo
from unionfs.host.locks import NamedLocks
from unionfs.layers.identity import INIT_SUFFIX, NO_CHAIN, ChainID, is_valid_id, new_id
from unionfs.layers.layer import LayerMetadata
from unionfs.layers.metadata import MetadataStore, MountRecord, MountTransaction
from unionfs.layers.read_only import Pin, ReadOnlyLayers
from unionfs.layers.rw_layer import RWLayer, StoredMount


class ReadWriteLayers(ReadOnlyLayers):
    """The part of a :class:`LayerStore` that keeps the read-write layers."""

    def __init__(self, driver: Driver, records: MetadataStore) -> None:
        super().__init__(driver, records)
        self.counting = threading.Lock()
        """Guards the numbers of mounts."""
        self._names = NamedLocks()  # each guards the read-write layer of its name

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
        self.records.check_writable()
        with self._names.hold(name):
            with self._mount_lock:
                if name in self._mounts:
                    raise MountNameConflictError(
                        f"mount already exists with name {name}; choose another name, or remove that one first"
                    )
            if damaged := self.claims.find("mount", name):
                # Its files would be nobody's then.
                raise MountNameConflictError(
                    f"mount already exists with name {name}, but cannot be read: {damaged.reason}; put that right, or "
                    f"remove it with its files: unionfs container rm --force {name}"
                )
            mount_id = new_id()
            init_id = mount_id + INIT_SUFFIX if init is not None else ""
            with self._pinned(parent) as pin, self._at_work(mount_id, init_id):
                record = MountRecord(
                    mount_id=mount_id,
                    init_id=init_id,
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
        self.records.check_writable()
        if not is_valid_id(tree) or tree.endswith(INIT_SUFFIX):
            raise LayerStoreError(
                f"invalid mount id value {tree[:100]!r}; a tree is adopted by its 64 hexadecimal digits"
            )
        self._check_exists(tree)
        init = tree + INIT_SUFFIX
        record = MountRecord(mount_id=tree, init_id=init if self.driver.exists(init) else "", parent=ChainID(parent))
        with self._names.hold(name):
            with self._mount_lock:
                known = self._mounts.get(name)
            if known is not None:
                _check_same_mount(known, record)
                return self._rw_handle(known)
            damaged = self.claims.find("mount", name)
            if damaged is not None and any(
                one not in (tree, init) and self.driver.exists(one) for one in damaged.trees
            ):
                raise MountNameConflictError(
                    f"mount already exists: {name} is of the tree {damaged.trees[0]}, but cannot be read: "
                    f"{damaged.reason}; choose another name"
                )
            with self._pinned(parent) as pin, self._claimed(tree, init, by=damaged):
                stored = StoredMount(name, record, pin.layer)
                transaction = self.records.begin_mount(name, record, adopting=True)
                try:
                    self._commit_mount(transaction, stored, pin)
                finally:
                    if not pin.keep:
                        self._abandon(transaction.cancel)
                return self._rw_handle(stored)

    def _commit_mount(self, transaction: MountTransaction, stored: StoredMount, pin: Pin) -> None:
        """Make it a read-write layer, once its trees are on the disk."""
        self._sync(stored.record.init_id, stored.record.mount_id)
        transaction.commit()
        pin.keep = True
        with self._mount_lock, self._layer_lock:
            self._mounts[stored.name] = stored
            self.claims.drop("mount", stored.name)

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

    def remove_unreadable_rw_layer(self, name: str) -> bool:
        """Remove a read-write layer whose record cannot be used, with those of its trees that the record names.

        Returns:
            Whether it named a tree. If not, its files are a tree that nothing names now.

        Raises:
            MountDoesNotExistError: there is no such damaged read-write layer of this name.
            DriverError: a tree could not be removed. The record is still there.
        """
        self.records.check_writable()
        with self._names.hold(name):
            damaged = self.claims.find("mount", name)
            if damaged is None:
                raise MountDoesNotExistError(f"mount does not exist: {name[:100]}; unionfs fsck tells what is damaged")
            needed = self.driver_ids() | self.claims.trees(but=damaged)
            trees = [tree for tree in damaged.trees if tree not in needed and not damaged.shared]
            with self._at_work("", *trees):
                self._remove_trees(self.records.remove_mount(name), *trees)
            self.claims.drop("mount", name)
            return bool(trees)

    def _delete_mount(self, stored: StoredMount) -> None:
        record = stored.record
        with self._at_work(record.mount_id, record.init_id):
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


def _check_same_mount(known: StoredMount, record: MountRecord) -> None:
    if known.record.mount_id != record.mount_id:
        raise MountNameConflictError(
            f"mount already exists: {known.name} is of the tree {known.record.mount_id}; choose another name"
        )
    if known.record.parent != record.parent:
        raise MountNameConflictError(
            f"name conflict, mismatched parent: {known.name} stands on {known.record.parent or 'nothing'}; name that"
        )
