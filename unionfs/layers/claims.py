"""What may be removed from a store: the one rule that opening, gc, fsck and every release of a reference follow.

A tree stays while a record names it, readable as a whole or not, and so does a tree that no record names while some
record or user needs a tree that nobody can tell. A layer stays while something stands on it, readable or not, and while
something that cannot be read may stand on it. So damage costs space until it is repaired, and never files.

The layers, read-write layers and handles that the store knows are counted elsewhere; here is all that is not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from unionfs.layers.identity import ChainID
from unionfs.layers.metadata import Unreadable


@dataclass(frozen=True, slots=True)
class _User:
    """What one user outside of the layer store needs; ``layers`` is None when nobody can tell."""

    layers: frozenset[str] | None
    trees: frozenset[str]


class Claims:
    """The unreadable records of a store and the users outside of it. Safe to use from several threads.

    Args:
        unreadable: what was found when the store was opened.
        has_tree: whether the driver has a tree.
        has_layer: whether a layer of a chain id is loaded.
    """

    def __init__(
        self, unreadable: Iterable[Unreadable], has_tree: Callable[[str], bool], has_layer: Callable[[ChainID], bool]
    ) -> None:
        self._lock = threading.Lock()
        self._unreadable = tuple(unreadable)
        self._users: dict[str, _User] = {}
        self._has_tree = has_tree
        self._has_layer = has_layer

    @property
    def unreadable(self) -> list[Unreadable]:
        """What is stored but cannot be used, with reasons."""
        return list(self._unreadable)

    def find(self, kind: str, name: str) -> Unreadable | None:
        """The unreadable record of that kind and name."""
        return next((one for one in self._unreadable if (one.kind, one.name) == (kind, name)), None)

    def drop(self, kind: str, name: str) -> None:
        """An unreadable record was replaced or removed."""
        with self._lock:
            self._unreadable = tuple(one for one in self._unreadable if (one.kind, one.name) != (kind, name))

    def add_user(self, user: str, layers: Iterable[str] | None, trees: Iterable[str] = ()) -> None:
        """Something outside of the layer store needs layers and trees, whether they are there or not.

        Args:
            user: what it is, for people; it replaces what was said of the same one before.
            layers: chain ids; None when nobody can tell, because its own record is damaged.
            trees: the driver's ids.
        """
        with self._lock:
            known = None if layers is None else frozenset(layers)
            self._users = {**self._users, user: _User(known, frozenset(trees))}

    def drop_user(self, user: str) -> None:
        """It needs nothing any more. One that is not known is fine."""
        with self._lock:
            self._users = {one: needs for one, needs in self._users.items() if one != user}

    # Trees

    def trees(self, but: Unreadable | None = None) -> set[str]:
        """The trees that unreadable records, all but one, name."""
        return {tree for one in self._unreadable if one is not but for tree in one.trees}

    def why_tree_stays(self, tree: str) -> str:
        """Why a tree that no record names may be needed all the same; empty when it is of no use."""
        for name, user in self._users.items():
            if tree in user.trees:
                return f"it is that of {name}, whose record is gone; bring that back, or remove the container"
        return self.why_unnamed_trees_stay()

    def why_unnamed_trees_stay(self) -> str:
        """Why any tree that nothing names may be needed all the same."""
        for one in self._unreadable:
            if not one.trees or one.shared or not self._has_tree(one.trees[0]):
                return f"it may be that of {one}, which cannot be read; run unionfs fsck"
            if one.parent and not self._has_record(one.parent):
                return f"it may be that of {one.parent}, which {one} stands on; run unionfs fsck"
        for name, user in self._users.items():
            missing = sorted(chain_id for chain_id in user.layers or () if not self._has_record(ChainID(chain_id)))
            if missing:
                return f"it may be that of {missing[0]}, which {name} needs; get that again or remove it"
        return ""

    # Layers

    def why_layer_stays(self, chain_id: str) -> str:
        """Why a layer that nothing known stands on may be needed all the same; empty when it is of no use."""
        for one in self._unreadable:
            if one.name == chain_id:
                continue
            if one.parent == chain_id:
                return f"{one}, which cannot be read, stands on it; run unionfs fsck"
            if one.parent is None or (one.parent and not self._has_record(one.parent)):
                return f"{one}, which cannot be read, may stand on it; run unionfs fsck"
        for name, user in self._users.items():
            if user.layers is None or chain_id in user.layers:
                may = "may need" if user.layers is None else "needs"
                return f"{name} {may} it; get that again or remove it"
        return ""

    def _has_record(self, chain_id: ChainID) -> bool:
        return self._has_layer(chain_id) or self.find("layer", chain_id) is not None
