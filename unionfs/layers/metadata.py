"""What a layer store keeps about its layers, and the contract for where it is kept.

The store's own code knows only this contract. Its promises:

- What a transaction or :meth:`MetadataStore.commit_mount` committed is there after a crash or loss of power at any
  later time, and whole; what was not committed is not listed.
- The storage a transaction is for is recorded before that storage is made, and storage that is to be removed stays
  recorded until it is gone. So :meth:`MetadataStore.incomplete` names everything that a crash can leave behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from unionfs.layers.identity import NO_CHAIN, ChainID, DiffID


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Where a layer came from, for layers that are not to be uploaded. OCI image specification, descriptor.md.

    Attributes:
        media_type: of the blob.
        digest: of the blob, as it is transferred.
        size: of the blob in bytes.
        urls: where else it can be fetched.
        annotations: free keys and values.
        platform: as in an image index.
    """

    media_type: str = ""
    digest: str = ""
    size: int = 0
    urls: tuple[str, ...] = ()
    annotations: dict[str, str] = field(default_factory=dict)
    platform: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """A read-only layer.

    Attributes:
        diff_id: of the layer's own stream.
        size: the layer's own size in bytes, as the driver counted it.
        cache_id: the driver's id of its tree.
        parent: the chain below, or ``""``.
        descriptor: where it came from, if that was told.
    """

    diff_id: DiffID
    size: int
    cache_id: str
    parent: ChainID = NO_CHAIN
    descriptor: Descriptor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    """A read-write layer.

    Attributes:
        mount_id: the driver's id of its tree.
        init_id: the driver's id of the tree between it and its parent, or ``""``.
        parent: the chain below, or ``""``.
    """

    mount_id: str
    init_id: str = ""
    parent: ChainID = NO_CHAIN


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Something stored that cannot be used.

    Attributes:
        kind: ``layer``, ``mount``, or ``stray`` for what lies among the layers under a name that is none of a layer.
        name: its chain id or name.
        path: the file to look at.
        reason: one line for people, with the file in it.
        trees: the driver's ids that it names, as far as they can be read; the one with its own files first.
        shared: its tree is named by another record too, so one of the two means another tree.
        parent: the chain it stands on, ``""`` for none; None when nobody can tell.
    """

    kind: str
    name: str
    path: str
    reason: str
    trees: tuple[str, ...] = ()
    shared: bool = False
    parent: ChainID | None = None

    def __str__(self) -> str:
        return f"{'container' if self.kind == 'mount' else self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class IncompleteTransaction:
    """What an unfinished operation left, or a removal has still to do.

    Attributes:
        path: the directory that stands for it.
        driver_ids: trees that go with it, in the order to remove them.
        what: for people.
    """

    path: str
    driver_ids: tuple[str, ...]
    what: str


class TarSplitWriter(Protocol):
    """Takes the lines of a record."""

    def write(self, data: bytes, /) -> object:
        """Add to the record."""

    def close(self) -> None:
        """The record is complete, and on stable storage when this returns."""


class Transaction(Protocol):
    """A layer that is being registered. Ends with one :meth:`commit` or :meth:`cancel`."""

    @property
    def location(self) -> str:
        """The path of what is being written."""

    def spool(self) -> BinaryIO:
        """A temporary file on the store's file system, which is gone when it is closed."""

    def tar_split_writer(self) -> TarSplitWriter:
        """Start the record of the stream; one that was begun before is dropped."""

    def commit(self, chain_id: ChainID, record: LayerRecord) -> None:
        """Make it the layer ``chain_id``. A damaged layer of that name makes way.

        Raises:
            OSError: it could not be written; the transaction is still to be cancelled.
        """

    def cancel(self) -> None:
        """Forget it. The storage it was for must be gone by now."""


class MountTransaction(Protocol):
    """A read-write layer that is being made."""

    def commit(self) -> None:
        """It exists now, under its name. Raises :class:`OSError` when it could not be written."""

    def cancel(self) -> None:
        """Forget it. The storage it was for must be gone by now."""


class Removal(Protocol):
    """A layer that is not listed any more, but whose storage may still be there."""

    def finish(self) -> None:
        """Its storage is gone: forget it."""

    def undo(self) -> None:
        """Its storage could not be removed: list it again."""


class MetadataStore(Protocol):
    """The contract. Methods that take a chain id or a name expect it valid.

    Those that change something raise :class:`LayerStoreError` when the store is only looked at.
    """

    @property
    def read_only(self) -> bool:
        """Whether the store is only looked at."""

    def check_writable(self) -> None:
        """Raise :class:`LayerStoreError` when the store is only looked at."""

    def list_layers(self) -> list[ChainID]:
        """The chain ids of all layers, readable or not, sorted."""

    def list_mounts(self) -> list[str]:
        """The names of all read-write layers, readable or not, sorted."""

    def layer(self, chain_id: ChainID) -> LayerRecord:
        """The layer's record.

        Raises:
            MetadataError: it is not there, or a part is missing or damaged.
        """

    def mount(self, name: str) -> MountRecord:
        """The read-write layer's record.

        Raises:
            MetadataError: as for :meth:`layer`.
        """

    def strays(self) -> list[Unreadable]:
        """What lies among the layers and is neither one nor on its way out. It may be one that somebody renamed."""

    def unreadable(self, kind: str, name: str, reason: str) -> Unreadable:
        """What can be read of a record that cannot be used.

        Args:
            kind: ``layer`` or ``mount``.
            name: its chain id or name.
            reason: why it cannot be used; begins with the path of a file and a colon.
        """

    def begin(self, cache_id: str, *, adopting: bool = False) -> Transaction:
        """Start registering a layer whose tree is going to be ``cache_id``.

        When ``adopting``, that tree is there already and belongs to somebody else until the commit, so it is never
        among the :meth:`incomplete`.
        """

    def begin_mount(self, name: str, record: MountRecord, *, adopting: bool = False) -> MountTransaction:
        """Start making a read-write layer. A damaged one of that name makes way at the commit.

        ``adopting`` is as for :meth:`begin`.

        Raises:
            LayerStoreError: the name cannot be one.
        """

    def tar_split(self, chain_id: ChainID) -> BinaryIO | None:
        """The stream's record, compressed or not; None when the layer has none."""

    def tar_split_path(self, chain_id: ChainID) -> str:
        """Where that is, for messages."""

    def remove_layer(self, chain_id: ChainID) -> Removal:
        """Take the layer off the list; it will not come back, except by :meth:`Removal.undo`."""

    def remove_mount(self, name: str) -> Removal:
        """Take the read-write layer off the list."""

    def incomplete(self) -> list[IncompleteTransaction]:
        """What unfinished operations left behind, also those under way right now."""

    def forget(self, leftover: IncompleteTransaction) -> None:
        """Its storage is gone: delete what stands for it."""
