"""Change lists: what one tree adds to, changes in and deletes from another.

The rules are those of ``docker diff`` (moby's ``archive.Changes`` and ``ChangesDirs``): a directory with changes
beneath it is C and comes before them, even if it is unchanged itself; of a deleted directory only the top is
listed; of a new one everything; the root itself is never listed. Paths come sorted by their bytes ("/a-b"
before "/a/b"), the order in which an archive of the changes is written.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from unionfs.archive.compare import Same, exact_same, naive_same
from unionfs.archive.overlay_view import ALL_SPACES, Node, OpenMerged, OverlayView, PlainView, View
from unionfs.errors import LayerError
from unionfs.host.files import RootedDir
from unionfs.overlay.rules import Spaces

_KEPT_IN_ALL = 64  # directories held open, of all layers


class ChangeKind(enum.Enum):
    """What happened to a path; the value is the letter that people see."""

    MODIFY = "C"
    ADD = "A"
    DELETE = "D"

    @property
    def docker_number(self) -> int:
        """The number in Docker's API: 0 modified, 1 added, 2 deleted."""
        return "CAD".index(self.value)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an entry lies on disk: path ``rel`` (no leading slash) beneath the directory ``root``."""

    root: bytes
    rel: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a change list. Two are equal when path and kind are.

    Attributes:
        path: absolute path in the tree, as bytes.
        kind: added, modified or deleted.
        stat: the entry's attributes now; None for a deletion.
        meta: where its attributes and xattrs lie; None for a deletion.
        data: where the contents of a regular file lie (elsewhere than ``meta`` for a metadata-only copy); None for a
            deletion, and for a metadata-only copy whose data is missing.
    """

    path: bytes
    kind: ChangeKind
    stat: os.stat_result | None = field(default=None, compare=False, repr=False)
    meta: Origin | None = field(default=None, compare=False, repr=False)
    data: Origin | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind.value} {self.path.decode('utf-8', 'backslashreplace')}"


