"""Layers on their way to become an image, and what it takes to undo that.

Whatever brings the layers (an archive, a directory, a registry) goes through here: what is there already is shared,
what comes in is checked against the configuration, and a failure leaves no image and none of the new layers.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Protocol

from unionfs.engines.images.model import Image, parse_image
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.store import ImageStore
from unionfs.errors import DigestMismatchError, ImageError, ImageFormatError, LayerDoesNotExistError, UnionfsError
from unionfs.layers import ChainID, LayerHandle, create_chain_id
from unionfs.layers.identity import ALGORITHM

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20


class Report(Protocol):
    """Told how far a layer is; called often, on any thread."""

    def __call__(self, layer: str, stage: str, done: int, total: int | None) -> None:
        """Take note.

        Args:
            layer: its diff id.
            stage: ``exists``, ``waiting``, ``downloading``, ``unpacking``, ``compressing``, ``uploading`` or ``done``.
            done: bytes, of what the stage handles.
            total: bytes, if that is known.
        """


def no_report(layer: str, stage: str, done: int, total: int | None) -> None:
    """Nobody wants to know."""


class Seekable(Protocol):
    """What a layer is read from: twice, if a later entry of it replaces the contents of an earlier one."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""

    def seek(self, offset: int, /) -> int:
        """Go to an offset from the start."""

    def tell(self) -> int:
        """The offset from the start."""


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A layer as a source has it.

    Attributes:
        open: gives its bytes, which may be compressed, from the start; seekable.
        digest: of those bytes; ``""`` when the source does not tell.
        size: of those bytes.
    """

    open: Callable[[], BinaryIO]
    digest: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image as a source has it.

    Attributes:
        config_bytes: its configuration.
        layers: the lowest first.
        names: that the source gives it.
    """

    config_bytes: bytes
    layers: Sequence[LayerBlob]
    names: tuple[Reference, ...] = ()


class Installation:
    """One image that is being stored. Ends with :meth:`commit`; leaving the ``with`` block without undoes all.

    Args:
        images: where it goes.
        config_bytes: its configuration, which decides what its layers must be.
        report: see :class:`Report`.

    Raises:
        ImageFormatError: the configuration is none.
    """

    def __init__(self, images: ImageStore, config_bytes: bytes, report: Report = no_report) -> None:
        self.image = parse_image(config_bytes)
        self._images = images
        self._layers = images.layers
        self._report = report
        self._stopped = threading.Event()
        self._found: list[LayerHandle] = []
        self._new: list[LayerHandle] = []
        self._at = 0
        self._committed = False

    def chain_id(self, number: int) -> ChainID:
        """Of the layers up to ``number``, which counts from 0."""
        return create_chain_id(self.image.diff_ids[: number + 1])

    def skip_known(self) -> int:
        """Take the layers that are in the store already, from the lowest up; how many of all there are now."""
        while self._at < len(self.image.diff_ids):
            try:
                handle = self._layers.get(self.chain_id(self._at))
            except LayerDoesNotExistError:
                break
            self._found.append(handle)
            self._report(self.image.diff_ids[self._at], "exists", 0, None)
            self._at += 1
        return self._at

    def add_layer(self, stream: Seekable, size: int | None = None) -> None:
        """Store the next layer, or share the one that is there.

        Args:
            stream: its bytes, compressed or not.
            size: how many, if that is known.

        Raises:
            DigestMismatchError: it is another layer.
            ArchiveError: it is damaged.
        """
        diff_id = self.image.diff_ids[self._at]
        parent = self.chain_id(self._at - 1) if self._at else ""
        watched = _Watched(stream, self._stopped, lambda done: self._report(diff_id, "unpacking", done, size))
        handle = self._layers.register(watched, parent, expected_diff_id=diff_id)
        self._new.append(handle)
        self._at += 1
        self._report(diff_id, "done", size or 0, size)

    def stop(self) -> None:
        """Let :meth:`add_layer` on another thread fail soon."""
        self._stopped.set()

    def commit(self, names: Iterable[Reference] = ()) -> Image:
        """All layers are there: make it an image.

        Raises:
            ImageFormatError: layers are missing.
        """
        if self._at != len(self.image.diff_ids):
            raise ImageFormatError(f"the image has {len(self.image.diff_ids)} layers, but {self._at} were given")
        image = self._images.add(self.image.config_bytes, names)
        self._committed = True
        return image

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in reversed(self._new):
            try:
                # The layers below may be somebody's who holds nothing just now: only what is ours goes.
                self._layers.release(handle, keep_parents=True)
            except (UnionfsError, OSError) as problem:
                _log.warning("%s: stays until unionfs gc --layers: %s", handle.chain_id, problem)
        for handle in self._found:
            # To give the last handle back would remove a layer that was there before.
            if self._committed or self._layers.reference_count(handle.chain_id) > 1:
                self._layers.release(handle, keep_parents=True)


def install(
    images: ImageStore, found: FoundImage, names: Iterable[Reference] | None = None, report: Report = no_report
) -> Image:
    """Store an image whose layers are at hand.

    Args:
        images: where it goes.
        found: what a source has.
        names: instead of those that the source gives.
        report: see :class:`Report`.

    Raises:
        ImageFormatError: the image contradicts itself.
        DigestMismatchError: a layer is not what it should be.
        ArchiveError: a layer is damaged.
    """
    with Installation(images, found.config_bytes, report) as installation:
        diff_ids = installation.image.diff_ids
        if len(diff_ids) != len(found.layers):
            raise ImageFormatError(
                f"the image's configuration names {len(diff_ids)} layers, but there are {len(found.layers)}"
            )
        for blob in found.layers[installation.skip_known() :]:
            with blob.open() as stream:
                checked = _Digesting(stream, blob)
                installation.add_layer(checked, blob.size or None)
                checked.finish()
        return installation.commit(found.names if names is None else names)


class _Through:
    """A stream that is read through, to its own end."""

    def __init__(self, stream: Seekable) -> None:
        self._stream = stream

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, /) -> int:
        return self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()


class _Watched(_Through):
    """A stream that tells how far it is, and fails when it is to stop."""

    def __init__(self, stream: Seekable, stopped: threading.Event, progress: Callable[[int], None]) -> None:
        super().__init__(stream)
        self._stopped = stopped
        self._progress = progress

    def read(self, size: int, /) -> bytes:
        if self._stopped.is_set():
            raise ImageError("stopped")
        piece = self._stream.read(size)
        self._progress(self._stream.tell())
        return piece


class _Digesting(_Through):
    """A stream that checks the digest of all its bytes, each counted the first time it is read."""

    def __init__(self, stream: Seekable, blob: LayerBlob) -> None:
        super().__init__(stream)
        self._blob = blob
        self._digest = hashlib.sha256()
        self._seen = 0

    def read(self, size: int, /) -> bytes:
        at = self._stream.tell()
        piece = self._stream.read(size)
        if at <= self._seen < at + len(piece):
            self._digest.update(memoryview(piece)[self._seen - at :])
            self._seen = at + len(piece)
        return piece

    def finish(self) -> None:
        """Read what is left, and compare.

        Raises:
            DigestMismatchError: it is not what the source said.
        """
        if not self._blob.digest:
            return
        self._stream.seek(self._seen)
        while self.read(_PIECE_BYTES):
            pass
        found = f"{ALGORITHM}:{self._digest.hexdigest()}"
        if found != self._blob.digest:
            raise DigestMismatchError(
                f"a layer's blob is {found}, but {self._blob.digest} was expected; fetch it again"
            )
