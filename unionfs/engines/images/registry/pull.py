"""Pulling an image: its layers come side by side, and go into the store one on top of the other as they arrive."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import BinaryIO, cast

import trio

from unionfs.engines.images.blob_sources import BlobSources
from unionfs.engines.images.install import Installation, Report, no_report
from unionfs.engines.images.manifest import BlobDescriptor, Index, Manifest, choose, missing_layer, parse_manifest
from unionfs.engines.images.model import MAX_CONFIG_BYTES, Image, Platform, digest_of
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.registry.client import RegistryClient
from unionfs.engines.images.registry.connection import Access, BlobMissingError
from unionfs.engines.images.registry.threads import in_thread
from unionfs.engines.images.store import ImageStore
from unionfs.engines.images.tar_files import Region
from unionfs.errors import ImageFormatError

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
            await in_thread(partial(installation.add_layer, blob.open(), layer.size), installation.stop)


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
