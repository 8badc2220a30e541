"""Trees of a driver that nothing in the layer store knows of."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from unionfs.errors import LayerBusyError, UnionfsError
from unionfs.host.files import open_tree, walk_tree
from unionfs.layers.store import LayerStore

# Where Docker's drivers tell the directory that holds a tree's own files.
_OWN_FILES_KEYS = ("UpperDir", "SourceDir")


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
