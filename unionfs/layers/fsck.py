"""Checking a layer store, and repairing what can be repaired without losing anything that is still good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from unionfs.drivers.contract import ListingDriver, capabilities_of
from unionfs.errors import UnionfsError
from unionfs.host import mounts, unmount
from unionfs.host.mounts import Answer, probe
from unionfs.layers.gc import remove_trees
from unionfs.layers.identity import ChainID, digits_of
from unionfs.layers.metadata import Unreadable
from unionfs.layers.store import LayerStore

_SHORT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: ``layer``, ``container``, ``image``, ``stray``, ``leftover``, ``tree``, ``dead-mount``,
            ``stuck-mount``, ``record`` or ``damage``.
        name: what it is about: a chain id, a name, a path.
        what: what is wrong, one line.
        advice: what to do when it was not repaired.
        repaired: it is all right now.
        repairable: it would be repaired, if that were asked for.
    """

    kind: str
    name: str
    what: str
    advice: str
    repaired: bool = False
    repairable: bool = False


Progress = Callable[[ChainID, int, int], None]
"""Called before a layer is read in full: which, how many were read, of how many."""


def fsck(
    store: LayerStore, *, deep: bool = False, repair: bool = False, progress: Progress | None = None
) -> list[Problem]:
    """Check the store.

    Args:
        store: open, with ``recover`` off if half done operations are to be told. Nobody uses it meanwhile.
        deep: read every layer and compare it with its digest.
        repair: remove what is useless: unreadable records, what crashes left, trees of no layer, mounts whose server is
            gone, and damaged layers that nothing stands on. A container's files are never removed.
        progress: see :data:`Progress`.

    Returns:
        Everything that was found, also what was repaired.
    """
    if repair:
        store.records.check_writable()
    found = [*_dead_mounts(store, repair), *_unreadable(store, repair), *_leftovers(store, repair)]
    found += _orphans(store, repair)
    found += _records(store)
    if deep:
        missing = {problem.name for problem in found if problem.kind == "record"}
        found += _damage(store, repair, missing, progress)
    return found


def _dead_mounts(store: LayerStore, repair: bool) -> Iterator[Problem]:
    table = {mount.mount_point for mount in mounts.read_mounts()}
    trees = store.driver_ids().union(*(leftover.driver_ids for leftover in store.incomplete()))
    for tree in sorted(trees):
        try:
            point = store.driver.get_metadata(tree).get("MergedDir", "")
        except UnionfsError:
            continue
        point = mounts.canonical(point) if point else ""
        answer = probe(point) if point in table else Answer.ALIVE
        if answer is Answer.SILENT:
            advice = "end that process, and run unionfs fsck again"
            yield Problem("stuck-mount", point, "its file system server does not answer", advice)
        if answer is not Answer.DEAD:
            continue
        advice = f"unionfs umount --lazy {point}"
        problem = Problem("dead-mount", point, "its file system server is gone", advice, repairable=True)
        if repair:
            with suppress(OSError):
                unmount.unmount(point, lazy=True)
                problem = replace(problem, repaired=True)
        yield problem


def _unreadable(store: LayerStore, repair: bool) -> Iterator[Problem]:
    found = store.unreadable
    repaired: dict[tuple[str, str], str] = {}
    # What stands on others goes first, and then these.
    while repair:
        before = len(repaired)
        for one in store.unreadable:
            if (one.kind, one.name) not in repaired and not _why_record_stays(store, one):
                repaired[one.kind, one.name] = _remove_record(store, one)
        if len(repaired) == before:
            break
    causes = {digits_of(ChainID(one.name)): one for one in found if one.kind == "layer"}
    for one in found:
        failure = repaired.get((one.kind, one.name))
        what, advice = one.reason.partition("; run unionfs fsck")[0], _advice(store, one)
        # A layer takes all down that stands on it, each with its reason: that is told once.
        cause = next((layer for digits, layer in causes.items() if digits in one.path.split("/")), one)
        if cause is not one:
            what = f"stands on layer {digits_of(ChainID(cause.name))[:_SHORT_DIGITS]}, which cannot be read"
            advice = "comes back with it" if one.kind == "layer" else "comes back with it; its files stay until then"
        useless = not _why_record_stays(store, one)
        kind = "container" if one.kind == "mount" else one.kind
        yield Problem(kind, one.name, what, failure or advice, failure == "", repairable=useless)


