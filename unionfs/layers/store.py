"""The layer store: which layers there are, who needs them, and how they come and go.

The semantics of the calls, of handles and of the counts are those of Docker's ``layer`` package; what is different is
said where it is. :class:`LayerStore` only tells its parts what to do, and each of them has locks of its own:

- :class:`unionfs.layers.rw_layers.RWTable`: the read-write layers;
- :class:`unionfs.layers.registration.Registrar`: layers that come in;
- :class:`unionfs.layers.references.ReferenceTable`: the read-only layers, with their handles and counts;
- :class:`unionfs.layers.trees.TreeKeeper`: the driver's trees;
- :class:`unionfs.layers.claims.Claims`: what may be needed without being counted.

Who holds a lock takes only those of parts further down in this list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver
from unionfs.host.locks import StoreLock
from unionfs.layers.claims import Claims
from unionfs.layers.identity import ChainID
from unionfs.layers.ingest import Progress
from unionfs.layers.layer import Layer, LayerHandle
from unionfs.layers.metadata import Descriptor, IncompleteTransaction, MetadataStore, Unreadable
from unionfs.layers.references import ReferenceTable
from unionfs.layers.registration import Registrar
from unionfs.layers.rw_layers import RWLayer, RWTable
from unionfs.layers.state import LayerMetadata, StoredMount, load
from unionfs.layers.trees import TreeKeeper


class LayerStore:
    """All layers of one driver. It may be used from many threads at once.

    With records that are only looked at, nothing is recovered, and every change is an error.

    Attributes:
        driver: keeps the trees.
        records: keeps what is known about them.
        claims: what may be needed without being counted.

    Args:
        driver, records: see above.
        lock: held as long as the store is open, and released by :meth:`close`; None: the caller sees to that.
        recover: finish what a crash left half done. Only to look at a store as it is, leave it off.

    Raises:
        OSError: the metadata cannot be listed. A layer that cannot be read is no error: see :attr:`unreadable`.
    """

    def __init__(
        self, driver: Driver, records: MetadataStore, lock: StoreLock | None = None, *, recover: bool = True
    ) -> None:
        loaded = load(records, driver)
        self.driver = driver
        self.records = records
        self.claims = Claims(loaded.unreadable, driver.exists, loaded.layers.__contains__)
        self._keeper = TreeKeeper(driver, records, self.claims)
        self._layers = ReferenceTable(loaded.layers, driver, records, self._keeper, self.claims)
        self._registrar = Registrar(driver, records, self._keeper, self._layers)
        self._rw_layers = RWTable(loaded.mounts, driver, records, self._keeper, self.claims, self._layers)
        self._lock = lock
        if recover and not records.read_only:
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

    def cleanup(self) -> None:
        """Finish removals that failed, and end all mounts: for the end of the program that runs the containers."""
        self.records.check_writable()
        self.recover()
        self.driver.cleanup()

    @property
    def driver_name(self) -> str:
        """The driver's name."""
        return self.driver.name

    def driver_status(self) -> list[tuple[str, str]]:
        """The driver's facts about itself, in order."""
        return self.driver.status()

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
        return self._registrar.register(stream, parent, None, expected_diff_id, progress)

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
        return self._registrar.register(stream, parent, descriptor, expected_diff_id, progress)

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
        return self._registrar.adopt(tree, parent, record)

    def get(self, chain_id: str) -> LayerHandle:
        """A new handle on a layer, to be released on its own.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        return self._layers.get(chain_id)

    def map(self) -> dict[ChainID, Layer]:
        """All layers. These views pin nothing and cannot be released."""
        return self._layers.map()

    def reference_count(self, chain_id: str) -> int:
        """How many handles, layers and read-write layers need a layer directly.

        Raises:
            LayerDoesNotExistError: there is none of this chain id.
        """
        return self._layers.reference_count(chain_id)

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
        return self._layers.release(layer, keep_parents=keep_parents)

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
        return self._rw_layers.create(name, parent, mount_label, init, storage_options)

    def adopt_rw_layer(self, name: str, tree: str, parent: str = "") -> RWLayer:
        """Make a tree that the driver has already a read-write layer (Docker's CreateRWLayerByGraphID); a handle on it.

        A tree ``TREE-init`` becomes its init layer. Adopting the same once more only gives another handle. A damaged
        record of that name and tree is replaced.

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
        return self._rw_layers.adopt(name, tree, parent)

    def get_rw_layer(self, name: str) -> RWLayer:
        """A new handle on a read-write layer, to be released on its own.

        Raises:
            MountDoesNotExistError: there is none of this name.
        """
        return self._rw_layers.get(name)

    def get_mount_id(self, name: str) -> str:
        """The driver's id of a read-write layer's tree.

        Raises:
            MountDoesNotExistError: there is none of this name.
        """
        return self._rw_layers.mount_id(name)

    def rw_layers(self) -> dict[str, StoredMount]:
        """All read-write layers by name, to look at."""
        return self._rw_layers.all()

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
        return self._rw_layers.release(layer, force=force, keep_parents=keep_parents)

    def remove_unreadable_rw_layer(self, name: str) -> bool:
        """Remove a read-write layer whose record cannot be used, with those of its trees that the record names.

        Returns:
            Whether it named a tree. If not, its files are a tree that nothing names now.

        Raises:
            MountDoesNotExistError: there is no such damaged read-write layer of this name.
            DriverError: a tree could not be removed. The record is still there.
        """
        return self._rw_layers.remove_unreadable(name)

    # What is damaged, half done, or nobody's

    @property
    def unreadable(self) -> list[Unreadable]:
        """What is stored but cannot be used, with reasons. Such a layer can be registered again; the name of such a
        read-write layer is taken until the record is put right or removed."""
        return self.claims.unreadable

    def driver_ids(self) -> set[str]:
        """The trees that layers and read-write layers stand on, and those that are being made or removed."""
        return self._keeper.needed()

    def incomplete(self) -> list[IncompleteTransaction]:
        """What a crash or a failure left half done, without the operations that are under way."""
        return self._keeper.incomplete()

    def finish(self, one: IncompleteTransaction) -> bool:
        """Remove what belongs to it; False if that failed, with a line in the log."""
        return self._keeper.finish(one)

    def recover(self) -> list[IncompleteTransaction]:
        """Finish what a crash or a failure left half done; returns what is still left, which is tried again later."""
        return [one for one in self.incomplete() if not self.finish(one)]

    def orphans(self) -> dict[str, str]:
        """Trees that no record names, each with the reason why it stays all the same, empty for one of no use.

        None for a driver that cannot list what it has.
        """
        return self._keeper.orphans()

    def is_gone(self, tree: str) -> bool:
        """Whether a tree is neither there nor named nor possibly meant by anything."""
        return self._keeper.is_gone(tree)
