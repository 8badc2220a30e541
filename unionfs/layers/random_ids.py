"""Random names of storage: cache-id, mount-id, init-id.

Docker's form: 64 lower-case hexadecimal digits, and never twelve decimal digits in front, because
the first twelve characters are shown as a short name and end up as host names, where a number is taken for an address.
"""

from __future__ import annotations

import re
import secrets

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
