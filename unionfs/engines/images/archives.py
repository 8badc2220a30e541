"""Importing images from what is on disk: archives of ``docker save``, and OCI image layouts.

**docker save** writes a ``manifest.json``, a list of ``{"Config": path, "RepoTags": [...], "Layers": [path, ...]}``.
Until Docker 24 the paths are ``<id>.json`` and ``<id>/layer.tar``, where a layer that comes twice is a symlink; since
Docker 25 they are ``blobs/sha256/<digest>``. Source: Docker image specification v1.2, "Combined Image JSON + Filesystem
Changeset Format".

**An OCI layout** is a directory or a tar archive of one: ``oci-layout`` says that it is one, ``index.json`` names what
is in it, ``blobs/sha256/<digest>`` are the contents. Source: OCI image specification, image-layout.md. Which name an
image has is told in annotations: containerd writes it in full, others only the tag; ``cosign save`` has a word of its
own.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Annotated, BinaryIO, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from unionfs.engines.images.install import FoundImage, LayerBlob, Report, install, no_report
from unionfs.engines.images.manifest import (
    MAX_MANIFEST_BYTES,
    BlobDescriptor,
    Index,
    Manifest,
    choose,
    missing_layer,
    parse_manifest,
)
from unionfs.engines.images.model import MAX_CONFIG_BYTES, Image, Platform, digest_of, first_problem, parse_image
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.store import ImageStore
from unionfs.engines.images.tar_files import TarFiles, plain_file, read_limited
from unionfs.errors import ArchiveError, ImageError, ImageFormatError, NotAnImageError
from unionfs.host.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2
from unionfs.layers import MAX_DEPTH
from unionfs.layers.identity import ALGORITHM, digits_of, is_hex_digest

LAYOUT = "oci-layout"
INDEX = "index.json"
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"

_MANIFEST = "manifest.json"
_COSIGN_NAME = "dev.cosignproject.cosign/imageRef"
_BLOBS = f"blobs/{ALGORITHM}"
_NO_REGISTRY = "localhost"  # as Podman calls what came from no registry
_MAX_IMAGES = 1000
_MAX_NESTING = 4  # an index in an index is rare, more is nonsense


def import_images(
    images: ImageStore,
    source: str | os.PathLike[str] | BinaryIO,
    *,
    platform: Platform | None = None,
    only: str = "",
    names: Sequence[Reference] | None = None,
    report: Report = no_report,
) -> list[Image]:
    """Store the images of an archive or a directory.

    Args:
        images: where they go.
        source: an archive of ``docker save`` or of an OCI layout, compressed or not, as a path or a stream; or the
            directory of an OCI layout.
        platform: which one where there are several; None: this machine's.
        only: the image of this name, tag or id, when there are several.
        names: instead of those in the source, for its only image.
        report: see :class:`unionfs.engines.images.install.Report`.

    Raises:
        ImageFormatError: it is no such thing, incomplete, or contradicts itself.
        DigestMismatchError: a blob or a layer is not what it should be.
        ArchiveError: an archive is damaged.
        OSError: it cannot be read.
    """
    where = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    with _found(images, source, platform, only, _repository_of(where)) as found:
        if names and len(found) > 1:
            raise ImageError(f"there are {len(found)} images in it, and one name; say which one is meant")
        return [install(images, one, names or None, report) for one in found]


@contextmanager
def _found(
    images: ImageStore,
    source: str | os.PathLike[str] | BinaryIO,
    platform: Platform | None,
    only: str,
    repository: str,
) -> Iterator[list[FoundImage]]:
    with ExitStack() as stack:
        if isinstance(source, str | os.PathLike):
            path = os.fspath(source)
            if os.path.isdir(path):
                if not os.path.exists(os.path.join(path, INDEX)):
                    raise ImageFormatError(f"{path}: has no {INDEX}, so it is no OCI layout; name one, or an archive")
                yield _read_layout(_DirectoryFiles(path), platform, only, repository)
                return
            source = stack.enter_context(open(path, "rb"))
        plain = plain_file(source, images.spool)
        if plain is not source:
            stack.enter_context(plain)
        try:
            files = TarFiles(plain)
        except ArchiveError as error:
            raise ImageFormatError(f"not an archive of images: {error}") from error
        yield _in_archive(files, platform, only, repository)


def _repository_of(path: str) -> str:
    """What to call an image of a layout that gives it a tag only: the file or directory, on no registry."""
    name = os.path.basename(os.path.abspath(path)) if path else ""
    name = re.sub(r"\.(tar|tgz|tbz2?|txz|tzst)(\.\w+)?$", "", name.lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"{_NO_REGISTRY}/{name}" if name else ""


def _in_archive(files: TarFiles, platform: Platform | None, only: str, repository: str) -> list[FoundImage]:
    if _MANIFEST in files:
        try:
            return _wanted(_read_docker_archive(files), platform, only)
        except _OtherPlatformError:
            # docker save writes there only the best of an image's platforms for its own machine.
            if INDEX not in files:
                raise
    if INDEX in files:
        return _read_layout(files, platform, only, repository)
    raise ImageFormatError(f"the archive has no {_MANIFEST} and no {INDEX}, so it is none of images")


class _OtherPlatformError(ImageFormatError):
    """An image for another machine than the one that was asked for."""


def _wanted(found: list[FoundImage], platform: Platform | None, only: str) -> list[FoundImage]:
    """Those of a Docker archive that are meant; of several with the same names, which are for several machines, one."""
    images = [(one, parse_image(one.config_bytes)) for one in found]
    if only:
        digits = only.removeprefix("sha256:")
        images = [(one, image) for one, image in images if _has_name(one, only) or image.image_id[7:] == digits]
        if not images:
            raise ImageFormatError(f"there is no image {only[:100]!r} in the archive")
    groups: dict[object, list[tuple[FoundImage, Image]]] = {}
    for number, (one, image) in enumerate(images):
        groups.setdefault(one.names or number, []).append((one, image))
    chosen = []
    for group in groups.values():
        ranks = [(platform or Platform.of_this_machine()).rank(image.platform) for _, image in group]
        fitting = [(rank, number) for number, rank in enumerate(ranks) if rank is not None]
        if platform is not None and not fitting:
            raise _OtherPlatformError(f"the image is for {group[0][1].platform}, not for {platform}")
        chosen.append(group[min(fitting)[1] if fitting else 0][0])
    return chosen


def _has_name(found: FoundImage, text: str) -> bool:
    try:
        return parse_reference(text).with_default_tag() in found.names
    except ImageError:
        return False


# Archives of docker save


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore")

    config: str = Field(alias="Config")
    names: Annotated[tuple[str, ...], BeforeValidator(lambda value: () if value is None else value)] = Field(
        (), alias="RepoTags"
    )
    layers: Annotated[tuple[str, ...], BeforeValidator(lambda value: () if value is None else value)] = Field(
        (), alias="Layers"
    )


_ENTRIES = TypeAdapter(tuple[_Entry, ...])


def _read_docker_archive(files: TarFiles) -> list[FoundImage]:
    """The images in the archive, in its order.

    Raises:
        ImageFormatError: something is missing, too large, or another thing than its name says.
    """
    try:
        entries = _ENTRIES.validate_json(files.read(_MANIFEST, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        raise ImageFormatError(f"{_MANIFEST}: {first_problem(error)}; it is not what docker save writes") from error
    if len(entries) > _MAX_IMAGES:
        raise ImageFormatError(f"{_MANIFEST} names {len(entries)} images, where {_MAX_IMAGES} are the most")
    return [_docker_image(files, entry) for entry in entries]


def _docker_image(files: TarFiles, entry: _Entry) -> FoundImage:
    if len(entry.layers) > MAX_DEPTH:
        raise ImageFormatError(
            f"an image has {len(entry.layers)} layers; {MAX_DEPTH} are the most a container can have"
        )
    config = files.read(entry.config, MAX_CONFIG_BYTES)
    said = posixpath.basename(entry.config).removesuffix(".json")
    if is_hex_digest(said) and digest_of(config) != f"{ALGORITHM}:{said}":
        raise ImageFormatError(f"{entry.config[:200]}: is not what its name says; fetch or make the archive again")
    layers = [LayerBlob(partial(files.open, name), _digest_in(name), files.size(name)) for name in entry.layers]
    return FoundImage(config, layers, tuple(parse_reference(name).with_default_tag() for name in entry.names))


def _digest_in(name: str) -> str:
    """The digest that the path of a blob is made of; the old layout's ids are digests of other things."""
    directory, _, digits = posixpath.normpath(name).rpartition("/")
    return f"{ALGORITHM}:{digits}" if directory == _BLOBS and is_hex_digest(digits) else ""


