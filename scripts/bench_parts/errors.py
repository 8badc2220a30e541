"""What can go wrong in the benchmark, told to a person in one line."""

from __future__ import annotations

from unionfs.errors import UnionfsError


class BenchError(UnionfsError):
    """The benchmark cannot go on; the message says what to do about it."""


class LayersGoneError(BenchError):
    """Somebody removed the layers while they are measured."""


class SkippedError(UnionfsError):
    """A workload cannot be run here; the message says why. The others go on."""
