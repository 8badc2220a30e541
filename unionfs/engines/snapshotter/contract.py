"""What a snapshotter is: containerd's contract (core/snapshots/snapshotter.go) as a Python protocol.

A snapshot is a file tree with a name. An *active* one can be written; committing it makes a *committed* one, which is
never written again and which others can be made over; a *view* is a committed one to look at. Its name is called key
as long as it is not committed. All names share one space: a key may not be the name of a committed snapshot, nor the
other way round.

How containerd uses it, an image of two layers and a container::

    prepare("extract-1 sha256:a")                   a writable tree over nothing, for the first layer's files
    commit("sha256:a", "extract-1 sha256:a")        it is named by its chain id from now on, and its key is free
    prepare("extract-2 sha256:b", "sha256:a")       the same over the first layer
    commit("sha256:b", "extract-2 sha256:b")
    prepare("container", "sha256:b")                the container's root
    mounts("container")                             again and again: when it starts, and whenever somebody looks at it
    view("container-view", "sha256:b")              what it was made from, to compare with
    remove("container-view"); remove("container")
    remove("sha256:b"); remove("sha256:a")          children first
    cleanup()                                       the files of all that was removed go now

The snapshotter does not mount anything for its callers: it says what they are to mount.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

LABEL_MAX_BYTES = 4096
"""What a label's key and value may have together (containerd's ``labels.Validate``)."""


class Kind(enum.IntEnum):
    """What a snapshot is; the values are those of the protocol."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What is known about a snapshot.

    Attributes:
        name: its name, or its key.
        parent: name of the committed snapshot it was made over; empty for none.
        kind: what it is.
        created_ns: when it was prepared or committed, in nanoseconds since 1970.
        updated_ns: when its labels were changed last, likewise.
        labels: texts that its users attached.
    """

    name: str
    parent: str
    kind: Kind
    created_ns: int
    updated_ns: int
    labels: Mapping[str, str] = field(default_factory=dict)


class Usage(NamedTuple):
    """What a snapshot itself takes on disk, its parents left out."""

    size_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Arguments of one mount(8), without the mount point: ``mount -t TYPE -o OPTIONS SOURCE``."""

    type: str
    source: str
    options: tuple[str, ...]


class Snapshotter(Protocol):
    """Keeps snapshots. Calls may come from several threads at once.

    Every call raises :class:`unionfs.errors.SnapshotNotFoundError` for a name that does not exist,
    :class:`unionfs.errors.SnapshotArgumentError` for arguments that never can work, and
    :class:`unionfs.errors.SnapshotterError` for what goes wrong on this host.
    """

    def stat(self, key: str) -> Info:
        """What is known about a snapshot of any kind."""

    def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] = ()) -> Info:
        """Change labels and return the result; a label with an empty value is removed.

        Args:
            name: a snapshot of any kind.
            labels: the new labels.
            fields: which of them to change, ``labels.KEY`` for one; ``labels``, or nothing at all, replaces them all.

        Raises:
            SnapshotArgumentError: one of ``fields`` cannot be changed.
        """

    def usage(self, key: str) -> Usage:
        """What the snapshot takes: of an active one now, of a committed one when it was committed."""

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """What to mount to get at the tree of an active snapshot or of a view; the same each time.

        Raises:
            SnapshotStateError: it is a committed one.
        """

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """Make an active snapshot over the committed ``parent``, or over nothing; returns its :meth:`mounts`.

        Raises:
            SnapshotExistsError: the key is taken; or there is a committed snapshot already of the layer that the label
                ``containerd.io/snapshot.ref`` names, over the same parent, for a snapshotter that shares layers.
            SnapshotArgumentError: the parent is not committed.
        """

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """As :meth:`prepare`, but what it returns is mounted read-only, and it cannot be committed."""

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Make the active snapshot ``key`` the committed one ``name``, which is on stable storage afterwards.

        Its labels are ``labels`` alone. Whoever has it mounted must have unmounted it.

        Raises:
            SnapshotExistsError: the name is taken.
            SnapshotStateError: ``key`` is not active.
        """

    def remove(self, key: str) -> None:
        """Remove a snapshot of any kind. Its files may take space until :meth:`cleanup`.

        Raises:
            SnapshotStateError: it is the parent of others.
        """

    def walk(self, filters: Sequence[str] = ()) -> list[Info]:
        """The snapshots that one of ``filters`` matches (:mod:`.filters`), all without filters; sorted by name.

        Raises:
            SnapshotArgumentError: a filter cannot be understood.
        """

    def cleanup(self) -> None:
        """Delete the files of removed snapshots."""

    def close(self) -> None:
        """Release everything but the mounts, which containers use; closing twice is harmless."""