# OCI layouts


class _Files(Protocol):
    """Where the files of a layout are."""

    def open(self, name: str) -> BinaryIO:
        """A file, seekable; raises :class:`ImageFormatError` when there is none."""

    def size(self, name: str) -> int:
        """Its size in bytes."""

    def read(self, name: str, limit: int) -> bytes:
        """All of a file that is no larger than ``limit``."""


class _DirectoryFiles:
    """The files below a directory. Links are followed as long as they stay in it, whoever wrote them.

    Args:
        root: the directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def open(self, name: str) -> BinaryIO:
        """See :class:`_Files`."""
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
        """See :class:`_Files`."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`_Files`."""
        return read_limited(self.open, self.size(name), name, limit)


def _read_layout(
    files: _Files, platform: Platform | None = None, only: str = "", repository: str = ""
) -> list[FoundImage]:
    """The images in the layout, one for each entry of its index that is none for another machine only.

    Args:
        files: of the layout.
        platform: which one of an entry for several; None: this machine's.
        only: the entry of this name or tag, or of this digest.
        repository: what an entry belongs to that has a tag only; empty: it has no name then.

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
                found.append(_layout_image(files, one, platform, repository))
            except NotAnImageError as error:
                other = error  # such as the signatures that cosign save puts beside an image
    if other is not None and not found:
        raise other
    return found


def _layout_image(files: _Files, entry: BlobDescriptor, platform: Platform | None, repository: str) -> FoundImage:
    manifest = _manifest(files, entry, platform)
    config = _blob(files, manifest.config, MAX_CONFIG_BYTES)
    layers = []
    for layer in manifest.layers:
        _check_size(files, layer)
        layers.append(LayerBlob(partial(files.open, _path(layer)), layer.digest, layer.size))
    return FoundImage(config, layers, _names(entry, repository))


def _manifest(files: _Files, descriptor: BlobDescriptor, platform: Platform | None) -> Manifest:
    for _ in range(_MAX_NESTING):
        found = parse_manifest(_blob(files, descriptor, MAX_MANIFEST_BYTES), descriptor.media_type)
        if isinstance(found, Manifest):
            return found
        descriptor = choose(found, platform, _label(descriptor) or "the image")
    raise ImageFormatError(f"the layout has indexes in indexes, more than {_MAX_NESTING} deep")


def _path(descriptor: BlobDescriptor) -> str:
    return f"blobs/{ALGORITHM}/{digits_of(descriptor.digest)}"


def _check_size(files: _Files, descriptor: BlobDescriptor) -> None:
    try:
        size = files.size(_path(descriptor))
    except ImageFormatError as error:
        raise missing_layer(descriptor, error) from error
    if size != descriptor.size:
        raise ImageFormatError(
            f"{_path(descriptor)}: has {size} bytes, but {descriptor.size} were promised; fetch or make it again"
        )


def _blob(files: _Files, descriptor: BlobDescriptor, limit: int) -> bytes:
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


def _names(descriptor: BlobDescriptor, repository: str = "") -> tuple[Reference, ...]:
    """What the entry's annotations call it; a tag alone is one of ``repository``, if that is given."""
    for text in _labels(descriptor):
        if "/" in text or ":" in text:
            with suppress(ImageError):
                return (parse_reference(text).with_default_tag(),)
    for text in _labels(descriptor) if repository else ():
        with suppress(ImageError):
            return (parse_reference(f"{repository}:{text}"),)
    return ()
