"""The storage option ``size`` where the disk has no project quotas: the mount itself keeps to it."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drivers.rig import Rig, make_rig
from unionfs.drivers.contract import CreateOptions, Driver
from unionfs.errors import ArchiveError, DriverError, LayerExistsError, OptionError, QuotaNotSupportedError
from unionfs.testing.rig import got

MIB = 1 << 20


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Rig]:
    with make_rig("unionfs", os.fspath(tmp_path)) as made:
        yield made


def fill(path: str, size: int) -> int:
    """Write a new file; returns how much of ``size`` there was room for."""
    done = 0
    with open(path, "wb", buffering=0) as file:
        try:
            while done < size:
                done += file.write(bytes(min(256 << 10, size - done)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return done


def df(path: str) -> tuple[int, int]:
    """Size and available bytes as df(1) shows them."""
    words = ["df", "--output=size,avail", "-B1", path]
    size, available = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return int(size), int(available)


def make_base(driver: Driver) -> None:
    driver.create("base")
    with got(driver, "base") as root:
        Path(root, "f").write_bytes(os.urandom(2 * MIB))


def test_a_container_layer_is_limited(union: Rig) -> None:
    driver = union.driver
    make_base(driver)
    driver.create_read_write("run", "base", CreateOptions(storage_options={"size": "8M"}))
    with got(driver, "run") as root:
        size, available = df(root)
        assert size == 8 * MIB
        assert 7 * MIB < available <= 8 * MIB  # the base does not count
        assert fill(root + "/big", 20 * MIB) == available
        assert df(root) == (size, 0)
        with pytest.raises(OSError, match="No space left") as caught, open(root + "/f", "ab"):
            pass
        assert caught.value.errno == errno.ENOSPC
        assert os.path.getsize(root + "/f") == 2 * MIB
    assert driver.diff_size("run", "base") == available
    # The limit is the layer's: other processes, and mounts to come, keep to it.
    driver = union.restart()
    with got(driver, "run") as root:
        assert df(root) == (size, 0)
        os.unlink(root + "/big")
        assert fill(root + "/again", 20 * MIB) == available
    assert [str(change) for change in driver.changes("run", "base")] == ["A /again"]


@pytest.mark.disk
def test_the_limit_can_be_raised_for_the_next_mount(union: Rig) -> None:
    driver = union.driver
    make_base(driver)
    driver.create_read_write("run", "base", CreateOptions(storage_options={"size": "4M"}))
    with got(driver, "run") as root:
        assert fill(root + "/big", 20 * MIB) < 4 * MIB
    Path(union.home, "run/size").write_text(f"{16 * MIB}\n")
    with got(driver, "run") as root:
        assert df(root)[0] == 16 * MIB
        assert fill(root + "/more", 20 * MIB) > 11 * MIB


@pytest.mark.parametrize("text", ["10G", "-1", "1 2", "\xff", "٣"])
def test_a_limit_that_is_no_number_is_named(union: Rig, text: str) -> None:
    driver = union.driver
    make_base(driver)
    driver.create_read_write("run", "base", CreateOptions(storage_options={"size": "4M"}))
    Path(union.home, "run/size").write_text(text, encoding="utf-8")
    with pytest.raises(DriverError, match=r"run/size .*number of bytes") as raised:
        driver.get("run")
    assert "\n" not in str(raised.value)
    Path(union.home, "run/size").write_text("\n")  # as none
    with got(driver, "run") as root:
        assert df(root)[0] > 1 << 30


def test_default_size_is_for_container_layers_without_their_own(union: Rig) -> None:
    driver = union.open(["unionfs.size=4M"])
    make_base(driver)
    driver.create_read_write("run", "base")
    driver.create_read_write("large", "base", CreateOptions(storage_options={"size": "9M"}))
    for layer, size in (("run", 4 * MIB), ("large", 9 * MIB)):
        with got(driver, layer) as root:
            assert df(root)[0] == size
    driver.create("image", "base")
    with got(driver, "image") as root:
        assert df(root)[0] > 1 << 30


def test_an_archive_that_does_not_fit_is_applied_to_an_unmounted_layer_only(union: Rig) -> None:
    """Layers of images have no limit; what is applied to a mounted container layer goes through its mount."""
    driver = union.driver
    make_base(driver)
    driver.create_read_write("run", "base", CreateOptions(storage_options={"size": "4M"}))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("large")
        member.size = 6 * MIB
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    with got(driver, "run") as root:
        with pytest.raises(ArchiveError, match="large: cannot be unpacked: No space left"):
            driver.apply_diff("run", "base", io.BytesIO(archive.getvalue()))
        os.unlink(root + "/large")
    driver.apply_diff("run", "base", io.BytesIO(archive.getvalue()))
    with got(driver, "run") as root:
        assert df(root) == (4 * MIB, 0)
        assert os.path.getsize(root + "/large") == 6 * MIB
        with pytest.raises(OSError, match="No space left"):
            os.mkdir(root + "/d")


def test_no_limit_leaves_nothing_behind(union: Rig) -> None:
    driver = union.driver
    make_base(driver)
    for layer, options in (("none", {"size": "0"}), ("other", {})):
        driver.create_read_write(layer, "base", CreateOptions(storage_options=options))
        assert not os.path.exists(f"{union.home}/{layer}/size")
    with pytest.raises(OptionError, match="invalid size"):
        driver.create_read_write("wrong", "base", CreateOptions(storage_options={"size": "big"}))
    assert not driver.exists("wrong")
    with pytest.raises(LayerExistsError):
        driver.create_read_write("none", "base", CreateOptions(storage_options={"size": "4M"}))
    assert not os.path.exists(union.home + "/none/size")


def test_kernel_overlayfs_cannot_limit_here(tmp_path: Path) -> None:
    with make_rig("overlay2", os.fspath(tmp_path)) as rig:
        make_base(rig.driver)
        with pytest.raises(QuotaNotSupportedError, match="no size can be enforced"):
            rig.driver.create_read_write("run", "base", CreateOptions(storage_options={"size": "4M"}))
        assert not rig.driver.exists("run")
