"""Reading OCI image layouts, from a directory or a tar archive of one.

``oci-layout`` says that it is one, ``index.json`` names what is in it, ``blobs/sha256/<digest>`` are the contents.
Source: OCI image specification, image-layout.md. Which name an image has is told in annotations: containerd writes it
in full, others only the tag; ``cosign save`` has a word of its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO, Protocol

from unionfs.archive.rooted import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2
from unionfs.engines.images.install import FoundImage, LayerBlob
from unionfs.engines.images.manifest import (
    MAX_MANIFEST_BYTES,
    BlobDescriptor,
    Index,
    Manifest,
    choose,
    missing_layer,
    parse_manifest,
)
from unionfs.engines.images.model import MAX_CONFIG_BYTES, Platform, digest_of
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.tar_files import read_limited
from unionfs.errors import ImageError, ImageFormatError, NotAnImageError
from unionfs.layers.identity import ALGORITHM, digits_of

LAYOUT = "oci-layout"
INDEX = "index.json"
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
_COSIGN_NAME = "dev.cosignproject.cosign/imageRef"

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
    """The files below a directory. Links are followed as long as they stay in it, whoever wrote them.

    Args:
        root: the directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def open(self, name: str) -> BinaryIO:
        """See :class:`Files`."""
        path = os.path.join(self._root, name)
        top = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Not to wait for the other end of a pipe.
            fd = openat2(top, os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise ImageFormatError(
                    f"{path}: is a symlink that is absolute or leads out of the layout; copy the layout without links "
                    "(cp -RL) and import that"
                ) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise ImageFormatError(f"{path}: {error.strerror}; the layout is incomplete") from error
            raise
        finally:
            os.close(top)
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
    """The images in the layout, one for each entry of its index that is none for another machine only.

    Args:
        files: of the layout.
        platform: which one of an entry for several; None: this machine's.
        only: the entry of this name or tag, or of this digest.

    Raises:
        ImageFormatError: something is missing, too large, or another thing than its name says; or there is no such
            entry, or none for the platform.
        NotAnImageError: there is something else only.
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
    groups: dict[str, list[BlobDescriptor]] = {}
    for one in chosen:
        groups.setdefault(_label(one), []).append(one)
    found: list[FoundImage] = []
    other: NotAnImageError | None = None
    for label, entries in groups.items():
        if len(entries) > 1 and all(one.platform is not None for one in entries):
            # One image for several machines, without an index of its own.
            entries = [choose(Index(tuple(entries)), platform, label or only or "the layout")]  # noqa: PLW2901
        for one in entries:
            try:
                found.append(_image(files, one, platform))
            except NotAnImageError as error:
                other = error  # such as the signatures that cosign save puts beside an image
    if other is not None and not found:
        raise other
    return found


def _image(files: Files, entry: BlobDescriptor, platform: Platform | None) -> FoundImage:
    manifest = _manifest(files, entry, platform)
    config = _blob(files, manifest.config, MAX_CONFIG_BYTES)
    layers = []
    for layer in manifest.layers:
        _check_size(files, layer)
        layers.append(LayerBlob(partial(files.open, _path(layer)), layer.digest, layer.size))
    return FoundImage(config, layers, _names(entry))


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
    try:
        size = files.size(_path(descriptor))
    except ImageFormatError as error:
        raise missing_layer(descriptor, error) from error
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
    return next(_labels(descriptor), "")


def _labels(descriptor: BlobDescriptor) -> Iterator[str]:
    """What the annotations call the entry, the fullest name first."""
    for key in (CONTAINERD_NAME, REF_NAME, _COSIGN_NAME):
        if text := descriptor.annotations.get(key):
            yield text


def _is_meant(descriptor: BlobDescriptor, text: str) -> bool:
    if text in (descriptor.digest, *_labels(descriptor)):
        return True
    with suppress(ImageError):
        return parse_reference(text).with_default_tag() in _names(descriptor)
    return False


def _names(descriptor: BlobDescriptor) -> tuple[Reference, ...]:
    """What the entry's annotations call it; a tag alone is no name."""
    for text in _labels(descriptor):
        if "/" in text or ":" in text:
            with suppress(ImageError):
                return (parse_reference(text).with_default_tag(),)
    return ()
