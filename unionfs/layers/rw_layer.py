"""Read-write layers: a container's own tree over a chain of read-only ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from unionfs.archive.changes import Change
from unionfs.archive.tar_reader import Readable
from unionfs.errors import NotMountedError
from unionfs.layers.layer import Layer, LayerMetadata, StoredLayer
from unionfs.layers.metadata import MountRecord

if TYPE_CHECKING:
    from unionfs.layers.read_write import ReadWriteLayers


@dataclass(eq=False, slots=True)
class StoredMount:
    """A read-write layer in the store's memory; the lock of its name guards it.

    Attributes:
        references: handles that are out; they compare by identity.
        mounts: how often this process has it mounted.
    """

    name: str
    record: MountRecord
    parent: StoredLayer | None
    references: set[object] = field(default_factory=set)
    mounts: int = 0

    @property
    def driver_parent(self) -> str:
        """What the driver compares the tree with: the init layer hides what it put there."""
        if self.record.init_id:
            return self.record.init_id
        return self.parent.record.cache_id if self.parent is not None else ""


class RWLayer:
    """A reference to a read-write layer, which is removed with its last reference.

    Not a context manager, because leaving the block would remove a container's data; :meth:`mounted` is one.
    """

    def __init__(self, stored: StoredMount, store: ReadWriteLayers) -> None:
        self.stored = stored
        self._store = store

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
        return None if self.stored.parent is None else self._store.view(self.stored.parent)

    def mount(self, mount_label: str = "") -> str:
        """Mount it if it is not yet, and return the path of its root. To be undone by one :meth:`unmount`.

        Args:
            mount_label: SELinux context for all files; empty for none.

        Raises:
            MountError: the mount failed.
            LayerNotFoundError: the tree is gone.
        """
        self._store.records.check_writable()
        path = self._store.driver.get(self.stored.record.mount_id, mount_label)
        with self._store.counting:
            self.stored.mounts += 1
        return path

    def unmount(self) -> None:
        """Undo one :meth:`mount`, also one of a process that had the store open before.

        Raises:
            NotMountedError: it is not mounted.
        """
        self._store.records.check_writable()
        with self._store.counting:
            known = self.stored.mounts > 0
            if known:
                self.stored.mounts -= 1
        if not known and not self.is_mounted():
            raise NotMountedError(f"{self.name}: is not mounted; mount it first")
        self._store.driver.put(self.stored.record.mount_id)

    def is_mounted(self) -> bool:
        """Whether somebody has it mounted: this process, or the host's mount table says so."""
        return self.stored.mounts > 0 or self._store.is_in_mount_table(self.stored.record.mount_id)

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
        return self._store.driver.diff_size(self.stored.record.mount_id, self.stored.driver_parent)

    def changes(self) -> list[Change]:
        """What was changed in it, without what the init layer did."""
        return self._store.driver.changes(self.stored.record.mount_id, self.stored.driver_parent)

    def tar_stream(self) -> BinaryIO:
        """The changes as a layer: an uncompressed tar stream, which the caller closes."""
        return self._store.driver.diff(self.stored.record.mount_id, self.stored.driver_parent)

    def apply_diff(self, stream: Readable) -> int:
        """Apply a layer's uncompressed tar stream to it; the size of what it holds then, in bytes."""
        self._store.records.check_writable()
        return self._store.driver.apply_diff(self.stored.record.mount_id, self.stored.driver_parent, stream)

    def metadata(self) -> dict[str, str]:
        """The driver's facts about the tree, and its name as ``ID``."""
        return {"ID": self.name, **self._store.driver.get_metadata(self.stored.record.mount_id)}

    def release(self) -> list[LayerMetadata]:
        """Give the reference back; see :meth:`LayerStore.release_rw_layer`."""
        return self._store.release_rw_layer(self)
