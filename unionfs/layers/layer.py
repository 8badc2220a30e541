"""Read-only layers as a caller sees them: views, which pin nothing, handles, which do, and the empty layer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import closing
from types import TracebackType
from typing import BinaryIO, cast

from unionfs.archive.stream import PieceStream
from unionfs.archive.tar_format import END_OF_ARCHIVE
from unionfs.drivers.contract import Driver, capabilities_of
from unionfs.drivers.files import file_getter
from unionfs.errors import LayerDamagedError, LayerStoreError, UnionfsError
from unionfs.layers.identity import ALGORITHM, ChainID, DiffID, diff_id_of
from unionfs.layers.metadata import Descriptor, MetadataStore
from unionfs.layers.state import LayerMetadata, StoredLayer
from unionfs.layers.tar_split import assemble, read_entries, verified

_PIECE_BYTES = 1 << 20


class Layer:
    """A read-only layer. What the store's ``map`` and the ``parent`` attributes give pins nothing: it may go away.

    Two objects for one layer are two objects: compare their ``chain_id``.
    """

    def __init__(self, stored: StoredLayer, driver: Driver, records: MetadataStore) -> None:
        self.stored = stored
        self._driver = driver
        self._records = records

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.chain_id}>"

    @property
    def chain_id(self) -> ChainID:
        """The layer together with all below it."""
        return self.stored.chain_id

    @property
    def diff_id(self) -> DiffID:
        """The layer's own contents."""
        return self.stored.record.diff_id

    @property
    def cache_id(self) -> str:
        """The driver's id of the layer's tree."""
        return self.stored.record.cache_id

    @property
    def parent(self) -> Layer | None:
        """The layer below; None for a base layer."""
        if self.stored.parent is None:
            return None
        return Layer(self.stored.parent, self._driver, self._records)

    @property
    def os(self) -> str:
        """The operating system that the layer is for; always empty on Linux, as in Docker."""
        return ""

    @property
    def depth(self) -> int:
        """How many layers the chain has, 1 for a base layer."""
        return self.stored.depth()

    @property
    def size(self) -> int:
        """Bytes of this layer and all below it: file lengths, not disk blocks."""
        return self.stored.chain_size()

    @property
    def diff_size(self) -> int:
        """Bytes of this layer alone."""
        return self.stored.record.size

    @property
    def descriptor(self) -> Descriptor | None:
        """Where the layer came from, if that was told when it was registered."""
        return self.stored.record.descriptor

    def metadata(self) -> dict[str, str]:
        """The driver's facts about the tree: its directories on disk, by Docker's keys."""
        return self._driver.get_metadata(self.cache_id)

    def tar_stream(self) -> BinaryIO:
        """The very bytes that the layer was registered with. The caller closes the stream.

        Reading raises :class:`LayerDamagedError` when a file is not what it was, at the latest at the end: whoever
        stops before the end has unverified bytes. Reading in full is what :meth:`verify` does.

        Raises:
            LayerDamagedError: the record of the stream is missing.
        """
        record = self._records.tar_split(self.chain_id)
        if record is None and not _gives_exact_diffs(self._driver):
            raise LayerDamagedError(
                f"{self._records.tar_split_path(self.chain_id)}: is missing, so layer {self.chain_id} cannot be "
                "exported; remove the layer and register it again"
            )
        if record is None:
            below = self.stored.parent.record.cache_id if self.stored.parent is not None else ""
            pieces = _read_all(self._driver.diff(self.cache_id, below))
        else:
            pieces = self._assembled(record)
        return cast(BinaryIO, PieceStream(verified(pieces, self.diff_id)))

    def _assembled(self, record: BinaryIO) -> Iterator[bytes]:
        with record:
            files = file_getter(self._driver, self.cache_id)
            try:
                yield from assemble(read_entries(record, self._records.tar_split_path(self.chain_id)), files)
            finally:
                files.close()

    def tar_stream_from(self, ancestor: str = "") -> BinaryIO:
        """The changes since a layer further down, made from the trees. No digest belongs to it.

        Args:
            ancestor: the chain id of a layer below this one; ``""`` for everything, flattened.

        Raises:
            LayerStoreError: ``ancestor`` is not below this layer.
        """
        below = ""
        if ancestor:
            for layer in self.stored.chain():
                if layer.chain_id == ancestor and layer is not self.stored:
                    below = layer.record.cache_id
                    break
            else:
                raise LayerStoreError(
                    f"layer ID '{ancestor}' is not a parent of the specified layer: cannot provide diff to non-parent; "
                    f"name one of the layers below {self.chain_id}"
                )
        return self._driver.diff(self.cache_id, below)

    def verify(self) -> int:
        """Read the whole layer and compare it with its digest; its length in bytes as a tar stream.

        Raises:
            LayerDamagedError: it is not what was registered; the message names the file where that is known.
            TarSplitError: the record of the stream is damaged.
        """
        length = 0
        with self.tar_stream() as stream:
            while piece := stream.read(_PIECE_BYTES):
                length += len(piece)
        return length

    def damages(self) -> list[str]:
        """What is wrong with each of its files that is not what was registered, one line each; none if all is well.

        Reads the whole layer, as :meth:`verify` does, which stops at the first.
        """
        record = self._records.tar_split(self.chain_id)
        if record is None:
            try:
                self.verify()
            except (UnionfsError, OSError) as error:
                return [str(error)]
            return []
        found: list[str] = []
        digest = hashlib.sha256()
        try:
            with record, closing(file_getter(self._driver, self.cache_id)) as files:
                for entry in read_entries(record, self._records.tar_split_path(self.chain_id)):
                    try:
                        for piece in assemble([entry], files):
                            digest.update(piece)
                    except (LayerDamagedError, OSError) as error:
                        found.append(str(error))
        except (UnionfsError, OSError) as error:
            return [*found, str(error)]  # without the rest of the record nobody knows which files there are
        if not found and f"{ALGORITHM}:{digest.hexdigest()}" != self.diff_id:
            found.append(f"its contents are not {self.diff_id}, as they were; pull or register the layer again")
        return found


