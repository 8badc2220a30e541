"""Manifests and indexes: which blobs an image consists of, and which image is for which machine.

Sources: OCI image specification (manifest.md, image-index.md, descriptor.md); Docker's "Image Manifest V 2, Schema 2".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unionfs.engines.images.model import Platform, first_problem
from unionfs.errors import ImageError, ImageFormatError, InvalidDigestError, NotAnImageError
from unionfs.layers import MAX_DEPTH
from unionfs.layers.identity import parse_digest

MAX_MANIFEST_BYTES = 4 << 20
"""What registries accept (OCI distribution specification, "Pushing Manifests")."""

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

MANIFEST_TYPES = (OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST)

# What registries and builders that do not know better say of everything; moby takes these for configurations.
_GENERIC_TYPES = ("", "application/octet-stream", "application/json", "text/html", "text/plain")
_CONFIG_TYPES = ("application/vnd.oci.image.", "application/vnd.docker.container.image.")
# A type that is not known is no error (image specification, manifest.md), and the diff ids say what a layer must be.
# But it must not say that it is something else than a plain or compressed archive.
_LAYER_ENDINGS = ("tar", "gzip", "zstd", "xz", "bzip2", "tgz", "octet-stream")
_MAX_MANIFESTS = 1000
_NOBODY = "unknown"  # the platform of BuildKit's attestations, which are no images


def _nothing(value: object) -> object:
    return {} if value is None else value


class BlobDescriptor(BaseModel):
    """A blob by its digest.

    Attributes:
        media_type: what it is.
        digest: of its bytes.
        size: in bytes.
        platform: what machine it is for, where that is told.
        annotations: free keys and values.
        artifact_type: what the manifest is of, if that is no image.
        urls: where else the blob is.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    media_type: str = Field("", alias="mediaType")
    digest: str
    size: int = Field(ge=0, lt=1 << 63)
    platform: Platform | None = None
    annotations: Annotated[dict[str, str], BeforeValidator(_nothing)] = Field(default_factory=dict)
    artifact_type: str = Field("", alias="artifactType")
    urls: Annotated[tuple[str, ...], BeforeValidator(lambda value: value or ())] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image.

    Attributes:
        config: its configuration.
        layers: the lowest first.
    """

    config: BlobDescriptor
    layers: tuple[BlobDescriptor, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Several images, or indexes, to choose from; what is something else is left out."""

    manifests: tuple[BlobDescriptor, ...] = field(default=())