def _advice(store: LayerStore, one: Unreadable) -> str:
    if one.kind == "stray":
        return "its tree is not removed"
    if one.kind == "layer":
        return "pull the image again that has it, or register the layer again"
    if one.parent and one.trees and store.driver.exists(one.trees[0]) and not one.shared:
        return "register the layers below it again, or put the file right; its tree is not removed"
    return f"put the file right, or remove it: unionfs container rm --force {one.name}; its tree is not removed"


def _remove_record(store: LayerStore, one: Unreadable) -> str:
    """Take it off the list, so that its tree goes with the leftovers; what went wrong."""
    try:
        if one.kind == "layer":
            store.records.remove_layer(ChainID(one.name))
        else:
            store.records.remove_mount(one.name)
    except (UnionfsError, OSError) as error:
        return str(error)
    store.claims.drop(one.kind, one.name)
    return ""


def _why_record_stays(store: LayerStore, one: Unreadable) -> str:
    """Why a record that cannot be used may still be needed; empty when it is of no use."""
    if isinstance(store.driver, ListingDriver) and not store.driver.layer_ids():
        return f"the {store.driver_name} driver has no tree at all, as when its file system is not mounted"
    if one.kind == "layer":
        return store.claims.why_layer_stays(one.name)
    if one.kind == "stray" or not one.trees or one.shared or store.driver.exists(one.trees[0]):
        return "its files may be there"
    return "its files may be among the trees that nothing names" if store.orphans() else ""


def _leftovers(store: LayerStore, repair: bool) -> Iterator[Problem]:
    for leftover in store.incomplete():
        repaired = repair and store.finish(leftover)
        yield Problem("leftover", leftover.path, leftover.what, "run unionfs gc", repaired, repairable=True)


def _orphans(store: LayerStore, repair: bool) -> Iterator[Problem]:
    trees = store.orphans()
    left = {tree: reason or "run unionfs gc" for tree, reason in trees.items()}
    if repair:
        removable = [tree for tree, reason in trees.items() if not reason]
        failed = remove_trees(store, removable)
        left = {tree: failed.get(tree, advice) for tree, advice in left.items() if tree in failed or trees[tree]}
    for tree in trees:
        what = f"the {store.driver_name} driver has it, but no layer"
        yield Problem("tree", tree, what, left.get(tree, ""), tree not in left, repairable=not trees[tree])


def _records(store: LayerStore) -> Iterator[Problem]:
    if capabilities_of(store.driver).reproduces_exact_diffs:
        return
    for chain_id in store.map():
        path = store.records.tar_split_path(chain_id)
        if not os.path.exists(path):
            advice = "remove the layer, and pull or register it again"
            yield Problem("record", chain_id, f"{path}: is missing, so the layer cannot be exported", advice)


def _damage(store: LayerStore, repair: bool, skip: set[str], progress: Progress | None) -> Iterator[Problem]:
    layers = {chain_id: layer for chain_id, layer in store.map().items() if chain_id not in skip}
    for number, (chain_id, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(chain_id, number, len(layers))
        damages = layer.damages()
        if not damages:
            continue
        useless = store.reference_count(chain_id) == 0
        repaired = False
        if repair and useless:
            with suppress(UnionfsError, OSError):
                repaired = bool(store.release(store.get(chain_id), keep_parents=True))
        advice = "remove what stands on it and the layer itself, then pull or register it again"
        for what in damages:
            yield Problem("damage", chain_id, what.rpartition("; ")[0] or what, advice, repaired, repairable=useless)
