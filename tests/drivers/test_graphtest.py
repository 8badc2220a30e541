"""moby's ``graphtest``, test by test, for every driver (the table is in docs/drivers.md)."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.drivers.rig import INITS, Rig
from tests.drivers.xfs import mounted_xfs
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CreateOptions, Driver
from unionfs.errors import QuotaNotSupportedError


@contextmanager
def got(driver: Driver, layer_id: str) -> Iterator[Path]:
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


def test_driver_create_empty(rig: Rig) -> None:
    driver = rig.driver
    driver.create("empty")
    assert driver.exists("empty")
    with got(driver, "empty") as root:
        info = os.lstat(root)
        assert (info.st_mode, info.st_uid, info.st_gid) == (stat.S_IFDIR | 0o755, 0, 0)
        assert os.listdir(root) == []
    driver.remove("empty")
    assert not driver.exists("empty")


def test_driver_create_base(rig: Rig) -> None:
    create_base(rig.driver, "Base1")
    with got(rig.driver, "Base1") as root:
        check_base(root)
    rig.driver.remove("Base1")


def test_driver_create_snap(rig: Rig) -> None:
    create_base(rig.driver, "Base2")
    rig.driver.create("Snap2", "Base2")
    with got(rig.driver, "Snap2") as root:
        check_base(root)
    rig.driver.remove("Snap2")
    rig.driver.remove("Base2")
    assert not rig.driver.exists("Snap2")
    assert not rig.driver.exists("Base2")


@pytest.mark.parametrize("count", [10, 127])
def test_driver_deep_layer_read(rig: Rig, count: int) -> None:
    driver = rig.driver
    if not rig.layered:
        count = min(count, 25)  # each layer is a copy of all below it
    driver.create_read_write("base")
    with got(driver, "base") as root:
        (root / "testfile.txt").write_bytes(random_content(128, 5))
    last = "base"
    for number in range(1, count + 1):
        layer = f"layer{number}"
        driver.create_read_write(layer, last)
        # Into its own directory: mounting each layer is what the shorter variant is for.
        if count > 100 and rig.layered:
            write_layer(Path(driver.get_metadata(layer)["UpperDir"]), layer, last, number)
        else:
            with got(driver, layer) as root:
                write_layer(root, layer, last, number)
        last = layer
    with got(driver, last) as root:
        assert (root / "testfile.txt").read_bytes() == random_content(128, 5)
        assert (root / "top-id").read_text() == last
        for number in range(count, 0, -1):
            assert (root / f"layer-{number}" / "layer-id").read_text() == f"layer{number}"
            parent = (root / f"layer-{number}" / "parent-id").read_text()
            assert parent == (f"layer{number - 1}" if number > 1 else "base")


def write_layer(root: Path, layer: str, parent: str, number: int) -> None:
    (root / "top-id").write_text(layer)
    directory = root / f"layer-{number}"
    directory.mkdir(mode=0o755)
    (directory / "layer-id").write_text(layer)
    (directory / "parent-id").write_text(parent)


@pytest.mark.parametrize("count", [10])
def test_driver_diff_apply(rig: Rig, count: int) -> None:
    driver = rig.driver
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


def test_driver_changes(rig: Rig) -> None:
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
    assert [str(change) for change in driver.changes("upper", "base")] == sorted(expected, key=lambda line: line[2:])


@pytest.mark.parametrize("kind", ["overlay2", "vfs", "unionfs"])
def test_driver_set_quota(kind: str, tmp_path: Path) -> None:
    with mounted_xfs(tmp_path / "image", tmp_path / "xfs") as has_quotas:
        driver = INITS[kind](os.fspath(tmp_path / "xfs" / kind), [], IdMapping())
        try:
            create_base(driver, "zfsTest")
            options = CreateOptions(storage_options={"size": "50M"})
            try:
                driver.create_read_write("zfsSnap", "zfsTest", options)
            except QuotaNotSupportedError:
                assert not has_quotas
                assert kind != "unionfs"  # which can do it by itself
                assert not driver.exists("zfsSnap")
                return
            with got(driver, "zfsSnap") as root:
                assert write_up_to(root / "file1", 25 << 20) is None
                assert write_up_to(root / "file2", 50 << 20) in (errno.EDQUOT, errno.ENOSPC)
        finally:
            driver.cleanup()


def write_up_to(path: Path, size: int) -> int | None:
    """Write ``size`` bytes to a new file; the errno where that fails."""
    piece = bytes(1 << 20)
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(0, size, len(piece)):
                file.write(piece)
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None
