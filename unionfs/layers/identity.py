"""How layers are named: by what they contain (DiffID, ChainID), and in the driver, by random ids.

A DiffID is the sha256 of a layer's uncompressed tar stream, every byte of it. A ChainID names a layer together with all
layers below it. Source: OCI image specification, config.md, "Layer ChainID" and "Layer DiffID".
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from typing import NewType

from unionfs.errors import InvalidDigestError

DiffID = NewType("DiffID", str)
"""``sha256:`` and 64 lower-case hexadecimal digits: one layer's own contents."""

ChainID = NewType("ChainID", str)
"""Written like a :data:`DiffID`: a layer with everything below it. ``""`` is the chain of no layers."""

NO_CHAIN = ChainID("")

ALGORITHM = "sha256"

_HEX = re.compile(r"[a-f0-9]{64}")


def is_hex_digest(text: str) -> bool:
    """Whether ``text`` is the 64 digits of a sha256 digest, as in a directory's name."""
    return _HEX.fullmatch(text) is not None


def parse_digest(text: str, what: str = "digest") -> str:
    """``text``, checked to be a sha256 digest.

    Args:
        text: such as ``sha256:e3b0...``.
        what: the thing's name in the error.

    Raises:
        InvalidDigestError: it is anything else.
    """
    algorithm, colon, digits = text.partition(":")
    if algorithm != ALGORITHM or not colon or not is_hex_digest(digits):
        raise InvalidDigestError(f"invalid {what} {text[:100]!r}; write sha256: and 64 lower-case hexadecimal digits")
    return text


def digits_of(digest: str) -> str:
    """The hexadecimal part of a valid digest."""
    return digest.partition(":")[2]


def diff_id_of(contents: bytes) -> DiffID:
    """The DiffID of a layer whose tar stream is ``contents``."""
    return DiffID(f"{ALGORITHM}:{hashlib.sha256(contents).hexdigest()}")


def create_chain_id(diff_ids: Iterable[str]) -> ChainID:
    """The ChainID of the layers ``diff_ids``, base layer first; ``""`` for none."""
    chain = NO_CHAIN
    for diff_id in diff_ids:
        chain = extend_chain(chain, DiffID(diff_id))
    return chain


def extend_chain(parent: ChainID, diff_id: DiffID) -> ChainID:
    """The ChainID of the layer ``diff_id`` on top of ``parent`` (``""``: on nothing)."""
    if not parent:
        return ChainID(diff_id)
    return ChainID(diff_id_of(f"{parent} {diff_id}".encode("ascii")))


INIT_SUFFIX = "-init"

_ID = re.compile(r"[a-f0-9]{64}(-init)?")
_SHORT_LENGTH = 12


def new_id() -> str:
    """A fresh random identifier."""
    while True:
        candidate = secrets.token_hex(32)
        if not candidate[:_SHORT_LENGTH].isdecimal():
            return candidate


def is_valid_id(text: str) -> bool:
    """Whether ``text`` can be a mount-id or an init-id."""
    return _ID.fullmatch(text) is not None
