"""Pulling and pushing images: layers go side by side, and what is interrupted leaves nothing half done.

Pulled layers go into the store one on top of the other as they arrive. Of a push the diff ids of what arrives are
exactly those of the image, and the same image gives the same blobs each time.
"""

from __future__ import annotations

import hashlib
import io
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import BinaryIO, TypeVar, cast

import outcome
import trio

from unionfs.engines.images.export import LayerCompression, compressed, image_manifest
from unionfs.engines.images.install import Installation, Report, no_report
from unionfs.engines.images.manifest import (
    DOCKER_MANIFEST,
    OCI_MANIFEST,
    BlobDescriptor,
    Index,
    Manifest,
    choose,
    missing_layer,
    parse_manifest,
)
from unionfs.engines.images.model import MAX_CONFIG_BYTES, Image, Platform, digest_of
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.registry.blob_sources import BlobSources
from unionfs.engines.images.registry.client import ManifestRefusedError, RegistryClient
from unionfs.engines.images.registry.connection import Access, BlobMissingError
from unionfs.engines.images.store import ImageStore
from unionfs.engines.images.tar_files import Region
from unionfs.errors import ImageError, ImageFormatError
from unionfs.layers import Layer
from unionfs.layers.identity import ALGORITHM

_Result = TypeVar("_Result")

_MAX_NESTING = 4
_PIECE_BYTES = 1 << 20


async def pull(
    images: ImageStore,
    reference: Reference,
    *,
    platform: Platform | None = None,
    access: Access | None = None,
    report: Report = no_report,
) -> Image:
    """Fetch an image. What is cancelled or fails leaves nothing.

    Args:
        images: where it goes; it gets the name, and the one with the digest that the registry gave.
        reference: what to fetch; a digest is checked, and wins over a tag.
        platform: which one where there are several; None: this machine's.
        access: how the registry is reached.
        report: see :class:`unionfs.engines.images.install.Report`.

    Raises:
        ImageNotFoundError: the registry has no such image.
        RegistryError: it refused, or could not be reached.
        DigestMismatchError: something is not what it should be.
        ImageFormatError: it is no image that can be stored, or there is none for the platform.
    """
    reference = reference.with_default_tag()
    async with RegistryClient(reference.registry, reference.repository, access or Access()) as client:
        digest, manifest = await _find(client, reference, platform)
        config = await client.small_blob(manifest.config.digest, manifest.config.size, MAX_CONFIG_BYTES)
        with ExitStack() as stack:
            installation = stack.enter_context(Installation(images, config, report))
            image = installation.image
            if len(image.diff_ids) != len(manifest.layers):
                raise ImageFormatError(
                    f"{reference.familiar}: the manifest has {len(manifest.layers)} layers, but the configuration "
                    f"{len(image.diff_ids)}"
                )
            if platform is not None and not platform.runs(image.platform):
                raise ImageFormatError(f"{reference.familiar} is for {image.platform}, not for {platform}")
            await _fetch_layers(client, manifest, installation, stack, images, report, access or Access())
            names = [replace(reference, digest=digest)]
            stored = installation.commit(names)
        sources = BlobSources(images.root)
        for diff_id, layer in zip(stored.diff_ids, manifest.layers, strict=True):
            if layer.media_type.endswith("gzip"):
                sources.note(diff_id, layer.digest, reference)
        return stored


async def _find(client: RegistryClient, reference: Reference, platform: Platform | None) -> tuple[str, Manifest]:
    """The digest of what the name stands for, and the manifest for the platform."""
    contents, media_type = await client.manifest(reference.digest or reference.tag)
    top = digest_of(contents)
    for _ in range(_MAX_NESTING):
        found = parse_manifest(contents, media_type)
        if isinstance(found, Manifest):
            return top, found
        assert isinstance(found, Index)
        chosen = choose(found, platform, reference.familiar)
        contents, media_type = await client.manifest(chosen.digest)
        if len(contents) != chosen.size:
            raise ImageFormatError(f"{reference.familiar}: a manifest is not as large as its index says")
    raise ImageFormatError(f"{reference.familiar} has indexes in indexes, more than {_MAX_NESTING} deep")


@dataclass(slots=True)
class _Blob:
    """A blob that is being fetched, for one layer or several."""

    descriptor: BlobDescriptor
    diff_id: str
    file: BinaryIO
    arrived: trio.Event = field(default_factory=trio.Event)

    def open(self) -> BinaryIO:
        """All of it, from the start; there may be several readers."""
        region = Region(self.file.fileno(), 0, self.descriptor.size)
        return cast(BinaryIO, io.BufferedReader(region, _PIECE_BYTES))