def _gives_exact_diffs(driver: Driver) -> bool:
    return capabilities_of(driver).reproduces_exact_diffs


def _read_all(stream: BinaryIO) -> Iterator[bytes]:
    with stream:
        while piece := stream.read(_PIECE_BYTES):
            yield piece


class LayerHandle(Layer):
    """A reference to a layer: until it is released the layer stays. As a context manager it releases itself."""

    def __init__(
        self,
        stored: StoredLayer,
        driver: Driver,
        records: MetadataStore,
        release: Callable[[Layer], list[LayerMetadata]],
    ) -> None:
        super().__init__(stored, driver, records)
        self._release = release

    def release(self) -> list[LayerMetadata]:
        """Give the reference back; see :meth:`LayerStore.release`."""
        return self._release(self)

    def __enter__(self) -> LayerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


EMPTY_DIFF_ID: DiffID = diff_id_of(END_OF_ARCHIVE)


def is_empty(diff_id: str) -> bool:
    """Whether ``diff_id`` is the empty layer's."""
    return diff_id == EMPTY_DIFF_ID


class EmptyLayer:
    """Answers as a layer does. There is one, :data:`EMPTY_LAYER`."""

    chain_id = ChainID(EMPTY_DIFF_ID)
    diff_id = EMPTY_DIFF_ID
    parent = None
    os = ""
    size = 0
    diff_size = 0

    def tar_stream(self) -> BinaryIO:
        """1024 zero bytes."""
        return io.BytesIO(END_OF_ARCHIVE)

    def tar_stream_from(self, ancestor: str = "") -> BinaryIO:
        """The same for ``""``.

        Raises:
            LayerStoreError: for any other ancestor, there is none.
        """
        if ancestor:
            raise LayerStoreError("can't get parent tar stream of an empty layer; leave the ancestor out")
        return self.tar_stream()

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


EMPTY_LAYER = EmptyLayer()
