"""Owner ids in archives (a container's) and on disk (the host's), converted both ways.

The rules are Docker's ``IdentityMapping``: an empty mapping changes nothing; an id that no
range covers is an error, since guessing an owner would hand files to the wrong user.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unionfs.errors import ArchiveError

MapOwner = Callable[[int, int], tuple[int, int]]
"""Maps (uid, gid) to (uid, gid); raises :class:`ArchiveError` for an id that has no counterpart."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """``count`` ids starting at ``container`` in the container are those starting at ``host`` outside."""

    container: int
    host: int
    count: int


class IdMapping:
    """Ranges for users and for groups.

    Args:
        uids: ranges for user ids; none: unchanged.
        gids: ranges for group ids; none: unchanged.
    """

    def __init__(self, uids: Sequence[IdRange] = (), gids: Sequence[IdRange] = ()) -> None:
        self.uids = tuple(sorted(uids, key=lambda r: r.container))
        self.gids = tuple(sorted(gids, key=lambda r: r.container))
        self._uids = _Ranges(uids)
        self._gids = _Ranges(gids)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Host ids of an owner in the container; raises :class:`ArchiveError` naming an unmapped id."""
        return self._uids.to_host(uid), self._gids.to_host(gid)

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """Container ids of an owner on disk; raises :class:`ArchiveError` naming an unmapped id."""
        return self._uids.to_container(uid), self._gids.to_container(gid)

    def root(self) -> tuple[int, int]:
        """Host ids of the container's root."""
        return self.to_host(0, 0)


class _Ranges:
    def __init__(self, ranges: Sequence[IdRange]) -> None:
        self._by_container = sorted((r.container, r.host, r.count) for r in ranges)
        self._by_host = sorted((r.host, r.container, r.count) for r in ranges)

    def to_host(self, number: int) -> int:
        return _convert(self._by_container, number, "container ID %d cannot be mapped to a host ID")

    def to_container(self, number: int) -> int:
        return _convert(self._by_host, number, "host ID %d cannot be mapped to a container ID")


def _convert(table: list[tuple[int, int, int]], number: int, refusal: str) -> int:
    if not table:
        return number
    at = bisect.bisect_right(table, (number, 1 << 64, 0)) - 1
    if at >= 0:
        start, target, count = table[at]
        if number < start + count:
            return target + number - start
    raise ArchiveError(refusal % number + "; extend the id ranges (/etc/subuid and /etc/subgid)")
