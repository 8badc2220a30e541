"""What can go wrong in the quickstart, told to a person in one line."""

from __future__ import annotations

from unionfs.errors import UnionfsError


class QuickstartError(UnionfsError):
    """The quickstart cannot go on; the message says what to do about it."""


class CommandFailedError(QuickstartError):
    """A program that the quickstart ran did not succeed; ``output`` is what it said."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output
