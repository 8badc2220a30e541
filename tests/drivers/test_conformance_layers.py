"""Making, mounting and removing layers, beyond moby's own tests: one suite for all drivers (contract rows 12-43)."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drivers.rig import Rig
from tests.drivers.trees import make_base, tree_names, write
from tests.support.mounts import is_mounted, servers_of, wait_until
from unionfs.drivers.contract import CreateOptions, ListingDriver, capabilities_of
from unionfs.errors import (
    DriverError,
    LayerBusyError,
    LayerExistsError,
    LayerNotFoundError,
    UnionfsError,
)

OLD_NS = 1_000_000_000_123_456_789


# Ids

BAD_IDS = ["", ".", "..", "a/b", "/", "a\0b", "l", "x" * 300, "x-removing", "x-creating"]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_ids_are_refused_by_every_call(rig: Rig, bad: str) -> None:
    driver = rig.driver
    for call in (
        lambda: driver.create(bad),
        lambda: driver.create_read_write(bad),
        lambda: driver.remove(bad),
        lambda: driver.get(bad),
        lambda: driver.put(bad),
        lambda: driver.get_metadata(bad),
        lambda: driver.changes(bad, ""),
        lambda: driver.diff(bad, ""),
        lambda: driver.diff_size(bad, ""),
        lambda: driver.apply_diff(bad, "", io.BytesIO(bytes(1024))),
    ):
        with pytest.raises(DriverError, match=r"(?s)the id .*; use a name such as"):
            call()
    assert not driver.exists(bad)


def test_nothing_of_a_refused_id_is_made(rig: Rig) -> None:
    before = tree_names(rig.root)
    rig.driver.status()
    before = tree_names(rig.root)
    for bad in BAD_IDS:
        with pytest.raises(DriverError):
            rig.driver.create(bad)
    assert tree_names(rig.root) == before


# Create


def test_create_of_an_existing_id_is_an_error_and_changes_nothing(rig: Rig) -> None:
    make_base(rig)
    rig.driver.create("other")
    before = tree_names(rig.root)
    for parent in ("", "other"):
        with pytest.raises(LayerExistsError) as raised:
            rig.driver.create("base", parent)
        assert isinstance(raised.value, FileExistsError)
        with pytest.raises(LayerExistsError):
            rig.driver.create_read_write("base", parent)
    assert [name for name in tree_names(rig.root) if not name.endswith("/committed")] == before
    with rig.got("base") as root:
        assert Path(root, "etc/passwd").read_bytes() == b"root"


def test_create_with_a_missing_parent_leaves_nothing(rig: Rig) -> None:
    rig.driver.create("base")
    before = tree_names(rig.root)
    with pytest.raises(LayerNotFoundError, match="nowhere"):
        rig.driver.create("child", "nowhere")
    assert not rig.driver.exists("child")
    assert tree_names(rig.root) == before


def test_create_on_itself_is_an_error(rig: Rig) -> None:
    with pytest.raises(LayerNotFoundError):
        rig.driver.create("x", "x")
    assert not rig.driver.exists("x")


def test_size_of_a_read_only_layer_is_an_error(rig: Rig) -> None:
    with pytest.raises(UnionfsError, match="storage-opt"):
        rig.driver.create("x", "", CreateOptions(storage_options={"size": "1G"}))
    assert not rig.driver.exists("x")


def test_unknown_storage_option_is_an_error(rig: Rig) -> None:
    with pytest.raises(UnionfsError, match="colour"):
        rig.driver.create_read_write("x", "", CreateOptions(storage_options={"colour": "red"}))
    assert not rig.driver.exists("x")


def test_empty_options_are_none(rig: Rig) -> None:
    rig.driver.create("x", "", CreateOptions())
    rig.driver.create_read_write("y", "x", CreateOptions())
    assert rig.driver.exists("y")


def test_mount_label_is_accepted_without_selinux(rig: Rig) -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    rig.driver.create_read_write("base", "", CreateOptions(mount_label=label))
    rig.driver.create_read_write("x", "base", CreateOptions(mount_label=label))
    root = rig.driver.get("x", label)
    write(root, "f", b"")
    rig.driver.put("x")


def test_child_has_the_root_attributes_of_its_parent(rig: Rig) -> None:
    rig.driver.create("base")
    with rig.got("base") as root:
        os.chmod(root, 0o1777)
        os.chown(root, 5, 6)
    rig.driver.create("child", "base")
    with rig.got("child") as root:
        info = os.stat(root)
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o1777, 5, 6)


# Get and put


def test_get_of_an_unknown_id_is_enoent(rig: Rig) -> None:
    with pytest.raises(LayerNotFoundError) as raised:
        rig.driver.get("nowhere")
    assert isinstance(raised.value, FileNotFoundError)
    assert raised.value.errno == errno.ENOENT
    assert rig.mounts() == []


def test_put_of_an_unknown_id_is_nothing(rig: Rig) -> None:
    rig.driver.put("nowhere")


def test_get_is_counted(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    first = rig.driver.get("x")
    assert rig.mounts() == [first]
    assert rig.driver.get("x") == first
    rig.driver.put("x")
    assert rig.mounts() == [first]
    rig.driver.put("x")
    assert rig.mounts() == []
    assert not os.path.exists(first)


def test_more_puts_than_gets_do_not_count(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    for _ in range(3):
        rig.driver.put("x")
    path = rig.driver.get("x")
    rig.driver.put("x")
    rig.driver.put("x")
    path = rig.driver.get("x")
    assert is_mounted(path)
    rig.driver.put("x")
    assert rig.mounts() == []


def test_base_layer_needs_no_mount(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    assert rig.driver.get("base") == rig.driver.get_metadata("base")["UpperDir"]
    assert rig.mounts() == []
    rig.driver.put("base")


def test_get_after_the_last_put_mounts_again(rig: Rig) -> None:
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    for number in range(3):
        with rig.got("x") as root:
            assert len([name for name in os.listdir(root) if name.startswith("f")]) == number
            write(root, f"f{number}", b"")


def test_what_was_written_is_there_after_the_last_put(rig: Rig) -> None:
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    content = os.urandom(3 << 20)
    with rig.got("x") as root:
        write(root, "big", content)
        os.unlink(root + "/etc/passwd")
    with rig.got("x") as root:
        assert Path(root, "big").read_bytes() == content
        assert os.listdir(root + "/etc") == ["group"]
    with rig.got("base") as root:
        assert sorted(os.listdir(root + "/etc")) == ["group", "passwd"]


def test_devices_and_setuid_programs_work(rig: Rig) -> None:
    """A container's root is mounted with neither nodev nor nosuid."""
    make_base(rig)
    with rig.got("base") as root:
        os.mknod(root + "/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        shutil.copy("/usr/bin/id", root + "/id")
        os.chown(root + "/id", 1234, 0)
        os.chmod(root + "/id", 0o4755)
    rig.driver.create_read_write("x", "base")
    with rig.got("x") as root:
        Path(root, "null").write_bytes(b"swallowed")
        assert subprocess.run([root + "/id", "-u"], capture_output=True, check=True).stdout == b"1234\n"


def test_parent_is_read_only_once_it_has_a_child(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create("middle", "base")
    with rig.got("middle") as root:
        write(root, "before", b"")
    rig.driver.create("top", "middle")
    with rig.got("middle") as root:
        assert os.path.exists(root + "/before")
        with pytest.raises(OSError) as raised:
            write(root, "after", b"")
        assert raised.value.errno == errno.EROFS


def test_failed_get_is_rolled_back(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
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


def test_restart_with_live_mounts_counts_one(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    write(path, "written", b"1")
    with open(path + "/written", "rb") as file:
        rig.restart()
        assert rig.driver.get("x") == path  # no second mount
        assert rig.mounts() == [path]
        rig.driver.put("x")
        assert rig.mounts() == [path]
        assert file.read() == b"1"
    rig.driver.put("x")
    assert rig.mounts() == []


def test_lone_put_after_a_restart_unmounts(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    servers = servers_of(path)
    rig.restart().put("x")
    assert rig.mounts() == []
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in servers), 10)


def test_put_of_a_tree_in_use_takes_it_out_of_sight(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    with open(path + "/etc/passwd", "rb") as file:
        rig.driver.put("x")
        assert rig.mounts() == []
        assert not os.path.exists(path)
        assert file.read() == b"root"
    with rig.got("x") as root:
        assert root == path


# Remove


def test_remove_of_an_unknown_id_is_nothing(rig: Rig) -> None:
    rig.driver.remove("nowhere")


def test_remove_unmounts(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    rig.driver.get("x")
    rig.driver.remove("x")
    assert rig.mounts() == []
    assert not rig.driver.exists("x")
    # The count went with it: the id can be used again.
    rig.driver.create_read_write("x", "base")
    assert rig.driver.get("x") == path
    assert is_mounted(path)
    rig.driver.put("x")
    assert rig.mounts() == []


def test_remove_of_a_tree_in_use_says_by_whom_and_can_be_repeated(
    layered_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unionfs.drivers.home._TRIES", 3)
    rig = layered_rig
    make_base(rig)
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


def test_remove_takes_mounts_inside_along(rig: Rig, tmp_path: Path) -> None:
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    path = rig.driver.get("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    os.mkdir(path + "/mnt")
    subprocess.run(["mount", "--bind", outside, path + "/mnt"], check=True)
    rig.driver.remove("x")
    assert rig.mounts() == []
    assert not rig.driver.exists("x")
    assert (outside / "precious").read_bytes() == b"1"


def test_parent_of_a_layer_cannot_be_removed(layered_rig: Rig) -> None:
    rig = layered_rig
    make_base(rig)
    rig.driver.create("x", "base")
    rig.driver.create("y", "x")
    with pytest.raises(LayerBusyError, match="the parent of x, y"):
        rig.driver.remove("base")
    with rig.got("y") as root:
        assert Path(root, "etc/passwd").read_bytes() == b"root"
    for layer in ("y", "x", "base"):
        rig.driver.remove(layer)
    assert [rig.driver.exists(layer) for layer in ("y", "x", "base")] == [False] * 3


def test_removed_layer_leaves_nothing(rig: Rig) -> None:
    rig.driver.status()
    before = tree_names(rig.root)
    make_base(rig)
    rig.driver.create_read_write("x", "base")
    with rig.got("x") as root:
        write(root, "deep/" * 50 + "file", b"1")
        os.mkfifo(root + "/fifo")
        os.mknod(root + "/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    rig.driver.remove("x")
    rig.driver.remove("base")
    assert tree_names(rig.root) == before


def test_interrupted_removal_is_finished_at_the_next_start(rig: Rig) -> None:
    make_base(rig)
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
    make_base(rig)
    rig.driver.create("x", "base")
    holder = os.path.dirname(layer_directory(rig, "x"))
    os.rename(f"{holder}/x", f"{holder}/x-removing")
    rig.driver.remove("x")
    assert not os.path.exists(f"{holder}/x-removing")


def layer_directory(rig: Rig, layer_id: str) -> str:
    facts = rig.driver.get_metadata(layer_id)
    return os.path.dirname(facts["UpperDir"]) if "UpperDir" in facts else facts["SourceDir"]


# Telling


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


def test_metadata_of_an_unknown_id(rig: Rig) -> None:
    with pytest.raises(LayerNotFoundError):
        rig.driver.get_metadata("nowhere")


def test_layer_ids(rig: Rig) -> None:
    if rig.kind == "plugin":
        assert not isinstance(rig.driver, ListingDriver)  # the protocol has no such call
        return
    assert isinstance(rig.driver, ListingDriver)
    assert rig.driver.layer_ids() == []
    make_base(rig)
    rig.driver.create("a", "base")
    rig.driver.create_read_write("b-init", "a")
    assert rig.driver.layer_ids() == ["a", "b-init", "base"]


def test_capabilities(rig: Rig) -> None:
    assert not capabilities_of(rig.driver).reproduces_exact_diffs


def test_cleanup_unmounts_everything_and_may_be_repeated(rig: Rig) -> None:
    make_base(rig)
    for name in "abc":
        rig.driver.create_read_write(name, "base")
        rig.driver.get(name)
    rig.driver.cleanup()
    assert rig.mounts() == []
    rig.driver.cleanup()
    with rig.got("a") as root:
        assert Path(root, "etc/passwd").read_bytes() == b"root"
