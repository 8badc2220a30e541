"""One image, all drivers, one tree: generated layers, applied to a layer's own directory and through its mount."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from tests.drivers.rig import Rig, make_rig
from tests.support.images import Layer, applicable, archive_of, images, settled_time
from tests.support.snapshot import Snapshot, differences, snapshot
from unionfs.archive.unpacking import UnpackOptions, unpack

EXAMPLES = {"ci": 20, "long": 500}.get(os.environ.get("HYPOTHESIS_PROFILE", "dev"), 8)
_numbers = itertools.count()


def tree_of(rig: Rig, layer_id: str) -> Snapshot:
    with rig.got(layer_id) as root:
        found = snapshot(root, check_ino=False, mtime=settled_time)
    del found["."]
    # Names of one file in different layers are different files in an overlay.
    return {path: replace(entry, nlink=0, links=()) for path, entry in found.items()}


def apply_all(rig: Rig, image: list[Layer], *, mounted: bool) -> Snapshot:
    """The tree of the image's top layer. ``mounted``: applied through mounts, by NaiveDiff."""
    ids = [f"layer{next(_numbers)}" for _ in image]
    for parent, layer_id, layer in zip(["", *ids], ids, image, strict=False):
        rig.driver.create(layer_id, parent)
        with ExitStack() as stack:
            if mounted:
                stack.enter_context(rig.got(layer_id))
            rig.driver.apply_diff(layer_id, parent, io.BytesIO(archive_of(layer)))
    found = tree_of(rig, ids[-1])
    for layer_id in reversed(ids):
        rig.driver.remove(layer_id)
    return found


def applicable_image(image: list[Layer]) -> list[Layer]:
    """The image without the entries that no driver takes."""
    found = []
    with tempfile.TemporaryDirectory() as base:
        os.mkdir(base + "/tree")
        for layer in image:
            found.append(applicable(layer, base + "/tree", base + "/scratch"))
            unpack(io.BytesIO(archive_of(found[-1])), base + "/tree", UnpackOptions())
    return found


def test_all_drivers_show_one_tree(tmp_path: Path) -> None:
    with ExitStack() as stack:
        rigs = [stack.enter_context(make_rig(kind, str(tmp_path))) for kind in ("vfs", "overlay2", "unionfs")]
        ways = [(rig, mounted) for rig in rigs for mounted in ((False, True) if rig.layered else (False,))]

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(image=images(layers=3))
        def check(image: list[Layer]) -> None:
            image = applicable_image(image)
            expected = apply_all(rigs[0], image, mounted=False)
            for rig, mounted in ways[1:]:
                how = f"{rig.kind}, {'through its mount' if mounted else 'its own directory'}"
                assert differences(expected, apply_all(rig, image, mounted=mounted), ("vfs", how)) == []

        check()