async def _fetch_layers(
    client: RegistryClient,
    manifest: Manifest,
    installation: Installation,
    stack: ExitStack,
    images: ImageStore,
    report: Report,
    access: Access,
) -> None:
    known = installation.skip_known()
    wanted = list(zip(installation.image.diff_ids, manifest.layers, strict=True))[known:]
    blobs: dict[str, _Blob] = {}
    for diff_id, layer in wanted:
        if layer.digest not in blobs:
            blobs[layer.digest] = _Blob(layer, diff_id, stack.enter_context(images.spool()))
            report(diff_id, "waiting", 0, layer.size)
    limit = trio.CapacityLimiter(access.parallel)
    async with trio.open_nursery() as nursery:
        for blob in blobs.values():
            nursery.start_soon(_fetch, client, blob, limit, report)
        for _, layer in wanted:
            blob = blobs[layer.digest]
            await blob.arrived.wait()
            await _in_thread(partial(installation.add_layer, blob.open(), layer.size), installation.stop)


async def _fetch(client: RegistryClient, blob: _Blob, limit: trio.CapacityLimiter, report: Report) -> None:
    async with limit:
        size = blob.descriptor.size
        try:
            await client.download(
                blob.descriptor.digest,
                size,
                blob.file,
                lambda done: report(blob.diff_id, "downloading", done, size),
            )
        except BlobMissingError as error:
            raise missing_layer(blob.descriptor, error) from None
    blob.arrived.set()


async def push(
    images: ImageStore,
    image: Image,
    reference: Reference,
    *,
    access: Access | None = None,
    compression: LayerCompression = LayerCompression.GZIP,
    report: Report = no_report,
) -> str:
    """Give an image to a registry.

    Args:
        images: where it is.
        image: what to give.
        reference: what it is called there.
        access: how the registry is reached.
        compression: of the layers that are sent.
        report: see :class:`unionfs.engines.images.install.Report`.

    Returns:
        The manifest's digest.

    Raises:
        RegistryError: the registry refused, or could not be reached.
        LayerDamagedError: a layer is not what it was.
        ImageError: layers are missing, or the name has a digest.
    """
    if reference.digest:
        raise ImageError(f"{reference.familiar}: an image is pushed to a tag; its digest follows from what it is")
    reference = reference.with_default_tag()
    job = _Push(images, image, reference, access or Access(), compression, report)
    return await job.run()


class _Push:
    def __init__(
        self,
        images: ImageStore,
        image: Image,
        reference: Reference,
        access: Access,
        compression: LayerCompression,
        report: Report,
    ) -> None:
        self._images = images
        self._image = image
        self._reference = reference
        self._access = access
        self._compression = compression
        self._report = report
        self._sources = BlobSources(images.root)
        self._blobs: dict[str, tuple[str, int]] = {}

    async def run(self) -> str:
        layers = {layer.diff_id: layer for layer in self._images.layers_of(self._image)}
        where = self._reference
        async with RegistryClient(
            where.registry, where.repository, self._access, "pull,push", self._other_repositories()
        ) as client:
            limit = trio.CapacityLimiter(self._access.parallel)
            async with trio.open_nursery() as nursery:
                for layer in layers.values():
                    nursery.start_soon(self._layer, client, layer, limit)
            await self._config(client)
            blobs = [self._blobs[diff_id] for diff_id in self._image.diff_ids]
            manifest = await self._manifest(client, blobs)
        if self._compression is LayerCompression.GZIP:
            for diff_id, (digest, _) in self._blobs.items():
                self._sources.note(diff_id, digest, where)
        return digest_of(manifest)

    async def _manifest(self, client: RegistryClient, blobs: list[tuple[str, int]]) -> bytes:
        """Give the manifest, which some registries take only in Docker's form."""
        refused: ManifestRefusedError | None = None
        for media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
            manifest = image_manifest(self._image, blobs, self._compression, media_type)
            try:
                await client.put_manifest(self._reference.tag, manifest, media_type)
                return manifest
            except ManifestRefusedError as error:
                refused = refused or error
                if self._compression is LayerCompression.ZSTD:
                    break
        assert refused is not None
        raise refused

    def _other_repositories(self) -> list[str]:
        """Of the same registry, that may have layers."""
        found = {where.repository for diff_id in self._image.diff_ids for _, where in self._known(diff_id)}
        return sorted(found - {self._reference.repository})

    def _known(self, diff_id: str) -> list[tuple[str, Reference]]:
        """Blobs of a layer that the registry may have, compressed as is wanted."""
        if self._compression is not LayerCompression.GZIP:
            return []
        # A few: each is a question, and compressing is not that slow.
        return [one for one in self._sources.of(diff_id) if one[1].registry == self._reference.registry][:5]

    async def _layer(self, client: RegistryClient, layer: Layer, limit: trio.CapacityLimiter) -> None:
        diff_id = layer.diff_id
        async with limit:
            there = await self._already_there(client, diff_id)
            if there is not None:
                self._blobs[diff_id] = there
                self._report(diff_id, "exists", 0, None)
                return
            with self._images.spool() as file:
                digest, size = await _compress(
                    layer, self._compression, file, lambda done: self._report(diff_id, "compressing", done, None)
                )
                if await client.blob_size(digest) is None:
                    await client.upload(digest, size, file, lambda done: self._report(diff_id, "uploading", done, size))
                self._blobs[diff_id] = (digest, size)
                self._report(diff_id, "done", size, size)

    async def _already_there(self, client: RegistryClient, diff_id: str) -> tuple[str, int] | None:
        for digest, where in self._known(diff_id):
            size = await client.blob_size(digest)
            elsewhere = where.repository != self._reference.repository
            if size is None and elsewhere and await client.mount(digest, where.repository):
                size = await client.blob_size(digest)
            if size is not None:
                return digest, size
        return None

    async def _config(self, client: RegistryClient) -> None:
        contents = self._image.config_bytes
        if await client.blob_size(self._image.image_id) is None:
            with self._images.spool() as file:
                file.write(contents)
                file.flush()
                await client.upload(self._image.image_id, len(contents), file, lambda done: None)