class _File(BaseModel):
    """Both kinds, to tell them apart by what they have and never by what somebody says (CVE-2021-41190)."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = Field(alias="schemaVersion")
    media_type: str = Field("", alias="mediaType")
    config: BlobDescriptor | None = None
    layers: tuple[BlobDescriptor, ...] | None = None
    manifests: tuple[BlobDescriptor, ...] | None = None
    fs_layers: object = Field(None, alias="fsLayers")


def parse_manifest(contents: bytes, media_type: str = "") -> Manifest | Index:
    """A manifest or an index.

    Args:
        contents: the JSON text.
        media_type: what the source says it is; ``""`` when it does not say.

    Raises:
        ImageFormatError: it is neither, or contradicts itself.
        NotAnImageError: it is of something that is no image.
    """
    if len(contents) > MAX_MANIFEST_BYTES:
        raise ImageFormatError(f"the manifest has more than {MAX_MANIFEST_BYTES} bytes; it is none")
    try:
        file = _File.model_validate_json(contents)
    except ValidationError as error:
        raise ImageFormatError(f"not a manifest: {first_problem(error)}") from error
    if file.schema_version != 2 or file.fs_layers is not None:
        raise ImageFormatError("the manifest is of the old schema 1; push the image again with a program of today")
    if file.manifests is not None and (file.layers is not None or file.config is not None):
        raise ImageFormatError("the manifest is an index and an image at the same time; somebody is cheating")
    for said in {_plain(media_type), _plain(file.media_type)} & set(MANIFEST_TYPES):
        if (said in (OCI_INDEX, DOCKER_LIST)) != (file.manifests is not None):
            raise ImageFormatError(f"the manifest is said to be {said}, which it is not")
    if file.manifests is not None:
        return Index(tuple(_checked(one) for one in file.manifests[:_MAX_MANIFESTS] if _may_be_image(one)))
    if file.config is None or file.layers is None:
        raise ImageFormatError("the manifest has no config or no layers, so it is of no image")
    if not _is_config(file.config.media_type):
        raise NotAnImageError(f"it is no image, but an artifact of type {file.config.media_type[:100]!r}")
    if len(file.layers) > MAX_DEPTH:
        raise ImageFormatError(
            f"the image has {len(file.layers)} layers; {MAX_DEPTH} are the most a container can have"
        )
    for layer in file.layers:
        if layer.media_type and not _plain(layer.media_type).endswith(_LAYER_ENDINGS):
            raise NotAnImageError(f"a layer of type {layer.media_type[:100]!r} cannot be stored")
    return Manifest(_checked(file.config), tuple(_checked(one) for one in file.layers))


def _plain(media_type: str) -> str:
    """A media type without parameters, in lower case."""
    return media_type.partition(";")[0].strip().lower()


def _is_config(media_type: str) -> bool:
    plain = _plain(media_type)
    return plain in _GENERIC_TYPES or plain.startswith(_CONFIG_TYPES)


def _may_be_image(entry: BlobDescriptor) -> bool:
    """Whether an entry of an index can be an image: attestations, signatures and types not known here are passed over.

    Sources: image-index.md for types that are not known; BuildKit's "Image Attestation Storage" for the platform.
    """
    return (
        _plain(entry.media_type) in (*MANIFEST_TYPES, *_GENERIC_TYPES)
        and _is_config(entry.artifact_type)
        and (entry.platform is None or entry.platform.os != _NOBODY)
    )


def _checked(descriptor: BlobDescriptor) -> BlobDescriptor:
    try:
        parse_digest(descriptor.digest)
    except InvalidDigestError as error:
        raise ImageFormatError(f"the manifest has a digest that cannot be used: {error}") from error
    return descriptor


def missing_layer(layer: BlobDescriptor, error: ImageError) -> ImageError:
    """What to say of a layer that is not where its manifest is; ``error`` unless it is meant to be elsewhere.

    Layers that must not be passed on ("foreign", "non-distributable") are named with URLs of their owner.
    """
    if not layer.urls:
        return error
    where = "".join(c if c.isprintable() else " " for c in layer.urls[0])[:200]
    return ImageFormatError(
        f"layer {layer.digest} is only elsewhere (at {where}), where it is not fetched from; use an image that has all "
        "its layers"
    )


def choose(index: Index, wanted: Platform | None, what: str) -> BlobDescriptor:
    """The entry for a machine; the first of several that serve it equally well.

    Args:
        index: has entries for one or several platforms.
        wanted: None: this machine; then an index of a single image is fine whatever it is for.
        what: the image's name, for the message.

    Raises:
        ImageFormatError: there is none for that machine.
    """
    platform = wanted or Platform.of_this_machine()
    fitting = [
        (rank, number)
        for number, one in enumerate(index.manifests)
        if one.platform is not None and (rank := platform.rank(one.platform)) is not None
    ]
    if fitting:
        return index.manifests[min(fitting)[1]]
    # As Docker: an image that does not say what it is for comes last.
    silent = [one for one in index.manifests if one.platform is None or not one.platform.architecture]
    if silent or (len(index.manifests) == 1 and wanted is None):
        return (silent or index.manifests)[0]
    there = ", ".join(sorted({str(one.platform) for one in index.manifests}))
    raise ImageFormatError(f"{what} has nothing for {platform}; choose with --platform among: {there or 'none'}")
