"""Differences for drivers that have none of their own: two mounted trees are compared entry by entry.

The semantics are those of Docker's ``NaiveDiffDriver``. Two things are better: nanosecond times are
compared, so a stream need not wait for the next second when it is closed; and all xattrs, not the capability only.
An edit that keeps size, mode, owner and mtime is not seen: drivers with an upper directory do better.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from unionfs.archive.changes import Change, changes_of_trees, size_of
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.pack import PackOptions, pack_changes
from unionfs.archive.stream import held_stream
from unionfs.archive.tar_reader import Readable
from unionfs.archive.unpacking import UnpackOptions, unpack
from unionfs.drivers.contract import (
    Capabilities,
    CapabilityDriver,
    CreateOptions,
    DiffGetterDriver,
    FileGetCloser,
    ListingDriver,
    ProtoDriver,
    SyncingDriver,
)
from unionfs.drivers.files import TreeFiles


class NaiveDiff:
    """The four calls about differences over any :class:`ProtoDriver`.

    Args:
        proto: gives the trees.
        id_mapping: the owners' mapping: streams carry the container's ids, trees the host's.
        best_effort_xattrs: apply streams also where the file system takes no xattrs.
    """

    def __init__(
        self, proto: ProtoDriver, id_mapping: IdMapping | None = None, *, best_effort_xattrs: bool = False
    ) -> None:
        mapping = id_mapping or IdMapping()
        self._proto = proto
        self._pack = PackOptions(to_container=mapping.to_container)
        self._unpack = UnpackOptions(to_host=mapping.to_host, best_effort_xattrs=best_effort_xattrs)

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        """See :meth:`DiffDriver.diff`. Entries come in the byte order of their paths, with and without parent."""
        with ExitStack() as held:
            new, old = self._trees(held, layer_id, parent)
            pieces = pack_changes(changes_of_trees(new, old, all_xattrs=True), self._pack)
            return held_stream(pieces, held)

    def changes(self, layer_id: str, parent: str = "") -> list[Change]:
        """See :meth:`DiffDriver.changes`."""
        with ExitStack() as held:
            new, old = self._trees(held, layer_id, parent)
            return list(changes_of_trees(new, old, all_xattrs=True))

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        """See :meth:`DiffDriver.apply_diff`. The size is the sum of those in the stream's headers."""
        with self._got(layer_id) as root:
            return unpack(stream, root, self._unpack).size

    def diff_size(self, layer_id: str, parent: str = "") -> int:
        """See :meth:`DiffDriver.diff_size`."""
        with ExitStack() as held:
            new, old = self._trees(held, layer_id, parent)
            return size_of(changes_of_trees(new, old, all_xattrs=True))

    def _trees(self, held: ExitStack, layer_id: str, parent: str) -> tuple[str, str | None]:
        new = held.enter_context(self._got(layer_id))
        return new, held.enter_context(self._got(parent)) if parent else None

    @contextmanager
    def _got(self, layer_id: str) -> Iterator[str]:
        root = self._proto.get(layer_id)
        try:
            yield root
        finally:
            self._proto.put(layer_id)


class NaiveDiffDriver(NaiveDiff):
    """A complete driver made of a :class:`ProtoDriver` and :class:`NaiveDiff`.

    What the driver can do beyond the contract (listing, syncing, promises) is handed through.
    """

    @property
    def name(self) -> str:
        """See :attr:`ProtoDriver.name`."""
        return self._proto.name

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create`."""
        self._proto.create(layer_id, parent, options)

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""
        self._proto.create_read_write(layer_id, parent, options)

    def remove(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        self._proto.remove(layer_id)

    def get(self, layer_id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`."""
        return self._proto.get(layer_id, mount_label)

    def put(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        self._proto.put(layer_id)

    def exists(self, layer_id: str) -> bool:
        """See :meth:`ProtoDriver.exists`."""
        return self._proto.exists(layer_id)

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`."""
        return self._proto.status()

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.get_metadata`."""
        return self._proto.get_metadata(layer_id)

    def cleanup(self) -> None:
        """See :meth:`ProtoDriver.cleanup`."""
        self._proto.cleanup()

    def diff_getter(self, layer_id: str) -> FileGetCloser:
        """See :meth:`DiffGetterDriver.diff_getter`: through a mount unless the driver has better means."""
        if isinstance(self._proto, DiffGetterDriver):
            return self._proto.diff_getter(layer_id)
        root = self._proto.get(layer_id)
        try:
            return TreeFiles(root, lambda: self._proto.put(layer_id))
        except BaseException:
            self._proto.put(layer_id)
            raise

    def capabilities(self) -> Capabilities:
        """See :meth:`CapabilityDriver.capabilities`."""
        return self._proto.capabilities() if isinstance(self._proto, CapabilityDriver) else Capabilities()

    def layer_ids(self) -> list[str]:
        """See :meth:`ListingDriver.layer_ids`; empty when the driver cannot tell."""
        return self._proto.layer_ids() if isinstance(self._proto, ListingDriver) else []

    def sync(self, layer_id: str) -> None:
        """See :meth:`SyncingDriver.sync`; nothing when the driver cannot."""
        if isinstance(self._proto, SyncingDriver):
            self._proto.sync(layer_id)
