"""Trees of a driver that nothing in the layer store knows of."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from unionfs.drivers.contract import ListingDriver
from unionfs.errors import LayerBusyError, MetadataError, UnionfsError
from unionfs.host.files import open_tree, walk_tree
from unionfs.layers.identity import ChainID
from unionfs.layers.store import LayerStore

# Where Docker's drivers tell the directory that holds a tree's own files.
_OWN_FILES_KEYS = ("UpperDir", "SourceDir")


def orphaned_trees(store: LayerStore) -> list[str]:
    """Ids of trees that neither layers nor read-write layers stand on, nor anything half done or unreadable names.

    Empty for a driver that cannot list what it has.
    """
    driver = store.driver
    if not isinstance(driver, ListingDriver):
        return []
    # First the trees and then who needs them: what is made in between is not taken for an orphan.
    trees = driver.layer_ids()
    needed = store.driver_ids()
    for leftover in store.leftovers():
        needed.update(leftover.driver_ids)
    for one in store.unreadable:
        with suppress(MetadataError, OSError):
            if one.kind == "layer":
                needed.add(store.records.layer(ChainID(one.name)).cache_id)
            else:
                mount = store.records.mount(one.name)
                needed |= {mount.mount_id, mount.init_id}
    return [tree for tree in trees if tree not in needed]


def remove_trees(store: LayerStore, trees: list[str]) -> dict[str, str]:
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
    """Bytes on disk of what a tree itself holds; 0 when the driver does not say where that is."""
    try:
        facts = store.driver.get_metadata(tree)
    except UnionfsError:
        return 0
    root = next((facts[key] for key in _OWN_FILES_KEYS if facts.get(key)), None)
    if root is None:
        return 0
    total = 0
    seen: set[int] = set()

    def measure(fd: int) -> list[bytes]:
        nonlocal total
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            with suppress(OSError):
                info = os.lstat(name, dir_fd=fd)
                if stat.S_ISDIR(info.st_mode):
                    directories.append(name)
                if info.st_ino not in seen:
                    seen.add(info.st_ino)
                    total += info.st_blocks * 512
        return directories

    with suppress(OSError), open_tree(root) as top:
        walk_tree(top, measure)
    return total
