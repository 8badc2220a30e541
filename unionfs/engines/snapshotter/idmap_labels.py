"""The labels by which containerd asks for shifted ids: each a list ``container:host:length[,...]``.

A client sets them when it may rely on the snapshotter (``ctr run --remap-labels``, the capability ``remap-ids``),
rather than copy the whole tree to change its owners.
Source: containerd, core/snapshots/snapshotter.go, ``LabelSnapshotUIDMapping``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from unionfs.errors import SnapshotArgumentError

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"

_RANGE = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", re.ASCII)


class _Range(NamedTuple):
    container: int
    host: int
    length: int


class IdShift(NamedTuple):
    """Which ids a mount shows for those on disk, which are the container's; nothing is shifted when it is empty."""

    uids: tuple[_Range, ...] = ()
    gids: tuple[_Range, ...] = ()

    @classmethod
    def of_labels(cls, labels: Mapping[str, str]) -> IdShift:
        """What the labels of a snapshot ask for; raises :class:`SnapshotArgumentError` when that is no mapping."""
        return cls(_ranges(UID_LABEL, labels), _ranges(GID_LABEL, labels))

    def __bool__(self) -> bool:
        return bool(self.uids or self.gids)

    def mount_words(self) -> tuple[str, ...]:
        """The options of our mount program."""
        return tuple(
            f"{option}=" + ":".join(f"{one.container}:{one.host}:{one.length}" for one in ranges)
            for option, ranges in (("uidmapping", self.uids), ("gidmapping", self.gids))
            if ranges
        )


def _ranges(label: str, labels: Mapping[str, str]) -> tuple[_Range, ...]:
    text = labels.get(label, "")
    if not text:
        return ()
    found = [_RANGE.fullmatch(part) for part in text.split(",")]
    ranges = tuple(_Range(*map(int, match.groups())) for match in found if match is not None)
    if len(ranges) != len(found) or any(one.length == 0 for one in ranges):
        raise SnapshotArgumentError(f"label {label}={text!r} is no id mapping; write container:host:length[,...]")
    return ranges
