"""What can go wrong while packages are built, told to a person in one line."""

from __future__ import annotations

from unionfs.errors import UnionfsError


class BuildError(UnionfsError):
    """A package cannot be built; the message says what to do about it."""
