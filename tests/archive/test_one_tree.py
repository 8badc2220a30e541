"""One image is one tree, whether its layers are applied to copies or become layer directories that are merged."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from tests.support.images import Layer, applicable, archive_of, images, settled_time
from tests.support.snapshot import Snapshot, differences, snapshot
from unionfs.archive.changes import Change, ChangeKind, changes_of_trees, changes_of_upper
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.errors import ArchiveError

EXAMPLES = {"ci": 150, "long": 4000}.get(os.environ.get("HYPOTHESIS_PROFILE", "dev"), 60)


def tree_of(root: str) -> Snapshot:
    found = snapshot(root, check_ino=False, mtime=settled_time)
    del found["."]
    # Names of one file in different layers are different files in an overlay.
    return {path: replace(entry, nlink=0, links=()) for path, entry in found.items()}


@contextmanager
def merged(layers: list[str], base: Path) -> Iterator[str]:
    """The layers, bottom first, as the kernel's overlayfs shows them."""
    target = base / "merged"
    target.mkdir(exist_ok=True)
    (base / "empty").mkdir(exist_ok=True)
    lowers = ":".join([*reversed(layers), str(base / "empty")])
    subprocess.run(["mount", "-t", "overlay", "-o", f"ro,lowerdir={lowers}", "overlay", target], check=True)
    try:
        yield str(target)
    finally:
        subprocess.run(["umount", target], check=True)


def outcome(layer: Layer, root: str, options: UnpackOptions) -> str:
    try:
        unpack(io.BytesIO(archive_of(layer)), root, options)
    except ArchiveError as error:
        return str(error).partition(":")[0]
    return ""


def check(image: list[Layer], base: Path) -> None:
    copy = base / "copy"
    copy.mkdir()
    layers: list[str] = []
    for number, given_layer in enumerate(image):
        before = base / f"before{number}"
        subprocess.run(["cp", "-a", copy, before], check=True)
        layer = applicable(given_layer, str(before), str(base / "scratch"))
        mode = WhiteoutMode.OVERLAY if layers else WhiteoutMode.DELETE
        options = UnpackOptions(whiteouts=mode, lowers=layers[::-1])
        if layer != given_layer:
            for root in ("refused", "refused-layer"):
                (base / root).mkdir()
            subprocess.run(["cp", "-aT", before, base / "refused"], check=True)
            refused = outcome(given_layer, str(base / "refused"), UnpackOptions())
            assert refused
            assert outcome(given_layer, str(base / "refused-layer"), options) == refused, f"layer {number}"
            for root in ("refused", "refused-layer"):
                shutil.rmtree(base / root)
        directory = base / f"layer{number}"
        directory.mkdir()
        unpack(io.BytesIO(archive_of(layer)), str(copy), UnpackOptions())
        unpack(io.BytesIO(archive_of(layer)), str(directory), options)
        layers.append(str(directory))
        with merged(layers, base) as root:
            assert differences(tree_of(str(copy)), tree_of(root), ("copy", "overlay")) == [], f"layer {number}"
        if len(layers) > 1:
            upper = changes_of_upper(str(directory), layers[-2::-1])
            assert added_and_deleted(upper) == added_and_deleted(changes_of_trees(str(copy), str(before)))


def added_and_deleted(changes: Iterable[Change]) -> list[str]:
    """Without what was changed: only the comparison of layers sees a file that was replaced by its like."""
    return [str(change) for change in changes if change.kind is not ChangeKind.MODIFY]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(image=images())
def test_layers_show_what_copies_hold(image: list[Layer]) -> None:
    base = Path(tempfile.mkdtemp(prefix="one-tree-"))
    try:
        check(image, base)
    finally:
        shutil.rmtree(base)
