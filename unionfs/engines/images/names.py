"""The names of a store's images, in one file of Docker's format, ``repositories.json``.

``{"Repositories": {"alpine": {"alpine:latest": "sha256:<image id>", "alpine@sha256:<manifest>": "sha256:..."}}}``:
names as people write them, grouped by what stands before the tag. Source: moby, ``reference/store.go``.
"""

from __future__ import annotations

import json
import logging
import os

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unionfs.engines.images.model import first_problem
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.safe_files import replace_file
from unionfs.errors import ImageError, MetadataError

_log = logging.getLogger(__name__)


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore")

    repositories: dict[str, dict[str, str]] = Field(default_factory=dict, alias="Repositories")


class ImageNames:
    """Which name stands for which image. Every change is on disk when the method returns.

    Args:
        path: of the file; it need not be there.

    Raises:
        MetadataError: the file is damaged.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._ids: dict[Reference, str] = {}
        try:
            with open(path, "rb") as file:
                contents = file.read()
        except FileNotFoundError:
            return
        try:
            found = _File.model_validate_json(contents or b"{}")
        except ValidationError as error:
            raise MetadataError(
                f"{path}: is damaged ({first_problem(error)}); move it away, the images can then be named again by id"
            ) from error
        for group in found.repositories.values():
            for text, image_id in group.items():
                try:
                    self._ids[parse_reference(text)] = image_id
                except ImageError as error:
                    _log.warning("%s: %s", path, error)

    def image_id(self, reference: Reference) -> str | None:
        """What the name stands for. With a digest the tag says nothing."""
        if reference.digest:
            reference = Reference(reference.registry, reference.repository, digest=reference.digest)
        return self._ids.get(reference.with_default_tag())

    def of(self, image_id: str) -> tuple[str, ...]:
        """The image's names as people write them, sorted."""
        return tuple(sorted(one.familiar for one, known in self._ids.items() if known == image_id))

    def all(self) -> dict[Reference, str]:
        """All names with the ids of their images."""
        return dict(self._ids)

    def set(self, wanted: dict[Reference, str]) -> None:
        """Let names stand for images, whatever they stood for before. One with tag and digest becomes two."""
        changed = dict(self._ids)
        for reference, image_id in wanted.items():
            if reference.digest:
                changed[Reference(reference.registry, reference.repository, digest=reference.digest)] = image_id
            if reference.tag or not reference.digest:
                named = Reference(reference.registry, reference.repository, reference.tag)
                changed[named.with_default_tag()] = image_id
        self._write(changed)

    def remove(self, references: list[Reference]) -> None:
        """Forget names."""
        gone = set(references)
        self._write({one: image_id for one, image_id in self._ids.items() if one not in gone})

    def _write(self, ids: dict[Reference, str]) -> None:
        if ids == self._ids:
            return
        groups: dict[str, dict[str, str]] = {}
        for reference, image_id in ids.items():
            groups.setdefault(reference.familiar_name, {})[reference.familiar] = image_id
        text = json.dumps({"Repositories": groups}, separators=(",", ":"), sort_keys=True)
        replace_file(self._path, os.fsencode(text))
        self._ids = ids