def changes_of_upper(
    upper: str | bytes,
    lowers: Sequence[str | bytes],
    *,
    data_only: Sequence[str | bytes] = (),
    spaces: Spaces = ALL_SPACES,
) -> Iterator[Change]:
    """The changes that an overlay upper directory makes to its lower layers.

    Reads the upper directory and looks its names up in the lowers, so the time is proportional to what
    changed and not to the size of the image. A file that was copied up but is still identical, contents included, is
    no change unless it has more names than before.

    Args:
        upper: the upper directory (an overlay2 ``diff`` directory).
        lowers: the lower directories, top first; none for a base layer, of which everything is added.
        data_only: lowers after ``::``, reached by metadata-only copies alone.
        spaces: the xattr name spaces of the mount that wrote the upper directory. Give the one it used where that
            is known: an overlay by root takes ``user.overlay.`` for ordinary xattrs, and a container can set them.

    Raises:
        LayerError: one of the directories is missing or is no directory, or an object in them has an invalid redirect.
    """
    with ExitStack() as stack:
        keep = max(_KEPT_IN_ALL // (1 + len(lowers)), 2)
        top = _open_layer(stack, upper, keep)
        below = [_open_layer(stack, lower, keep) for lower in lowers]
        data = [_open_layer(stack, lower, 0) for lower in data_only]
        new = OverlayView([top, *below], data, spaces=spaces)
        old = OverlayView(below, data, spaces=spaces) if below else None
        yield from _Comparison(new, old, exact_same(spaces), upper=top).changes()


def changes_of_trees(new: str | bytes, old: str | bytes | None, *, all_xattrs: bool = False) -> Iterator[Change]:
    """The changes between two complete trees, compared entry by entry from their attributes.

    Cannot see an edit that keeps size, mode, owner and mtime (see :func:`unionfs.archive.compare.naive_same`): use
    :func:`changes_of_upper` where there is an upper directory.

    Args:
        new: the changed tree.
        old: the tree it is compared with; None for an empty one.
        all_xattrs: compare user, trusted and ACL xattrs too, instead of ``security.capability`` only.

    Raises:
        LayerError: one of the directories is missing or is no directory.
    """
    with ExitStack() as stack:
        new_view = PlainView(_open_layer(stack, new, _KEPT_IN_ALL // 2))
        old_view = None if old is None else PlainView(_open_layer(stack, old, _KEPT_IN_ALL // 2))
        yield from _Comparison(new_view, old_view, naive_same(all_xattrs), upper=None).changes()


def size_of(changes: Iterable[Change]) -> int:
    """Bytes that the added and modified entries hold: lengths, not disk blocks.

    Directories and deletions count nothing; a file with several names counts once.
    """
    total = 0
    seen: set[tuple[int, int]] = set()
    for change in changes:
        info = change.stat
        if info is None or change.kind is ChangeKind.DELETE or stat.S_ISDIR(info.st_mode):
            continue
        if info.st_nlink > 1:
            key = (info.st_dev, info.st_ino)
            if key in seen:
                continue
            seen.add(key)
        total += info.st_size
    return total


def _open_layer(stack: ExitStack, path: str | bytes, keep: int) -> RootedDir:
    try:
        return stack.enter_context(RootedDir(path, keep))
    except OSError as error:
        raise LayerError(
            f"cannot read the layer directory {os.fsdecode(path)}: {error.strerror}; "
            "give the path of an existing directory"
        ) from error


# A container may be running while its upper directory is read: what it removed meanwhile is not there.
_VANISHED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class _Event(NamedTuple):
    """A step of the comparison of one directory: list the entry itself, or go into it."""

    key: bytes  # decides the order: the name, with a slash when it is time to go in
    path: bytes
    new: Node | None
    old: Node | None

    @property
    def goes_in(self) -> bool:
        return self.key.endswith(b"/")


_Way = tuple[Sequence[bytes], int]
"""Names that lead to a change from somewhere above, and which of them is in the directory at hand; none: not known."""


class _Frame:
    """A directory on the way down, with its own line while that is not known to be needed."""

    __slots__ = ("ahead", "events", "pending", "position", "way")

    def __init__(self, events: list[_Event], pending: Change | None, way: _Way = ((), 0)) -> None:
        self.events = events
        self.position = 0
        self.pending = pending
        self.way = way
        self.ahead: dict[bytes, Sequence[bytes]] = {}  # directories that were looked into: the way to a change, or none

    def leads_to_change(self, name: bytes) -> bool:
        """Whether the directory ``name`` in it is known to hold a change."""
        names, i = self.way
        return i + 1 < len(names) and names[i] == name

    def way_in(self, event: _Event) -> _Way:
        """What is known of the directory that ``event`` goes into."""
        names, i = self.way
        if self.leads_to_change(event.key[:-1]):
            return names, i + 1
        return self.ahead.get(event.path, ()), 0


class _Comparison:
    """Walks two views side by side. No recursion: a hostile tree may be thousands of directories deep."""

    def __init__(self, new: View, old: View | None, same: Same, upper: RootedDir | None) -> None:
        self._new = new
        self._old = old
        self._same = same
        self._upper = upper

    def changes(self) -> Iterator[Change]:
        new = self._new.root()
        old = self._old.root() if self._old is not None else None
        if old is not None and new.identity == old.identity:
            return iter(())
        return self._walk(self._events(b"", new, old), ordered=True)

    def _walk(self, events: list[_Event], ordered: bool) -> Iterator[Change]:
        """Changes for ``events`` and all beneath.

        A directory whose own attributes are unchanged is listed when the first change beneath it shows up. With
        ``ordered``, one that has to be listed before a sibling that sorts between it and its contents ("a", "a-b",
        "a/x") is looked into beforehand. Without, such lines are left out: the first is the first change.
        """
        frames = [_Frame(events, None)]
        while frames:
            frame = frames[-1]
            if frame.position == len(frame.events):
                frames.pop()
                continue
            event = frame.events[frame.position]
            frame.position += 1
            if event.goes_in:
                if frame.ahead.get(event.path) == ():
                    continue
                assert event.new is not None
                unlisted = ordered and event.old is not None and self._unchanged_dir(event)
                looked_ahead = unlisted and self._has_sibling_between(frame, event)
                pending = _change(event, ChangeKind.MODIFY) if unlisted and not looked_ahead else None
                inside = self._events(event.path, event.new, event.old)
                frames.append(_Frame(inside, pending, frame.way_in(event)))
                continue
            kind = self._kind(frame, event, ordered)
            if kind is None:
                continue
            for above in frames:
                if above.pending is not None:
                    yield above.pending
                    above.pending = None
            yield _change(event, kind)

    def _kind(self, frame: _Frame, event: _Event, ordered: bool) -> ChangeKind | None:
        if event.new is None:
            return ChangeKind.DELETE
        if event.old is None:
            return ChangeKind.ADD
        if event.new.is_dir != event.old.is_dir or not self._same(event.new, event.old):
            return ChangeKind.MODIFY
        if not event.new.is_dir and event.new.stat.st_nlink > event.old.stat.st_nlink:
            return ChangeKind.MODIFY  # a link to it was added, which an archive makes only to a file that it has
        if event.new.is_dir and ordered and self._sibling_follows(frame, event):
            if frame.leads_to_change(event.key):
                return ChangeKind.MODIFY
            inside = self._events(event.path, event.new, event.old)
            first = next(self._walk(inside, ordered=False), None)
            # All directories on the way to it hold a change, and need not be looked into when their turn comes.
            way = tuple(first.path[len(event.path) + 1 :].split(b"/")) if first is not None else ()
            frame.ahead[event.path] = way
            return ChangeKind.MODIFY if way else None
        return None

    def _unchanged_dir(self, event: _Event) -> bool:
        assert event.new is not None
        assert event.old is not None
        return event.old.is_dir and self._same(event.new, event.old)

    @staticmethod
    def _sibling_follows(frame: _Frame, event: _Event) -> bool:
        """Whether another event comes between the line of a directory and its contents."""
        following = frame.events[frame.position]
        return following.key != event.key + b"/"

    @staticmethod
    def _has_sibling_between(frame: _Frame, event: _Event) -> bool:
        """The same question, asked when it is time to go in."""
        before = frame.events[frame.position - 2]
        return before.key + b"/" != event.key

    def _events(self, path: bytes, new: Node, old: Node | None) -> list[_Event]:
        """What to do for the entries of the directory ``path``, in order; identical objects are left out."""
        events: list[_Event] = []
        old_dir = old if old is not None and old.is_dir else None
        for name, a, b in self._pairs(new, old_dir):
            if a is not None and b is not None and a.identity == b.identity:
                continue
            child = path + b"/" + name
            events.append(_Event(name, child, a, b))
            if a is not None and a.is_dir:
                events.append(_Event(name + b"/", child, a, b if b is not None and b.is_dir else None))
        events.sort()
        return events

    def _pairs(self, new: Node, old: Node | None) -> list[tuple[bytes, Node | None, Node | None]]:
        """(name, new, old) for every name that one of the two directories shows and that may differ."""
        pairs: list[tuple[bytes, Node | None, Node | None]] = []
        with ExitStack() as stack:
            try:
                a = stack.enter_context(self._new.open(new))
            except OSError as error:
                if error.errno in _VANISHED:
                    return []
                raise
            b = None
            if old is not None and self._old is not None:
                b = stack.enter_context(self._old.open(old))
            if b is None:
                names = a.names()
            elif self._only_upper_differs(new, old) and isinstance(a, OpenMerged):
                names = a.top_names()
            else:
                names = a.names() | b.names()
            for name in names:
                found = a.lookup(name)
                covered = b.lookup(name) if b is not None else None
                if found is not None or covered is not None:
                    pairs.append((name, found, covered))
        return pairs

    def _only_upper_differs(self, new: Node, old: Node | None) -> bool:
        """Whether the two directories are the same but for what the upper layer's directory says."""
        return (
            self._upper is not None
            and old is not None
            and new.stack[0].layer is self._upper
            and new.stack[1:] == old.stack
        )


def _change(event: _Event, kind: ChangeKind) -> Change:
    node = event.new
    if node is None:
        return Change(event.path, kind)
    return Change(
        event.path,
        kind,
        node.stat,
        Origin(node.place.layer.path, node.place.rel),
        None if node.data is None else Origin(node.data.layer.path, node.data.rel),
    )
