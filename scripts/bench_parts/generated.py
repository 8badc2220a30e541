"""The generated layers: a tree of small files, a large file, and an archive of many files to unpack."""

from __future__ import annotations

import io
import os
import random
import tarfile

from bench_parts.scale import MIB, Scale

TREE = "bench/tree"
LARGE = "bench/large"
ARCHIVE = "unpack.tar"
_FILES_IN_DIRECTORY = 50
_SIZES = (200, 8000)
# The tree lies in these, the large file in the last of them; files of one directory are in all.
_LAYERS = 3


def make(into: str, scale: Scale) -> None:
    """Write the layers ``into``/0, 1, 2 (top first) and the archive beside them. Always the same bytes."""
    source = random.Random(20261121)
    os.makedirs(into)
    layers = [os.path.join(into, str(number)) for number in range(_LAYERS)]
    for layer in layers:
        os.makedirs(os.path.join(layer, TREE))
    for number in range(scale.tree_files):
        path = os.path.join(layers[number % _LAYERS], TREE, _name(number))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(source.randbytes(source.randint(*_SIZES)))
    with open(os.path.join(layers[-1], LARGE), "wb") as file:
        for _ in range(scale.large_bytes // MIB):
            file.write(source.randbytes(MIB))
    with tarfile.open(os.path.join(into, ARCHIVE), "w") as archive:
        for number in range(scale.tree_files):
            member = tarfile.TarInfo(os.path.join("unpacked", _name(number)))
            member.size = source.randint(*_SIZES)
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(source.randbytes(member.size)))


def layers_in(directory: str) -> tuple[str, ...]:
    """The layers that :func:`make` wrote, top first."""
    return tuple(os.path.join(directory, str(number)) for number in range(_LAYERS))


def _name(number: int) -> str:
    return f"d{number // _FILES_IN_DIRECTORY:03}/f{number:05}"
