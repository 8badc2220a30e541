"""What our drivers promise beyond the contract: how their homes look, what they say, what a crash leaves."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drivers.rig import INITS, Rig
from tests.drivers.xfs import mounted_xfs
from tests.support.mounts import is_mounted
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CreateOptions, ListingDriver, capabilities_of
from unionfs.errors import DriverError, LayerBusyError, OptionError, QuotaNotSupportedError, UnionfsError
from unionfs.testing.graphtest import create_base, got


def test_refused_ids_say_what_would_do(rig: Rig) -> None:
    for bad in ("", "a/b", "l"):
        with pytest.raises(DriverError, match=r"the id .*; use a name such as"):
            rig.driver.create(bad)


def test_what_an_image_layer_cannot_have_is_named(rig: Rig) -> None:
    with pytest.raises(UnionfsError, match="storage-opt"):
        rig.driver.create("x", "", CreateOptions(storage_options={"size": "1G"}))


def test_only_the_plugin_protocol_cannot_list(rig: Rig) -> None:
    assert isinstance(rig.driver, ListingDriver) == (rig.kind != "plugin")


def test_no_exact_streams_are_promised(rig: Rig) -> None:
    assert not capabilities_of(rig.driver).reproduces_exact_diffs


def test_base_layer_needs_no_mount(layered_rig: Rig) -> None:
    rig = layered_rig
    rig.make_base()
    assert rig.driver.get("base") == rig.driver.get_metadata("base")["UpperDir"]
    assert rig.mounts() == []
    rig.driver.put("base")


def test_failed_get_is_rolled_back(layered_rig: Rig) -> None:
    rig = layered_rig
    rig.make_base()
    rig.driver.create_read_write("x", "base")
    diff = rig.driver.get_metadata("base")["UpperDir"]
    os.rename(diff, diff + ".away")
    for _ in range(2):
        with pytest.raises(UnionfsError, match=r"\w+"):
            rig.driver.get("x")
        assert rig.mounts() == []
        assert not os.path.exists(rig.driver.get_metadata("x")["MergedDir"])
    os.rename(diff + ".away", diff)
    path = rig.driver.get("x")
    assert is_mounted(path)
    rig.driver.put("x")
    assert rig.mounts() == []


def test_remove_of_a_tree_in_use_says_by_whom_and_can_be_repeated(
    layered_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unionfs.drivers.home._TRIES", 3)
    rig = layered_rig
    rig.make_base()
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=path) as process:
        try:
            with pytest.raises(LayerBusyError, match=f"process {process.pid} .*works in {path}"):
                rig.driver.remove("x")
            assert rig.driver.exists("x")
            assert Path(path, "etc/passwd").read_bytes() == b"root"
        finally:
            process.kill()
    rig.driver.remove("x")
    assert not rig.driver.exists("x")
    assert rig.mounts() == []


def test_interrupted_removal_is_finished_at_the_next_start(rig: Rig) -> None:
    rig.make_base()
    rig.driver.create("x", "base")
    holder = os.path.dirname(layer_directory(rig, "x"))
    os.rename(f"{holder}/x", f"{holder}/x-removing")
    os.mkdir(f"{holder}/y-1234abcd-creating")
    rig.restart()
    assert not [name for name in os.listdir(holder) if name.endswith(("-removing", "-creating"))]
    assert not rig.driver.exists("x")
    assert rig.driver.exists("base")
    rig.driver.create("x", "base")


def test_removal_can_be_repeated_after_a_crash_in_its_middle(rig: Rig) -> None:
    rig.make_base()
    rig.driver.create("x", "base")
    holder = os.path.dirname(layer_directory(rig, "x"))
    os.rename(f"{holder}/x", f"{holder}/x-removing")
    rig.driver.remove("x")
    assert not os.path.exists(f"{holder}/x-removing")


def test_status_names_the_backing_file_system(rig: Rig) -> None:
    assert ("Backing Filesystem", "extfs") in rig.driver.status() or (
        "Backing Filesystem",
        "tmpfs",
    ) in rig.driver.status()


def test_metadata_of_layered_drivers(layered_rig: Rig) -> None:
    driver = layered_rig.driver
    driver.create("base")
    driver.create("middle", "base")
    driver.create("top", "middle")
    home = os.path.realpath(layered_rig.home)
    assert driver.get_metadata("base") == {
        "UpperDir": f"{home}/base/diff",
        "MergedDir": f"{home}/base/merged",
        "WorkDir": f"{home}/base/work",
    }
    assert driver.get_metadata("top")["LowerDir"] == f"{home}/middle/diff:{home}/base/diff"


def layer_directory(rig: Rig, layer_id: str) -> str:
    facts = rig.driver.get_metadata(layer_id)
    return os.path.dirname(facts["UpperDir"]) if "UpperDir" in facts else facts["SourceDir"]


def test_copied_up_and_unchanged_is_not_listed(layered_rig: Rig) -> None:
    rig = layered_rig
    rig.make_base()
    rig.driver.create_read_write("x", "base")
    with rig.got("x") as root:
        with open(root + "/etc/passwd", "r+b"):
            pass
        info = os.stat(root + "/etc/passwd")
        os.chmod(root + "/etc/passwd", 0o600)
        os.chmod(root + "/etc/passwd", stat.S_IMODE(info.st_mode))
    assert os.path.exists(rig.driver.get_metadata("x")["UpperDir"] + "/etc/passwd")
    assert rig.lines("x", "base") == []


def test_default_size_needs_quota_support(rig: Rig) -> None:
    key = "size" if rig.kind in ("vfs", "plugin") else f"{rig.kind}.size"
    with pytest.raises((OptionError, DriverError), match="invalid"):
        rig.open([f"{key}=big"])


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
