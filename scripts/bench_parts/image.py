"""The image that is registered: a stack of layers as an OCI layout, and as the archive that ``docker save`` writes.

Formats: OCI image-layout and image-spec (manifest.md, config.md), and Docker's image specification 1.2 for the archive.
The layers are compressed with gzip, as images are pulled; both forms hold the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from bench_parts.stacks import Stack

TAG = "bench"
_GZIP_LEVEL = 6  # what engines use
_PIECE_BYTES = 1 << 20
_OCI = "application/vnd.oci.image"


@dataclass(frozen=True, slots=True)
class Image:
    """An image on disk.

    Attributes:
        layout: the directory of an OCI layout with the image under ``TAG``.
        archive: the same for ``docker load``.
        layers: the compressed layers, base first.
        size_bytes: of the layers' archives, uncompressed.
    """

    layout: str
    archive: str
    layers: tuple[str, ...]
    size_bytes: int


def make(stack: Stack, into: str) -> Image:
    """Write the image of a stack below the directory ``into``, which is made."""
    layout = os.path.join(into, "oci")
    blobs = os.path.join(layout, "blobs", "sha256")
    os.makedirs(blobs)
    packed = [_pack(path, blobs) for path in reversed(stack.layers)]
    config = _blob(
        blobs,
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in packed]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(packed))],
        },
    )
    manifest = _blob(
        blobs,
        {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": {"mediaType": f"{_OCI}.config.v1+json", **config},
            "layers": [{"mediaType": f"{_OCI}.layer.v1.tar+gzip", **layer.descriptor} for layer in packed],
        },
    )
    named = {"org.opencontainers.image.ref.name": TAG}
    index = [{"mediaType": f"{_OCI}.manifest.v1+json", **manifest, "annotations": named}]
    _write_json(os.path.join(layout, "index.json"), {"schemaVersion": 2, "manifests": index})
    _write_json(os.path.join(layout, "oci-layout"), {"imageLayoutVersion": "1.0.0"})
    archive = os.path.join(into, "image.tar")
    layers = tuple(os.path.join(blobs, _digits(layer.descriptor)) for layer in packed)
    with tarfile.open(archive, "w") as tar:
        names = [f"{number}/layer.tar" for number in range(len(layers))]
        tar.add(os.path.join(blobs, _digits(config)), "config.json")
        for name, path in zip(names, layers, strict=True):
            tar.add(path, name)
        listed = os.path.join(into, "manifest.json")
        _write_json(listed, [{"Config": "config.json", "RepoTags": [f"{TAG}:latest"], "Layers": names}])
        tar.add(listed, "manifest.json")
    return Image(layout, archive, layers, sum(layer.size_bytes for layer in packed))


@dataclass(frozen=True, slots=True)
class _Packed:
    diff_id: str
    descriptor: dict[str, object]
    size_bytes: int


def _pack(directory: str, blobs: str) -> _Packed:
    """Write a directory as a compressed layer; its digests."""
    partial = os.path.join(blobs, "partial")
    plain, compressed = hashlib.sha256(), hashlib.sha256()
    size = 0
    with open(partial, "wb") as out:

        def put(data: bytes) -> None:
            compressed.update(data)
            out.write(data)

        compressor = zlib.compressobj(_GZIP_LEVEL, wbits=31)
        for piece in _archive_of(directory):
            plain.update(piece)
            size += len(piece)
            put(compressor.compress(piece))
        put(compressor.flush())
        length = out.tell()
    os.rename(partial, os.path.join(blobs, compressed.hexdigest()))
    return _Packed(f"sha256:{plain.hexdigest()}", {"digest": f"sha256:{compressed.hexdigest()}", "size": length}, size)


def _archive_of(directory: str) -> Iterator[bytes]:
    argv = ["tar", f"--directory={directory}", "--create", "--sort=name", "--numeric-owner", "--xattrs", "."]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        while piece := tar.stdout.read(_PIECE_BYTES):
            yield piece
    if tar.returncode != 0:
        raise subprocess.CalledProcessError(tar.returncode, argv)


def _blob(blobs: str, contents: object) -> dict[str, object]:
    data = json.dumps(contents).encode()
    digits = hashlib.sha256(data).hexdigest()
    with open(os.path.join(blobs, digits), "wb") as file:
        file.write(data)
    return {"digest": f"sha256:{digits}", "size": len(data)}


def _digits(descriptor: dict[str, object]) -> str:
    return str(descriptor["digest"]).partition(":")[2]


def _write_json(path: str, contents: object) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(contents, file)
