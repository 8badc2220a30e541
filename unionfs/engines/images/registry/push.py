"""Pushing an image: layers that the registry has are left there, the others are compressed again and sent.

The diff ids of what arrives are exactly those of the image, and the same image gives the same blobs each time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import BinaryIO

import trio

from unionfs.engines.images.blob_sources import BlobSources
from unionfs.engines.images.compress import LayerCompression, compressed
from unionfs.engines.images.export import image_manifest
from unionfs.engines.images.install import Report, no_report
from unionfs.engines.images.manifest import DOCKER_MANIFEST, OCI_MANIFEST
from unionfs.engines.images.model import Image, digest_of
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.registry.client import ManifestRefusedError, RegistryClient
from unionfs.engines.images.registry.connection import Access
from unionfs.engines.images.registry.threads import in_thread
from unionfs.engines.images.store import ImageStore
from unionfs.errors import ImageError
from unionfs.layers import Layer
from unionfs.layers.identity import ALGORITHM

_PIECE_BYTES = 1 << 20


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

    return await in_thread(work, stopped.set)