async def _compress(
    layer: Layer, how: LayerCompression, file: BinaryIO, progress: Callable[[int], None]
) -> tuple[str, int]:
    """Write a layer's blob to ``file``, in a thread; its digest and its size in bytes."""
    stopped = threading.Event()

    def work() -> tuple[str, int]:
        digest = hashlib.sha256()
        size = 0
        with compressed(layer.tar_stream(), how) as stream:
            while piece := stream.read(_PIECE_BYTES):
                if stopped.is_set():
                    raise ImageError("stopped")
                digest.update(piece)
                file.write(piece)
                size += len(piece)
                progress(size)
        file.flush()
        return f"{ALGORITHM}:{digest.hexdigest()}", size

    return await _in_thread(work, stopped.set)


async def _in_thread(work: Callable[[], _Result], stop: Callable[[], None]) -> _Result:
    """The result of ``work``, which runs in a thread.

    Args:
        work: what to do.
        stop: makes ``work`` fail soon; called when the task is cancelled. The thread is waited for all the same.
    """
    finished = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not finished:
                    stop()

        nursery.start_soon(watch)
        # Captured, so that an error of the work leaves the nursery as it is and not in a group.
        result: outcome.Outcome[_Result] = await outcome.acapture(trio.to_thread.run_sync, work)
        finished = True
        nursery.cancel_scope.cancel()
    # What was stopped failed because of that.
    await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()


def run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    """Run ``work`` to its end, from a program without trio.

    Of several errors at the same time one is raised: who asked for one thing is told one reason.

    Raises:
        KeyboardInterrupt: the user ended it, and everything is undone.
        SystemExit: likewise, with SIGTERM or SIGHUP; the status is a shell's, 128 and the signal's number.
    """
    results: list[_Result] = []

    async def main() -> None:
        # The main task gets the interrupt, so it must be one that can be woken at any time.
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                results.append(await work())
                nursery.cancel_scope.cancel()

            if threading.current_thread() is threading.main_thread():  # only that one gets signals
                nursery.start_soon(_end_on_signals)
            nursery.start_soon(one)

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise _most_telling(group) from None
    return results[0]


async def _end_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as numbers:
        async for number in numbers:
            raise SystemExit(128 + number)


def _most_telling(error: BaseException) -> BaseException:
    leaves: list[BaseException] = []
    todo: list[BaseException] = [error]
    while todo:
        current = todo.pop(0)
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions
        else:
            leaves.append(current)
    interrupts = [one for one in leaves if not isinstance(one, Exception) and not isinstance(one, trio.Cancelled)]
    return (interrupts or leaves)[0]
