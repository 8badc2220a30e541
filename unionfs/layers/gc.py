"""Collecting what nobody references: half done operations, trees without a layer, and on demand unused layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unionfs.errors import LayerBusyError, UnionfsError
from unionfs.host.files import measure_tree
from unionfs.layers.store import LayerStore

# Where Docker's drivers tell the directory that holds a tree's own files.
_OWN_FILES_KEYS = ("UpperDir", "SourceDir")


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that nobody references.

    Attributes:
        kind: ``leftover``, ``tree`` or ``layer``.
        name: a path, a driver's id or a chain id.
        what: for people.
        size: bytes on disk, as far as that is known.
        problem: why it is still there; empty when it was removed, or was not to be.
    """

    kind: str
    name: str
    what: str
    size: int = 0
    problem: str = ""


def collect(store: LayerStore, *, layers: bool = False, dry_run: bool = False) -> list[Garbage]:
    """Remove what nobody references, and return it. What something damaged may need stays, with the reason.

    Args:
        store: open, preferably with ``recover`` off, so that what it would have cleaned up is told too.
        layers: also layers that no handle, layer or read-write layer needs. A store that is used through the command
            line has no handles: this removes every layer that no container stands on.
        dry_run: only tell.
    """
    if not dry_run:
        store.records.check_writable()
    found: list[Garbage] = []
    for leftover in store.incomplete():
        size = sum(disk_usage(store, tree) for tree in leftover.driver_ids)
        failed = not dry_run and not store.finish(leftover)
        problem = "see the log, and try again" if failed else ""
        found.append(Garbage("leftover", leftover.path, leftover.what, size, problem))
    orphans = store.orphans()
    sizes = {tree: disk_usage(store, tree) for tree in orphans}
    if not dry_run:
        orphans |= remove_trees(store, [tree for tree, reason in orphans.items() if not reason])
    found += [Garbage("tree", tree, "a tree of no layer", sizes[tree], reason) for tree, reason in orphans.items()]
    if layers:
        found += _unused_layers(store, dry_run)
    return found


def _unused_layers(store: LayerStore, dry_run: bool) -> list[Garbage]:
    """Layers whose count is zero, and those that only such layers need, top first."""
    found: list[Garbage] = []
    counts = {chain_id: store.reference_count(chain_id) for chain_id in store.map()}
    unused = [chain_id for chain_id, count in counts.items() if count == 0]
    for chain_id in unused:
        layer = store.map().get(chain_id)
        if layer is None:
            continue
        if reason := store.claims.why_layer_stays(chain_id):
            found.append(Garbage("layer", chain_id, "a layer that nobody uses", layer.diff_size, reason))
            continue
        if dry_run:
            current = layer
            while counts[current.chain_id] == 0 and not store.claims.why_layer_stays(current.chain_id):
                found.append(Garbage("layer", current.chain_id, "a layer that nobody uses", current.diff_size))
                if current.parent is None:
                    break
                current = current.parent
                counts[current.chain_id] -= 1
            continue
        try:
            for gone in store.release(store.get(chain_id)):
                found.append(Garbage("layer", gone.chain_id, "a layer that nobody uses", gone.diff_size))
        except (UnionfsError, OSError) as error:
            found.append(Garbage("layer", chain_id, "a layer that nobody uses", layer.diff_size, str(error)))
    return found


def remove_trees(store: LayerStore, trees: Iterable[str]) -> dict[str, str]:
    """Remove trees, those that others stand on last; what could not be removed, with the reason."""
    left = dict.fromkeys(trees, "")
    progress = True
    while left and progress:
        progress = False
        for tree in list(left):
            try:
                store.driver.remove(tree)
            except (UnionfsError, OSError) as error:
                left[tree] = str(error)
                if not isinstance(error, LayerBusyError):
                    continue
            else:
                del left[tree]
                progress = True
    return left


def disk_usage(store: LayerStore, tree: str) -> int:
    """Bytes on disk of what a tree itself holds; 0 when the driver does not say where that is, or it cannot be read."""
    try:
        facts = store.driver.get_metadata(tree)
    except UnionfsError:
        return 0
    root = next((facts[key] for key in _OWN_FILES_KEYS if facts.get(key)), None)
    return 0 if root is None else size_on_disk(root)


def size_on_disk(root: str) -> int:
    """Bytes on disk of all that is in a directory; 0 where something in it cannot be read."""
    try:
        return measure_tree(root).disk_bytes
    except OSError:
        return 0
