"""Where the compressed form of a layer is known to be, so that a push need not send it again.

The files are Docker's, ``distribution/v2metadata-by-diffid/sha256/<diff id>``: a list of ``{"Digest": ...,
"SourceRepository": ..., "HMAC": ...}``. It takes all blobs for gzip, so only those are noted. They are hints: a
registry is asked before it is believed to have a blob, and losing them costs time only.
"""

from __future__ import annotations

import json
import logging
import os

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.errors import ImageError
from unionfs.host.disk import ensure_dir, replace_file
from unionfs.layers.identity import ALGORITHM, digits_of, is_hex_digest

_log = logging.getLogger(__name__)

_MOST = 50  # as Docker


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore")

    digest: str = Field(alias="Digest")
    repository: str = Field(alias="SourceRepository")
    hmac: str = Field(default="", alias="HMAC")


_ENTRIES = TypeAdapter(list[_Entry])


class BlobSources:
    """The notes of an image store.

    Args:
        root: the image store's.
    """

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, "distribution", "v2metadata-by-diffid", ALGORITHM)

    def of(self, diff_id: str) -> list[tuple[str, Reference]]:
        """Digests of a layer's blobs with the repositories that have them, the latest first."""
        found = []
        for entry in reversed(self._read(diff_id)):
            algorithm, _, digits = entry.digest.partition(":")
            try:
                where = parse_reference(entry.repository)
            except ImageError:
                continue
            if algorithm == ALGORITHM and is_hex_digest(digits):
                found.append((entry.digest, where))
        return found

    def note(self, diff_id: str, digest: str, repository: Reference) -> None:
        """A repository has a layer, compressed with gzip, as the blob ``digest``."""
        name = repository.name
        others = [one for one in self._read(diff_id) if (one.digest, one.repository) != (digest, name)]
        entries = [*others, _Entry(Digest=digest, SourceRepository=name, HMAC="")][-_MOST:]
        text = json.dumps([one.model_dump(by_alias=True) for one in entries], separators=(",", ":"))
        try:
            ensure_dir(self._directory, 0o700)
            replace_file(self._path(diff_id), text.encode(), 0o644)
        except OSError as error:
            _log.warning("cannot note where layer %s is: %s", diff_id, error)

    def _path(self, diff_id: str) -> str:
        return os.path.join(self._directory, digits_of(diff_id))

    def _read(self, diff_id: str) -> list[_Entry]:
        try:
            with open(self._path(diff_id), "rb") as file:
                return _ENTRIES.validate_json(file.read())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            _log.warning("%s: cannot be read: %s", self._path(diff_id), error)
            return []
