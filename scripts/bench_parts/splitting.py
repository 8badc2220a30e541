"""Splits a root file system into layers that together show the same tree."""

from __future__ import annotations

import os
import subprocess
import zlib
from collections.abc import Iterator, Sequence

# Of ten files: where the bottom layer of an image has most, and four above it some of each directory.
_TENTHS = (4, 4, 4, 4, 4, 4, 3, 2, 1, 0)
IMAGE_LAYERS = 5
_FILES_IN_ADDED_LAYER = 20


def image_split(root: str) -> list[list[str]]:
    """The paths of ``root`` in five layers, top first; by a hash of the name, so it is the same every time."""
    layers: list[list[str]] = [[] for _ in range(IMAGE_LAYERS)]
    for group in _linked_groups(root):
        layers[_TENTHS[zlib.crc32(group[0].encode(errors="surrogateescape")) % 10]] += group
    return layers


def deep_split(root: str, depth: int) -> list[list[str]]:
    """The paths of ``root`` in ``depth`` layers, top first: an image that was changed in many small steps.

    Each step is a layer with some files that lie beside each other; what is left is split as in :func:`image_split`.
    """
    groups = _linked_groups(root)
    steps = depth - IMAGE_LAYERS
    stride = len(groups) / steps
    size = max(1, min(_FILES_IN_ADDED_LAYER, int(stride / 2)))
    added: list[list[str]] = []
    taken: set[str] = set()
    for step in range(steps):
        at = int(step * stride)
        layer = [path for group in groups[at : at + size] for path in group if path not in taken]
        taken.update(layer)
        added.append(layer)
    return added + [[path for path in layer if path not in taken] for layer in image_split(root)]


def write_layers(root: str, layers: Sequence[Sequence[str]], into: str) -> list[str]:
    """Copy the paths of each layer, with the directories above them, to ``into``/0, 1, ...; returns their paths."""
    directories = [path for path, is_directory in entries(root) if is_directory]
    made: list[str] = []
    for number, layer in enumerate(layers):
        path = os.path.join(into, str(number))
        os.makedirs(path)
        wanted = {parent for name in layer for parent in _parents(name)}
        if number == len(layers) - 1:
            wanted.update(directories)  # the empty ones too
        _copy(root, path, [*sorted(wanted), *layer])
        made.append(path)
    return made


def entries(root: str) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a directory) of everything below ``root``, without the contents of /dev, /proc and /sys."""
    todo = [""]
    while todo:
        directory = todo.pop()
        for entry in sorted(os.scandir(os.path.join(root, directory)), key=lambda e: e.name):
            path = os.path.join(directory, entry.name)
            is_directory = entry.is_dir(follow_symlinks=False)
            yield path, is_directory
            if is_directory and path not in ("dev", "proc", "sys"):
                todo.append(path)


def _linked_groups(root: str) -> list[list[str]]:
    """All files in the order of their names, those with several names together."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path in sorted(path for path, is_directory in entries(root) if not is_directory):
        info = os.lstat(os.path.join(root, path))
        groups.setdefault((info.st_dev, info.st_ino), []).append(path)
    return list(groups.values())


def _parents(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def _copy(root: str, into: str, paths: Sequence[str]) -> None:
    keep = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    pack = ["tar", f"--directory={root}", "--create", "--null", "--no-recursion", "--files-from=-", *keep]
    unpack = ["tar", f"--directory={into}", "--extract", "--same-owner", "--preserve-permissions", *keep]
    names = b"".join(os.fsencode(path) + b"\0" for path in paths)
    packed = subprocess.run(pack, input=names, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(unpack, input=packed, check=True)
