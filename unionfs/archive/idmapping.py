"""Owner ids in archives (a container's) and on disk (the host's), converted both ways.

The rules are Docker's ``IdentityMapping``: an empty mapping changes nothing; an id that no
range covers is an error, since guessing an owner would hand files to the wrong user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unionfs.errors import ArchiveError
from unionfs.overlay.idmap import IdRange, IdTable

_ADVICE = "extend the id ranges (/etc/subuid and /etc/subgid)"

MapOwner = Callable[[int, int], tuple[int, int]]
"""Maps (uid, gid) to (uid, gid); raises :class:`ArchiveError` for an id that has no counterpart."""


class IdMapping:
    """Ranges for users and for groups.

    Args:
        uids: ranges for user ids; none: unchanged.
        gids: ranges for group ids; none: unchanged.
    """

    def __init__(self, uids: Sequence[IdRange] = (), gids: Sequence[IdRange] = ()) -> None:
        self.uids = tuple(sorted(uids, key=lambda r: r.container))
        self.gids = tuple(sorted(gids, key=lambda r: r.container))
        self._uids = IdTable(uids)
        self._gids = IdTable(gids)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Host ids of an owner in the container; raises :class:`ArchiveError` naming an unmapped id."""
        return _to_host(self._uids, uid), _to_host(self._gids, gid)

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """Container ids of an owner on disk; raises :class:`ArchiveError` naming an unmapped id."""
        return _to_container(self._uids, uid), _to_container(self._gids, gid)

    def root(self) -> tuple[int, int]:
        """Host ids of the container's root."""
        return self.to_host(0, 0)


def _to_host(table: IdTable, number: int) -> int:
    found = table.to_host(number) if table else number
    if found is None:
        raise ArchiveError(f"container ID {number} cannot be mapped to a host ID; {_ADVICE}")
    return found


def _to_container(table: IdTable, number: int) -> int:
    found = table.to_container(number) if table else number
    if found is None:
        raise ArchiveError(f"host ID {number} cannot be mapped to a container ID; {_ADVICE}")
    return found
