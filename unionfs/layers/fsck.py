"""Checking a layer store, and repairing what can be repaired without losing anything that is still good."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from unionfs.drivers.contract import capabilities_of
from unionfs.errors import MetadataError, UnionfsError
from unionfs.host import mountinfo, unmount
from unionfs.layers.identity import ChainID
from unionfs.layers.metadata import Unreadable
from unionfs.layers.orphans import orphaned_trees, remove_trees
from unionfs.layers.store import LayerStore


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: ``layer``, ``mount``, ``leftover``, ``tree``, ``dead-mount``, ``record`` or ``damage``.
        name: what it is about: a chain id, a name, a path.
        what: what is wrong, one line.
        advice: what to do when it was not repaired.
        repaired: it is all right now.
    """

    kind: str
    name: str
    what: str
    advice: str
    repaired: bool = False


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
    found = [*_dead_mounts(store, repair), *_unreadable(store, repair), *_leftovers(store, repair)]
    found += _orphans(store, repair)
    found += _records(store)
    if deep:
        missing = {problem.name for problem in found if problem.kind == "record"}
        found += _damage(store, repair, missing, progress)
    return found


def _dead_mounts(store: LayerStore, repair: bool) -> Iterator[Problem]:
    table = {mount.mount_point for mount in mountinfo.read_mounts()}
    trees = store.driver_ids().union(*(leftover.driver_ids for leftover in store.leftovers()))
    for tree in sorted(trees):
        try:
            point = store.driver.get_metadata(tree).get("MergedDir", "")
        except UnionfsError:
            continue
        point = mountinfo.canonical(point) if point else ""
        if point not in table or not _is_dead(point):
            continue
        problem = Problem("dead-mount", point, "its file system server is gone", f"umount -l {point}")
        if repair:
            with suppress(OSError):
                unmount.unmount(point, lazy=True)
                problem = replace(problem, repaired=True)
        yield problem


def _is_dead(point: str) -> bool:
    try:
        os.statvfs(point)  # the kernel may remember the attributes of a root, but asks for this
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _unreadable(store: LayerStore, repair: bool) -> Iterator[Problem]:
    needed = set(_needed_by_containers(store))
    for one in list(store.unreadable):
        advice = "register the layer again"
        if one.kind == "mount":
            advice = "register the layers below it again, or correct its file mount-id; its tree is not removed"
        problem = Problem(one.kind, one.name, one.reason, advice)
        if repair and _can_go(store, one, needed):
            try:
                if one.kind == "layer":
                    store.records.remove_layer(ChainID(one.name))
                else:
                    store.records.remove_mount(one.name)
                store.unreadable.remove(one)
                problem = replace(problem, repaired=True)
            except (UnionfsError, OSError) as error:
                problem = replace(problem, advice=str(error))
        yield problem


def _needed_by_containers(store: LayerStore) -> Iterator[str]:
    """Unreadable layers below containers: if they come back, so does the container."""
    for one in store.unreadable:
        if one.kind != "mount":
            continue
        with suppress(MetadataError, OSError):
            current = store.records.mount(one.name).parent
            while current:
                yield current
                current = store.records.layer(current).parent


def _can_go(store: LayerStore, one: Unreadable, needed: set[str]) -> bool:
    if one.kind == "layer":
        return one.name not in needed
    try:
        return not store.driver.exists(store.records.mount(one.name).mount_id)
    except (MetadataError, OSError):
        return False  # its files may be those of one of the orphaned trees


def _leftovers(store: LayerStore, repair: bool) -> Iterator[Problem]:
    for leftover in store.leftovers():
        repaired = repair and store.finish(leftover)
        yield Problem("leftover", leftover.path, leftover.what, "run unionfs gc", repaired)


def _orphans(store: LayerStore, repair: bool) -> Iterator[Problem]:
    trees = orphaned_trees(store)
    left = dict.fromkeys(trees, "run unionfs gc")
    # One of them may be the files of a container whose record is damaged: not ours to decide.
    if repair and not any(one.kind == "mount" for one in store.unreadable):
        left = remove_trees(store, trees)
    for tree in trees:
        advice = left.get(tree, "")
        yield Problem("tree", tree, f"the {store.driver_name} driver has it, but no layer", advice, tree not in left)


def _records(store: LayerStore) -> Iterator[Problem]:
    if capabilities_of(store.driver).reproduces_exact_diffs:
        return
    for chain_id in store.map():
        path = store.records.tar_split_path(chain_id)
        if not os.path.exists(path):
            advice = "remove the layer and register it again"
            yield Problem("record", chain_id, f"{path}: is missing, so the layer cannot be exported", advice)


def _damage(store: LayerStore, repair: bool, skip: set[str], progress: Progress | None) -> Iterator[Problem]:
    layers = {chain_id: layer for chain_id, layer in store.map().items() if chain_id not in skip}
    for number, (chain_id, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(chain_id, number, len(layers))
        try:
            layer.verify()
        except (UnionfsError, OSError) as error:
            advice = "remove what stands on it and the layer itself, then register it again"
            repaired = False
            if repair and store.reference_count(chain_id) == 0:
                with suppress(UnionfsError, OSError):
                    repaired = bool(store.release(store.get(chain_id), keep_parents=True))
            yield Problem("damage", chain_id, str(error), advice, repaired)
