"""Reading what ``docker save`` writes, in both of its layouts.

Both have a ``manifest.json``, a list of ``{"Config": path, "RepoTags": [...], "Layers": [path, ...]}``. Until Docker 24
the paths are ``<id>.json`` and ``<id>/layer.tar``, where a layer that comes twice is a symlink; since Docker 25 they
are ``blobs/sha256/<digest>``. Source: Docker image specification v1.2, "Combined Image JSON + Filesystem Changeset
Format".
"""

from __future__ import annotations

import posixpath
from functools import partial
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from unionfs.engines.images.install import FoundImage, LayerBlob
from unionfs.engines.images.manifest import MAX_MANIFEST_BYTES
from unionfs.engines.images.model import MAX_CONFIG_BYTES, digest_of, first_problem
from unionfs.engines.images.reference import parse_reference
from unionfs.engines.images.tar_files import TarFiles
from unionfs.errors import ImageFormatError
from unionfs.layers import MAX_DEPTH
from unionfs.layers.identity import ALGORITHM, is_hex_digest

MANIFEST = "manifest.json"

_BLOBS = f"blobs/{ALGORITHM}"
_MAX_IMAGES = 1000


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


def read_docker_archive(files: TarFiles) -> list[FoundImage]:
    """The images in the archive, in its order.

    Raises:
        ImageFormatError: something is missing, too large, or another thing than its name says.
    """
    try:
        entries = _ENTRIES.validate_json(files.read(MANIFEST, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        raise ImageFormatError(f"{MANIFEST}: {first_problem(error)}; it is not what docker save writes") from error
    if len(entries) > _MAX_IMAGES:
        raise ImageFormatError(f"{MANIFEST} names {len(entries)} images, where {_MAX_IMAGES} are the most")
    return [_image(files, entry) for entry in entries]


def _image(files: TarFiles, entry: _Entry) -> FoundImage:
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
