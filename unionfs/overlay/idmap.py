"""Mapping between the owner ids stored on disk and those that the mount presents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OVERFLOW_ID = 65534  # /proc/sys/kernel/overflowuid; the kernel's default on every distribution


@dataclass(frozen=True, slots=True)
class IdRange:
    """``length`` ids starting at ``disk`` on disk are shown as those starting at ``shown``."""

    disk: int
    shown: int
    length: int


class IdMap:
    """A set of id ranges, looked up in both directions; an empty map changes nothing.

    An id that no range covers is shown as the overflow id. In the other direction it is stored unchanged:
    the container engine creates files through the mount as an id outside of the map, and storing the overflow
    id for it locks the container out of them.
    """

    __slots__ = ("_to_disk", "_to_shown", "ranges")

    def __init__(self, ranges: Sequence[IdRange] = ()) -> None:
        self.ranges = tuple(ranges)
        # Owners repeat over and over in a root file system, so each answer is computed once. Bounded by the
        # number of distinct ids in use.
        self._to_shown: dict[int, int] = {}
        self._to_disk: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def to_shown(self, disk_id: int) -> int:
        """The id that the mount shows for ``disk_id``."""
        if not self.ranges:
            return disk_id
        shown = self._to_shown.get(disk_id)
        if shown is None:
            shown = OVERFLOW_ID
            for r in self.ranges:
                if r.disk <= disk_id < r.disk + r.length:
                    shown = r.shown + disk_id - r.disk
                    break
            self._to_shown[disk_id] = shown
        return shown

    def to_disk(self, shown_id: int) -> int:
        """The id to store for a caller or owner known as ``shown_id`` on the mount."""
        if not self.ranges:
            return shown_id
        disk = self._to_disk.get(shown_id)
        if disk is None:
            disk = shown_id
            for r in self.ranges:
                if r.shown <= shown_id < r.shown + r.length:
                    disk = r.disk + shown_id - r.shown
                    break
            self._to_disk[shown_id] = disk
        return disk
