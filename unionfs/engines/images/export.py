"""Exporting images: the same image gives the same bytes each time, and its layers exactly.

All formats are an OCI image layout. An archive for Docker has a ``manifest.json`` besides, as ``docker save`` writes
since Docker 25; ``docker load`` of any version, Podman and skopeo read it.

Layers are compressed with zlib and not with ISA-L, which unpacks here: ISA-L finds other matches on other processors,
so that the digest of a layer would depend on the machine that pushes it.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

import zstandard

from unionfs.archive.stream import PieceStream
from unionfs.engines.images.archives import CONTAINERD_NAME, INDEX, LAYOUT, REF_NAME
from unionfs.engines.images.install import Report, no_report
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
from unionfs.engines.images.reference import Reference
from unionfs.engines.images.store import ImageStore
from unionfs.errors import ImageError
from unionfs.host.disk import current_umask, replacing
from unionfs.layers.identity import ALGORITHM, digits_of

_PIECE_BYTES = 1 << 20
_GZIP_LEVEL = 6
_GZIP_WINDOW = 15 + 16  # 16: with gzip's header, whose time zlib leaves 0
_ZSTD_LEVEL = 3
_BLOCK_BYTES = 512
_RECORD_BYTES = 10240  # what tar fills up to


class Format(enum.Enum):
    """What is written; the value is the name for people."""

    DOCKER = "docker-archive"
    OCI_TAR = "oci-tar"
    OCI_DIRECTORY = "oci-dir"


class LayerCompression(enum.Enum):
    """How layers are compressed; the value is the name for people and the suffix of the media type."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"

    @property
    def suffix(self) -> str:
        """Of an OCI media type."""
        return "" if self is LayerCompression.NONE else f"+{self.value}"


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
            os.chmod(begun, 0o777 & ~current_umask())
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
    with replacing(path) as file:
        export_stream(images, image, file, options, report, rewritable=True)


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
        rewritable: see :class:`unionfs.engines.images.export.TarOutput`.
        images, image, options, report: see :func:`export_image`.
    """
    output = TarOutput(file, images.spool, rewritable=rewritable)
    export_image(images, image, output, options, report)
    output.finish()


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def compressed(stream: BinaryIO, how: LayerCompression) -> BinaryIO:
    """``stream``, which is closed with the result, compressed while it is read."""
    if how is LayerCompression.NONE:
        return stream
    return cast(BinaryIO, PieceStream(_pieces(stream, how)))


def _pieces(stream: BinaryIO, how: LayerCompression) -> Iterator[bytes]:
    compressor: _Compressor
    if how is LayerCompression.GZIP:
        compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    else:
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    with stream:
        while piece := stream.read(_PIECE_BYTES):
            if out := compressor.compress(piece):
                yield out
        yield compressor.flush()


# Where it goes


class Output(Protocol):
    """Takes the files of a layout."""

    def add(self, name: str, contents: bytes) -> None:
        """A small file."""

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """A large one, named by its digest; that, and its size in bytes."""


class TarOutput:
    """A tar archive, each of whose bytes follows from what is in it.

    Args:
        file: where it goes.
        spool: makes a temporary file.
        rewritable: ``file`` is a new one that can be written in any order. Otherwise blobs are copied aside first, as
            their digests and sizes come before them. (What can be sought is not enough: ``>>`` writes at the end.)
    """

    def __init__(self, file: BinaryIO, spool: Callable[[], BinaryIO], *, rewritable: bool = False) -> None:
        self._file = file
        self._spool = spool
        self._rewritable = rewritable
        self._written = 0
        for name in ("blobs/", f"blobs/{ALGORITHM}/"):
            self._write(_header(name, 0))

    def add(self, name: str, contents: bytes) -> None:
        """See :class:`Output`."""
        self._write(_header(name, len(contents)))
        self._write(contents)
        self._pad(len(contents), _BLOCK_BYTES)

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """See :class:`Output`."""
        if not self._rewritable:
            with self._spool() as copy:
                digest, size = _copy(stream, copy, progress)
                copy.seek(0)
                self._write(_header(blob_name(digest), size))
                shutil.copyfileobj(copy, self._file, _PIECE_BYTES)
        else:
            start = self._file.tell()
            self._file.write(bytes(_BLOCK_BYTES))
            digest, size = _copy(stream, self._file, progress)
            self._file.seek(start)
            self._write(_header(blob_name(digest), size))
            self._file.seek(size, os.SEEK_CUR)
        self._written += size
        self._pad(size, _BLOCK_BYTES)
        return digest, size

    def finish(self) -> None:
        """Write the end."""
        self._write(bytes(2 * _BLOCK_BYTES))
        self._pad(self._written, _RECORD_BYTES)
        self._file.flush()

    def _write(self, contents: bytes) -> None:
        self._file.write(contents)
        self._written += len(contents)

    def _pad(self, size: int, unit: int) -> None:
        self._write(bytes(-size % unit))


class DirectoryOutput:
    """A directory.

    Args:
        root: exists and is empty.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._blobs = os.path.join(root, "blobs", ALGORITHM)
        os.makedirs(self._blobs)

    def add(self, name: str, contents: bytes) -> None:
        """See :class:`Output`."""
        with open(os.path.join(self._root, name), "xb") as file:
            file.write(contents)

    def add_blob(self, stream: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
        """See :class:`Output`."""
        begun = os.path.join(self._root, ".blob")
        with open(begun, "xb") as file:
            digest, size = _copy(stream, file, progress)
        os.rename(begun, os.path.join(self._root, blob_name(digest)))
        return digest, size


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    # GNU's form for what has more than 8 GiB: one block always, so it can be written after the contents.
    return info.tobuf(tarfile.GNU_FORMAT)


def blob_name(digest: str) -> str:
    """Where a blob is in a layout."""
    return f"blobs/{ALGORITHM}/{digits_of(digest)}"


def _copy(stream: BinaryIO, file: BinaryIO, progress: Callable[[int], None]) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
        file.write(piece)
        size += len(piece)
        progress(size)
    return f"{ALGORITHM}:{digest.hexdigest()}", size
