"""What a client asks for by the labels of a snapshot: shifted ids, a limit of its size.

Ids are lists ``container:host:length[,...]``. A client sets them when it may rely on the snapshotter (``ctr run
--remap-labels``, the capability ``remap-ids``), rather than copy the whole tree to change its owners.
Source of the labels: containerd, core/snapshots/snapshotter.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from unionfs.errors import SnapshotArgumentError

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"

SIZE_LABEL = "containerd.io/snapshot/max-size"
"""Bytes that an active snapshot itself may take."""

_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", re.ASCII)


class _Range(NamedTuple):
    container: int
    host: int
    length: int


class Wishes(NamedTuple):
    """What a mount is to do beyond showing the tree. Ids on disk are the container's; it shows the host's for them."""

    uids: tuple[_Range, ...] = ()
    gids: tuple[_Range, ...] = ()
    max_size_bytes: int = 0

    @classmethod
    def of_labels(cls, labels: Mapping[str, str], *, writable: bool) -> Wishes:
        """What the labels of a snapshot ask for.

        Raises:
            SnapshotArgumentError: a label cannot be understood.
        """
        size = _size(labels)
        return cls(_ranges(UID_LABEL, labels), _ranges(GID_LABEL, labels), size if writable else 0)

    def mount_words(self) -> tuple[str, ...]:
        """The options of our mount program; none when any mount will do."""
        words = [
            f"{option}=" + ":".join(f"{one.container}:{one.host}:{one.length}" for one in ranges)
            for option, ranges in (("uidmapping", self.uids), ("gidmapping", self.gids))
            if ranges
        ]
        return (*words, f"quota={self.max_size_bytes}") if self.max_size_bytes else tuple(words)


def _size(labels: Mapping[str, str]) -> int:
    text = labels.get(SIZE_LABEL, "0")
    if not _NUMBER.fullmatch(text):
        raise SnapshotArgumentError(f"label {SIZE_LABEL}={text!r} is no size; write a number of bytes")
    return int(text)


def _ranges(label: str, labels: Mapping[str, str]) -> tuple[_Range, ...]:
    text = labels.get(label, "")
    if not text:
        return ()
    found = [_RANGE.fullmatch(part) for part in text.split(",")]
    ranges = tuple(_Range(*map(int, match.groups())) for match in found if match is not None)
    if len(ranges) != len(found) or any(one.length == 0 for one in ranges):
        raise SnapshotArgumentError(f"label {label}={text!r} is no id mapping; write container:host:length[,...]")
    return ranges
