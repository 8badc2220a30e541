"""A hundred layers with ten thousand files: everything right, and differences from the top layer alone."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.drivers.rig import Rig
from unionfs.host.files import RootedDir

LAYERS = 100
FILES = 100


def fill(root: str, layer: int) -> None:
    """A hundred new files; one of the layer below is changed, one is removed, one directory is in every layer."""
    directory = Path(root, f"layer{layer}")
    directory.mkdir()
    for number in range(FILES):
        (directory / f"file{number}").write_bytes(f"{layer} {number}".encode())
    shared = Path(root, "shared")
    shared.mkdir(exist_ok=True)
    (shared / "version").write_bytes(f"{layer}".encode())


def contents(root: str) -> dict[str, bytes]:
    """What is in every file."""
    paths = (os.path.join(at, name) for at, _, files in os.walk(root) for name in files)
    return {os.path.relpath(path, root): Path(path).read_bytes() for path in paths}


def test_hundred_layers(layered_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = layered_rig.driver
    driver.create("layer0")
    with layered_rig.got("layer0") as root:
        fill(root, 0)
    for layer in range(1, LAYERS):
        driver.create(f"layer{layer}", f"layer{layer - 1}")
        # Written where a mount would: that is what the other tests are for, and much slower.
        fill(driver.get_metadata(f"layer{layer}")["UpperDir"], layer)
    top, below = f"layer{LAYERS - 1}", f"layer{LAYERS - 2}"

    driver.create_read_write("run", top)
    with layered_rig.got("run") as root:
        seen = sum(len(files) for _, _, files in os.walk(root))
        assert seen == LAYERS * FILES + 1
        assert sorted(os.listdir(root)) == sorted(["shared", *(f"layer{n}" for n in range(LAYERS))])
        for layer in (0, 1, LAYERS // 2, LAYERS - 1):
            assert Path(root, f"layer{layer}/file7").read_bytes() == f"{layer} 7".encode()
        assert Path(root, "shared/version").read_bytes() == f"{LAYERS - 1}".encode()
        os.unlink(root + "/layer0/file0")
        Path(root, "layer1/file1").write_bytes(b"changed")
        os.rename(root + "/layer2/file2", root + "/moved")
        for number in range(FILES):
            os.unlink(f"{root}/layer3/file{number}")
        os.rmdir(root + "/layer3")
        changed = contents(root)
    assert len(changed) == LAYERS * FILES + 1 - 1 - FILES

    expected = [
        "C /layer0", "D /layer0/file0", "C /layer1", "C /layer1/file1", "C /layer2", "D /layer2/file2", "D /layer3",
        "A /moved",
    ]  # fmt: skip
    opened: list[bytes] = []
    real = RootedDir.open_dir

    def count(self: RootedDir, rel: bytes) -> int:
        opened.append(rel)
        return real(self, rel)

    with monkeypatch.context() as patch:
        patch.setattr(RootedDir, "open_dir", count)
        assert [str(change) for change in driver.changes("run", top)] == expected
    # Nothing is read but the directories that changed, in the layers that have them.
    assert len(opened) < 1500, len(opened)

    listed = [str(change) for change in driver.changes(top, below)]
    assert listed == [
        f"A /{top}", *(f"A /{top}/file{n}" for n in sorted(range(FILES), key=str)), "C /shared", "C /shared/version",
    ]  # fmt: skip
    size = sum(len(f"{LAYERS - 1} {n}") for n in range(FILES)) + len(f"{LAYERS - 1}")
    assert driver.diff_size(top, below) == size

    with driver.diff("run", top) as stream:
        archive = stream.read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == [
            "layer0", "layer0/.wh.file0", "layer1", "layer1/file1", "layer2", "layer2/.wh.file2", ".wh.layer3", "moved",
        ]  # fmt: skip
    driver.create("copy", top)
    driver.apply_diff("copy", top, io.BytesIO(archive))
    assert [str(change) for change in driver.changes("copy", top)] == expected
    with layered_rig.got("copy") as root:
        assert contents(root) == changed
    with driver.diff("copy", top) as stream:
        assert stream.read() == archive

    # The whole image, which needs the mount: a directory and its files are gone, and so is one file.
    assert len(driver.changes("run", "")) == (LAYERS + 1) + (LAYERS * FILES + 1) - (1 + FILES) - 1


@pytest.mark.parametrize("count", [128])
def test_deepest_stack_is_written_through(layered_rig: Rig, count: int) -> None:
    driver = layered_rig.driver
    driver.create("layer0")
    for layer in range(1, count + 1):
        driver.create(f"layer{layer}", f"layer{layer - 1}")
        Path(driver.get_metadata(f"layer{layer - 1}")["UpperDir"], f"f{layer - 1}").write_bytes(b"1")
    with layered_rig.got(f"layer{count}") as root:
        assert len(os.listdir(root)) == count
        Path(root, "f0").write_bytes(b"22")
        os.unlink(root + "/f1")
    assert [str(c) for c in driver.changes(f"layer{count}", f"layer{count - 1}")] == ["C /f0", "D /f1"]
