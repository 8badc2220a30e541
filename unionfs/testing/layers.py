"""Making, mounting and removing trees, beyond moby's own tests (rows 12 to 43 of the contract)."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs.drivers.contract import CreateOptions, ListingDriver
from unionfs.errors import DriverError, LayerExistsError, LayerNotFoundError, UnionfsError
from unionfs.testing.rig import DriverRig, DriverTests
from unionfs.testing.trees import write

_NEVER_IDS = ("", ".", "..", "a/b", "/", "a\0b", "x" * 300)


class LayerTests(DriverTests):
    """Every driver's trees."""

    def test_bad_ids_are_refused_by_every_call(self, rig: DriverRig) -> None:
        driver = rig.driver
        calls: list[Callable[[str], object]] = [
            driver.create,
            driver.create_read_write,
            driver.remove,
            driver.get,
            driver.put,
            driver.get_metadata,
            driver.changes,
            driver.diff,
            driver.diff_size,
            lambda bad: driver.apply_diff(bad, "", io.BytesIO(bytes(1024))),
        ]
        for bad in (*_NEVER_IDS, *self.reserved_ids):
            for call in calls:
                with pytest.raises(DriverError):
                    call(bad)
            assert not driver.exists(bad)

    def test_nothing_of_a_refused_id_is_made(self, rig: DriverRig) -> None:
        rig.driver.status()
        before = rig.names()
        for bad in (*_NEVER_IDS, *self.reserved_ids):
            with pytest.raises(DriverError):
                rig.driver.create(bad)
        assert rig.names() == before

    def test_create_of_an_existing_id_is_an_error_and_changes_nothing(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("other")
        rig.driver.create("child", "base")
        rig.driver.create("another", "other")
        before = rig.names()  # which children may have changed
        for parent in ("", "other"):
            with pytest.raises(LayerExistsError) as raised:
                rig.driver.create("base", parent)
            assert isinstance(raised.value, FileExistsError)
            with pytest.raises(LayerExistsError):
                rig.driver.create_read_write("base", parent)
        assert rig.names() == before
        with rig.got("base") as root:
            assert Path(root, "etc/passwd").read_bytes() == b"root"

    def test_create_with_a_missing_parent_leaves_nothing(self, rig: DriverRig) -> None:
        rig.driver.create("base")
        before = rig.names()
        with pytest.raises(LayerNotFoundError, match="nowhere"):
            rig.driver.create("child", "nowhere")
        assert not rig.driver.exists("child")
        assert rig.names() == before

    def test_create_on_itself_is_an_error(self, rig: DriverRig) -> None:
        with pytest.raises(LayerNotFoundError):
            rig.driver.create("x", "x")
        assert not rig.driver.exists("x")

    def test_size_of_a_read_only_layer_is_an_error(self, rig: DriverRig) -> None:
        with pytest.raises(UnionfsError):
            rig.driver.create("x", "", CreateOptions(storage_options={"size": "1G"}))
        assert not rig.driver.exists("x")

    def test_unknown_storage_option_is_an_error(self, rig: DriverRig) -> None:
        with pytest.raises(UnionfsError, match="colour"):
            rig.driver.create_read_write("x", "", CreateOptions(storage_options={"colour": "red"}))
        assert not rig.driver.exists("x")

    def test_empty_options_are_none(self, rig: DriverRig) -> None:
        rig.driver.create("x", "", CreateOptions())
        rig.driver.create_read_write("y", "x", CreateOptions())
        assert rig.driver.exists("y")

    def test_mount_label_is_accepted_without_selinux(self, rig: DriverRig) -> None:
        label = "system_u:object_r:container_file_t:s0:c1,c2"
        rig.driver.create_read_write("base", "", CreateOptions(mount_label=label))
        rig.driver.create_read_write("x", "base", CreateOptions(mount_label=label))
        root = rig.driver.get("x", label)
        write(root, "f", b"")
        rig.driver.put("x")

    def test_child_has_the_root_attributes_of_its_parent(self, rig: DriverRig) -> None:
        rig.driver.create("base")
        with rig.got("base") as root:
            os.chmod(root, 0o1777)
            os.chown(root, 5, 6)
        rig.driver.create("child", "base")
        with rig.got("child") as root:
            info = os.stat(root)
            assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o1777, 5, 6)

    def test_get_of_an_unknown_id_is_enoent(self, rig: DriverRig) -> None:
        with pytest.raises(LayerNotFoundError) as raised:
            rig.driver.get("nowhere")
        assert isinstance(raised.value, FileNotFoundError)
        assert raised.value.errno == errno.ENOENT
        assert rig.mounts() == []

    def test_put_of_an_unknown_id_is_nothing(self, rig: DriverRig) -> None:
        rig.driver.put("nowhere")

    def test_get_after_the_last_put_mounts_again(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        for number in range(3):
            with rig.got("x") as root:
                assert len([name for name in os.listdir(root) if name.startswith("f")]) == number
                write(root, f"f{number}", b"")

    def test_what_was_written_is_there_after_the_last_put(self, rig: DriverRig) -> None:
        rig.make_base()
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

    def test_devices_and_setuid_programs_work(self, rig: DriverRig) -> None:
        """A container's root is mounted with neither nodev nor nosuid."""
        rig.make_base()
        with rig.got("base") as root:
            os.mknod(root + "/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            shutil.copy("/usr/bin/id", root + "/id")
            os.chown(root + "/id", 1234, 0)
            os.chmod(root + "/id", 0o4755)
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            Path(root, "null").write_bytes(b"swallowed")
            assert subprocess.run([root + "/id", "-u"], capture_output=True, check=True).stdout == b"1234\n"

    def test_remove_of_an_unknown_id_is_nothing(self, rig: DriverRig) -> None:
        rig.driver.remove("nowhere")

    def test_remove_takes_mounts_inside_along(self, rig: DriverRig, tmp_path: Path) -> None:
        rig.make_base()
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

    def test_removed_layer_leaves_nothing(self, rig: DriverRig) -> None:
        rig.driver.status()
        before = rig.names()
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            write(root, "deep/" * 50 + "file", b"1")
            os.mkfifo(root + "/fifo")
            os.mknod(root + "/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        rig.driver.remove("x")
        rig.driver.remove("base")
        assert rig.names() == before

    def test_metadata_of_an_unknown_id(self, rig: DriverRig) -> None:
        with pytest.raises(LayerNotFoundError):
            rig.driver.get_metadata("nowhere")

    def test_layer_ids(self, rig: DriverRig) -> None:
        """For a driver that can tell them."""
        if not isinstance(rig.driver, ListingDriver):
            return
        assert rig.driver.layer_ids() == []
        rig.make_base()
        rig.driver.create("a", "base")
        rig.driver.create_read_write("b-init", "a")
        assert rig.driver.layer_ids() == ["a", "b-init", "base"]

    def test_cleanup_unmounts_everything_and_may_be_repeated(self, rig: DriverRig) -> None:
        rig.make_base()
        for name in "abc":
            rig.driver.create_read_write(name, "base")
            rig.driver.get(name)
        rig.driver.cleanup()
        assert rig.mounts() == []
        rig.driver.cleanup()
        with rig.got("a") as root:
            assert Path(root, "etc/passwd").read_bytes() == b"root"
