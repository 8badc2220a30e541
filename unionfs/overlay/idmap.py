"""Mapping between the owner ids of a container and those of the host: ranges, and what a mount makes of them.

A range is the triple that engines hand on: a container's id, the host's, and how many.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

OVERFLOW_ID = 65534  # /proc/sys/kernel/overflowuid; the kernel's default on every distribution


@dataclass(frozen=True, slots=True)
class IdRange:
    """``count`` ids starting at ``container`` in the container are those starting at ``host`` outside."""

    container: int
    host: int
    count: int


class IdTable:
    """A set of ranges, looked up in both directions."""

    __slots__ = ("_by_container", "_by_host", "ranges")

    def __init__(self, ranges: Sequence[IdRange] = ()) -> None:
        self.ranges = tuple(ranges)
        self._by_container = sorted((r.container, r.host, r.count) for r in ranges)
        self._by_host = sorted((r.host, r.container, r.count) for r in ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def to_host(self, number: int) -> int | None:
        """The host's id for the container's ``number``; None where no range covers it."""
        return _convert(self._by_container, number)

    def to_container(self, number: int) -> int | None:
        """The container's id for the host's ``number``; None where no range covers it."""
        return _convert(self._by_host, number)


def _convert(table: list[tuple[int, int, int]], number: int) -> int | None:
    at = bisect.bisect_right(table, (number, 1 << 64, 0)) - 1
    if at >= 0:
        start, target, count = table[at]
        if number < start + count:
            return target + number - start
    return None


class IdMap:
    """What a mount makes of ids: layers hold a container's, and the mount shows the host's. Empty: as they are.

    An id that no range covers is shown as the overflow id. In the other direction it is stored unchanged:
    the container engine creates files through the mount as an id outside of the map, and storing the overflow
    id for it locks the container out of them.
    """

    __slots__ = ("_layer_ids", "_mount_ids", "_table")

    def __init__(self, ranges: Sequence[IdRange] = ()) -> None:
        self._table = IdTable(ranges)
        # Owners repeat over and over in a root file system, so each answer is computed once. Bounded by the
        # number of distinct ids in use.
        self._mount_ids: dict[int, int] = {}
        self._layer_ids: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._table)

    @property
    def ranges(self) -> tuple[IdRange, ...]:
        """The ranges, as they were given."""
        return self._table.ranges

    def to_mount_id(self, layer_id: int) -> int:
        """The id that the mount shows for ``layer_id``."""
        if not self._table:
            return layer_id
        shown = self._mount_ids.get(layer_id)
        if shown is None:
            mapped = self._table.to_host(layer_id)
            shown = self._mount_ids[layer_id] = OVERFLOW_ID if mapped is None else mapped
        return shown

    def to_layer_id(self, mount_id: int) -> int:
        """The id to store for a caller or owner known as ``mount_id`` on the mount."""
        if not self._table:
            return mount_id
        disk = self._layer_ids.get(mount_id)
        if disk is None:
            mapped = self._table.to_container(mount_id)
            disk = self._layer_ids[mount_id] = mount_id if mapped is None else mapped
        return disk
