"""Reading OCI image layouts, from a directory or a tar archive of one.

``oci-layout`` says that it is one, ``index.json`` names what is in it, ``blobs/sha256/<digest>`` are the contents.
Source: OCI image specification, image-layout.md. Which name an image has is told in annotations: containerd writes it
in full, others only the tag.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO, Protocol

from unionfs.engines.images.install import FoundImage, LayerBlob
from unionfs.engines.images.manifest import (
    MAX_MANIFEST_BYTES,
    BlobDescriptor,
    Index,
    Manifest,
    choose,
    parse_manifest,
)
from unionfs.engines.images.model import MAX_CONFIG_BYTES, Platform, digest_of
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.tar_files import read_limited
from unionfs.errors import ImageError, ImageFormatError
from unionfs.layers.identity import ALGORITHM, digits_of

LAYOUT = "oci-layout"
INDEX = "index.json"
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"

_MAX_NESTING = 4  # an index in an index is rare, more is nonsense


class Files(Protocol):
    """Where the files of a layout are."""

    def open(self, name: str) -> BinaryIO:
        """A file, seekable; raises :class:`ImageFormatError` when there is none."""

    def size(self, name: str) -> int:
        """Its size in bytes."""

    def read(self, name: str, limit: int) -> bytes:
        """All of a file that is no larger than ``limit``."""


class DirectoryFiles:
    """The files below a directory, none of them a link or anything but a regular file.

    Args:
        root: the directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def open(self, name: str) -> BinaryIO:
        """See :class:`Files`."""
        path = os.path.join(self._root, name)
        try:
            # Not to wait for the other end of a pipe.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise ImageFormatError(f"{path}: {error.strerror}; the layout is incomplete") from error
            raise
        file = os.fdopen(fd, "rb")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            file.close()
            raise ImageFormatError(f"{path}: is no regular file; the layout is damaged")
        return file

    def size(self, name: str) -> int:
        """See :class:`Files`."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`Files`."""
        return read_limited(self.open, self.size(name), name, limit)


def read_layout(files: Files, platform: Platform | None = None, only: str = "") -> list[FoundImage]:
    """The images in the layout, one for each entry of its index.

    Args:
        files: of the layout.
        platform: which one of an entry for several; None: this machine's.
        only: the entry of this name or tag, or of this digest.

    Raises:
        ImageFormatError: something is missing, too large, or another thing than its name says; or there is no such
            entry, or none for the platform.
    """
    index = parse_manifest(files.read(INDEX, MAX_MANIFEST_BYTES))
    if not isinstance(index, Index):
        raise ImageFormatError(f"{INDEX}: is no index")
    chosen = [one for one in index.manifests if not only or _is_meant(one, only)]
    if not chosen:
        known = ", ".join(sorted(filter(None, (_label(one) for one in index.manifests)))[:10])
        raise ImageFormatError(
            f"there is no image {only[:100]!r} in it; it has: {known or f'{len(index.manifests)} without a name'}"
        )
    if len(chosen) > 1 and all(one.platform is not None for one in chosen) and len({_label(o) for o in chosen}) == 1:
        # One image for several machines, without an index of its own.
        chosen = [choose(Index(tuple(chosen)), platform, only or "the layout")]
    return list(_images(files, chosen, platform))


def _images(files: Files, chosen: list[BlobDescriptor], platform: Platform | None) -> Iterator[FoundImage]:
    for one in chosen:
        manifest = _manifest(files, one, platform)
        config = _blob(files, manifest.config, MAX_CONFIG_BYTES)
        layers = []
        for layer in manifest.layers:
            name = _path(layer)
            _check_size(files, layer)
            layers.append(LayerBlob(partial(files.open, name), layer.digest, layer.size))
        yield FoundImage(config, layers, _names(one))


def _manifest(files: Files, descriptor: BlobDescriptor, platform: Platform | None) -> Manifest:
    for _ in range(_MAX_NESTING):
        found = parse_manifest(_blob(files, descriptor, MAX_MANIFEST_BYTES), descriptor.media_type)
        if isinstance(found, Manifest):
            return found
        descriptor = choose(found, platform, _label(descriptor) or "the image")
    raise ImageFormatError(f"the layout has indexes in indexes, more than {_MAX_NESTING} deep")


def _path(descriptor: BlobDescriptor) -> str:
    return f"blobs/{ALGORITHM}/{digits_of(descriptor.digest)}"


def _check_size(files: Files, descriptor: BlobDescriptor) -> None:
    size = files.size(_path(descriptor))
    if size != descriptor.size:
        raise ImageFormatError(
            f"{_path(descriptor)}: has {size} bytes, but {descriptor.size} were promised; fetch or make it again"
        )


def _blob(files: Files, descriptor: BlobDescriptor, limit: int) -> bytes:
    _check_size(files, descriptor)
    contents = files.read(_path(descriptor), limit)
    if digest_of(contents) != descriptor.digest:
        raise ImageFormatError(f"{_path(descriptor)}: is not what its name says; fetch or make it again")
    return contents


def _label(descriptor: BlobDescriptor) -> str:
    return descriptor.annotations.get(CONTAINERD_NAME) or descriptor.annotations.get(REF_NAME, "")


def _is_meant(descriptor: BlobDescriptor, text: str) -> bool:
    if text in (descriptor.digest, descriptor.annotations.get(REF_NAME), descriptor.annotations.get(CONTAINERD_NAME)):
        return True
    with suppress(ImageError):
        return parse_reference(text).with_default_tag() in _names(descriptor)
    return False


def _names(descriptor: BlobDescriptor) -> tuple[Reference, ...]:
    """What the entry's annotations call it; a tag alone is no name."""
    for text in (descriptor.annotations.get(CONTAINERD_NAME, ""), descriptor.annotations.get(REF_NAME, "")):
        if "/" in text or ":" in text:
            with suppress(ImageError):
                return (parse_reference(text).with_default_tag(),)
    return ()
