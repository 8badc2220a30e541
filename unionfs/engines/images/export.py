"""Exporting images: the same image gives the same bytes each time, and its layers exactly.

All formats are an OCI image layout. An archive for Docker has a ``manifest.json`` besides, as ``docker save`` writes
since Docker 25; ``docker load`` of any version, Podman and skopeo read it.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from unionfs.engines.images.compress import LayerCompression, compressed
from unionfs.engines.images.install import Report, no_report
from unionfs.engines.images.layout_output import DirectoryOutput, Output, TarOutput, blob_name
from unionfs.engines.images.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)
from unionfs.engines.images.model import Image, digest_of
from unionfs.engines.images.oci_layout import CONTAINERD_NAME, INDEX, LAYOUT, REF_NAME
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.store import ImageStore
from unionfs.errors import ImageError


class Format(enum.Enum):
    """What is written; the value is the name for people."""

    DOCKER = "docker-archive"
    OCI_TAR = "oci-tar"
    OCI_DIRECTORY = "oci-dir"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an image is written as.

    Attributes:
        kind: the format.
        names: what the image is called there.
        compression: of its layers; None: what is usual, ``none`` for Docker, ``gzip`` for OCI.
    """

    kind: Format = Format.DOCKER
    names: Sequence[Reference] = ()
    compression: LayerCompression | None = None


def export_image(
    images: ImageStore, image: Image, output: Output, options: ExportOptions, report: Report = no_report
) -> None:
    """Write an image.

    Args:
        images: where it is.
        image: what to write.
        output: where to.
        options: what as.
        report: see :class:`unionfs.engines.images.install.Report`.

    Raises:
        ImageError: layers of it are missing.
        LayerDamagedError: a layer is not what it was.
    """
    kind, names = options.kind, options.names
    how = options.compression or (LayerCompression.NONE if kind is Format.DOCKER else LayerCompression.GZIP)
    written: dict[str, tuple[str, int]] = {}
    for layer in images.layers_of(image):
        diff_id = layer.diff_id
        if diff_id in written:
            continue

        def progress(done: int, diff_id: str = diff_id) -> None:
            report(diff_id, "writing", done, None)

        with compressed(layer.tar_stream(), how) as stream:
            written[diff_id] = output.add_blob(stream, progress)
        report(diff_id, "done", written[diff_id][1], written[diff_id][1])
    layers = [written[diff_id] for diff_id in image.diff_ids]
    manifest = image_manifest(image, layers, how)
    output.add(blob_name(image.image_id), image.config_bytes)
    output.add(blob_name(digest_of(manifest)), manifest)
    if kind is Format.DOCKER:
        entry = {
            "Config": blob_name(image.image_id),
            "RepoTags": [name.familiar for name in names],
            "Layers": [blob_name(digest) for digest, _ in layers],
        }
        output.add("manifest.json", _json([entry]))
    output.add(INDEX, _index(image, manifest, names))
    output.add(LAYOUT, _json({"imageLayoutVersion": "1.0.0"}))


def image_manifest(
    image: Image, layers: Sequence[tuple[str, int]], how: LayerCompression, media_type: str = OCI_MANIFEST
) -> bytes:
    """The manifest of an image.

    Args:
        image: of which it is.
        layers: digest and size in bytes of each blob, the lowest first.
        how: they are compressed; not with zstd in Docker's manifest, which knows none.
        media_type: :data:`OCI_MANIFEST` or :data:`DOCKER_MANIFEST`.
    """
    if media_type == DOCKER_MANIFEST:
        config_type, layer_type = DOCKER_CONFIG, DOCKER_LAYER + how.suffix.replace("+", ".")
    else:
        config_type, layer_type = OCI_CONFIG, OCI_LAYER + how.suffix
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {"mediaType": config_type, "digest": image.image_id, "size": len(image.config_bytes)},
            "layers": [{"mediaType": layer_type, "digest": digest, "size": size} for digest, size in layers],
        }
    )


def _index(image: Image, manifest: bytes, names: Sequence[Reference]) -> bytes:
    platform = {"architecture": image.platform.architecture, "os": image.platform.os}
    if image.platform.variant:
        platform["variant"] = image.platform.variant
    entry: dict[str, object] = {"mediaType": OCI_MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
    if image.platform.architecture:
        entry["platform"] = platform
    named = [{**entry, "annotations": {CONTAINERD_NAME: str(name), REF_NAME: name.tag}} for name in names]
    return _json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": named or [entry]})


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def export_to(images: ImageStore, image: Image, path: str, options: ExportOptions, report: Report = no_report) -> None:
    """Write an image to a file or a directory, which appears when it is complete.

    Args:
        path: a file is replaced; a directory must not be there yet, or be empty.
        images, image, options, report: see :func:`export_image`.

    Raises:
        ImageError: the directory is there and not empty; and as :func:`export_image`.
    """
    path = os.path.abspath(path)
    directory, name = os.path.split(path)
    if options.kind is Format.OCI_DIRECTORY:
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
            raise ImageError(f"{path}: is there already; remove it, or name another directory")
        begun = tempfile.mkdtemp(prefix=f".{name}.", dir=directory)
        try:
            _apply_umask(begun, 0o777)
            export_image(images, image, DirectoryOutput(begun), options, report)
            os.rename(begun, path)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise
        return
    if os.path.isdir(path):
        raise ImageError(f"{path}: is a directory; name a file, or use --format oci-dir")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, or /dev/stdout
        with open(path, "wb") as file:
            export_stream(images, image, file, options, report)
        return
    fd, begun = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
    try:
        with os.fdopen(fd, "w+b") as file:
            export_stream(images, image, file, options, report, rewritable=True)
        _apply_umask(begun, 0o666)
        os.replace(begun, path)
    except BaseException:
        os.unlink(begun)
        raise


def export_stream(
    images: ImageStore,
    image: Image,
    file: BinaryIO,
    options: ExportOptions,
    report: Report = no_report,
    *,
    rewritable: bool = False,
) -> None:
    """Write an image as an archive.

    Args:
        file: a file or a pipe.
        rewritable: see :class:`unionfs.engines.images.layout_output.TarOutput`.
        images, image, options, report: see :func:`export_image`.
    """
    output = TarOutput(file, images.spool, rewritable=rewritable)
    export_image(images, image, output, options, report)
    output.finish()


def _apply_umask(path: str, mode: int) -> None:
    """What a file that is made openly would have got; files made aside are private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)
