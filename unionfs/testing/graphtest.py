"""moby's ``graphtest``, test by test, but for the one of quotas."""

from __future__ import annotations

import io
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar

from unionfs.drivers.contract import Driver
from unionfs.testing.rig import DriverRig, DriverTests


@contextmanager
def got(driver: Driver, layer_id: str) -> Iterator[Path]:
    """A mounted layer."""
    root = driver.get(layer_id)
    try:
        yield Path(root)
    finally:
        driver.put(layer_id)


def random_content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def check_base(root: Path, extra: int = 0) -> None:
    subdir, file = os.lstat(root / "a subdir"), os.lstat(root / "a file")
    assert (subdir.st_mode, subdir.st_uid, subdir.st_gid) == (stat.S_IFDIR | 0o1705, 1, 2)
    assert (file.st_mode, file.st_uid, file.st_gid) == (stat.S_IFREG | 0o4222, 0, 0)
    assert len(os.listdir(root)) == 2 + extra


def create_base(driver: Driver, layer_id: str) -> None:
    """A directory and a file with unusual owners and modes, as moby's tests have them."""
    driver.create_read_write(layer_id)
    with got(driver, layer_id) as root:
        subdir = root / "a subdir"
        subdir.mkdir()
        os.chown(subdir, 1, 2)
        subdir.chmod(0o1705)
        (root / "a file").write_bytes(b"")
        (root / "a file").chmod(0o4222)


def add_many_files(driver: Driver, layer_id: str, count: int, seed: int) -> None:
    with got(driver, layer_id) as root:
        for at in range(0, count, 100):
            directory = root / f"dir-{at}"
            directory.mkdir(exist_ok=True)
            for number in range(at, min(at + 100, count)):
                (directory / f"file-{number}").write_bytes(random_content(64, seed + number))


def check_many_files(root: Path, count: int, seed: int) -> None:
    for number in range(count):
        path = root / f"dir-{number // 100 * 100}" / f"file-{number}"
        assert path.read_bytes() == random_content(64, seed + number)


def write_layer(root: Path, layer: str, parent: str, number: int) -> None:
    (root / "top-id").write_text(layer)
    directory = root / f"layer-{number}"
    directory.mkdir(mode=0o755)
    (directory / "layer-id").write_text(layer)
    (directory / "parent-id").write_text(parent)


class GraphTests(DriverTests):
    """moby's tests.

    Attributes:
        deep_layers: how many layers of one another are read through at the most.
    """

    deep_layers: ClassVar[int] = 25

    def test_driver_create_empty(self, rig: DriverRig) -> None:
        driver = rig.driver
        driver.create("empty")
        assert driver.exists("empty")
        with got(driver, "empty") as root:
            info = os.lstat(root)
            assert (info.st_mode, info.st_uid, info.st_gid) == (stat.S_IFDIR | 0o755, 0, 0)
            assert os.listdir(root) == []
        driver.remove("empty")
        assert not driver.exists("empty")

    def test_driver_create_base(self, rig: DriverRig) -> None:
        create_base(rig.driver, "Base1")
        with got(rig.driver, "Base1") as root:
            check_base(root)
        rig.driver.remove("Base1")

    def test_driver_create_snap(self, rig: DriverRig) -> None:
        create_base(rig.driver, "Base2")
        rig.driver.create("Snap2", "Base2")
        with got(rig.driver, "Snap2") as root:
            check_base(root)
        rig.driver.remove("Snap2")
        rig.driver.remove("Base2")
        assert not rig.driver.exists("Snap2")
        assert not rig.driver.exists("Base2")

    @contextmanager
    def filling(self, rig: DriverRig, layer_id: str) -> Iterator[Path]:
        """Where a tree can be written into that nobody got yet, if that is possible without mounting it."""
        with got(rig.driver, layer_id) as root:
            yield root

    def test_driver_deep_layer_read(self, rig: DriverRig) -> None:
        self._check_depth(rig, 10, lambda layer: got(rig.driver, layer))

    def test_driver_deepest_layer_read(self, rig: DriverRig) -> None:
        self._check_depth(rig, self.deep_layers, lambda layer: self.filling(rig, layer))

    def _check_depth(self, rig: DriverRig, count: int, filling: Callable[[str], AbstractContextManager[Path]]) -> None:
        driver = rig.driver
        driver.create_read_write("base")
        with got(driver, "base") as root:
            (root / "testfile.txt").write_bytes(random_content(128, 5))
        last = "base"
        for number in range(1, count + 1):
            layer = f"layer{number}"
            driver.create_read_write(layer, last)
            with filling(layer) as root:
                write_layer(root, layer, last, number)
            last = layer
        with got(driver, last) as root:
            assert (root / "testfile.txt").read_bytes() == random_content(128, 5)
            assert (root / "top-id").read_text() == last
            for number in range(count, 0, -1):
                assert (root / f"layer-{number}" / "layer-id").read_text() == f"layer{number}"
                parent = (root / f"layer-{number}" / "parent-id").read_text()
                assert parent == (f"layer{number - 1}" if number > 1 else "base")

    def test_driver_diff_apply(self, rig: DriverRig) -> None:
        driver, count = rig.driver, 10
        driver.create_read_write("base")
        add_many_files(driver, "base", count, 3)
        with got(driver, "base") as root:
            (root / "file-remove.txt").write_bytes(b"")
            (root / "var/lib").mkdir(parents=True)
        driver.create_read_write("upper", "base")
        add_many_files(driver, "upper", count, 6)
        with got(driver, "upper") as root:
            (root / "file-remove.txt").unlink()
            (root / "var/lib").rmdir()
        size = driver.diff_size("upper", "")
        driver.create_read_write("diff", "base")
        with got(driver, "diff") as root:
            check_many_files(root, count, 3)
            assert (root / "file-remove.txt").exists()
            assert (root / "var/lib").exists()
        with driver.diff("upper", "base") as stream:
            archive = stream.read()
        assert driver.apply_diff("diff", "base", io.BytesIO(archive)) == size
        with got(driver, "diff") as root:
            check_many_files(root, count, 6)
            assert not (root / "file-remove.txt").exists()
            assert not (root / "var/lib").exists()

    def test_driver_changes(self, rig: DriverRig) -> None:
        driver = rig.driver
        driver.create_read_write("base")
        with got(driver, "base") as root:
            for at in range(0, 20, 10):
                (root / f"dir-{at}").mkdir()
                for number in range(at, at + 10):
                    (root / f"dir-{at}" / f"file-{number}").write_bytes(random_content(64, 3 + number))
        driver.create_read_write("upper", "base")
        expected = []
        with got(driver, "upper") as root:
            for at in range(0, 20, 10):
                expected.append(f"C /dir-{at}")
                for number in range(at, at + 10):
                    name = f"dir-{at}/file-{number}"
                    match number % 3:
                        case 0:
                            (root / name).write_bytes(random_content(64, 500 + number))
                            expected.append(f"C /{name}")
                        case 1:
                            (root / (name + "-new")).write_bytes(random_content(64, 900 + number))
                            expected.append(f"A /{name}-new")
                        case 2:
                            (root / name).unlink()
                            expected.append(f"D /{name}")
        assert [str(change) for change in driver.changes("upper", "base")] == sorted(
            expected, key=lambda line: line[2:]
        )
