"""What drivers promise that mount a tree over its parents' trees and know what was changed in it."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import pytest

from unionfs.drivers.contract import SyncingDriver
from unionfs.drivers.files import file_getter
from unionfs.errors import LayerBusyError, LayerNotFoundError
from unionfs.testing.rig import DriverRig, DriverTests
from unionfs.testing.trees import tar_of, write

_OLD_NS = 1_000_000_000_123_456_789


class LayeredTests(DriverTests):
    """Mounts that are counted, parents that are kept, changes that are exact."""

    def test_get_is_counted(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        first = rig.driver.get("x")
        assert rig.mounts() == [first]
        assert rig.driver.get("x") == first
        rig.driver.put("x")
        assert rig.mounts() == [first]
        rig.driver.put("x")
        assert rig.mounts() == []
        assert not os.path.exists(first)

    def test_more_puts_than_gets_do_not_count(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        for _ in range(3):
            rig.driver.put("x")
        path = rig.driver.get("x")
        rig.driver.put("x")
        rig.driver.put("x")
        path = rig.driver.get("x")
        assert rig.mounts() == [path]
        rig.driver.put("x")
        assert rig.mounts() == []

    def test_parent_is_read_only_once_it_has_a_child(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("middle", "base")
        with rig.got("middle") as root:
            write(root, "before", b"")
        rig.driver.create("top", "middle")
        with rig.got("middle") as root:
            assert os.path.exists(root + "/before")
            with pytest.raises(OSError) as raised:
                write(root, "after", b"")
            assert raised.value.errno == errno.EROFS

    def test_restart_with_live_mounts_counts_one(self, rig: DriverRig) -> None:
        rig.make_base()
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

    def test_lone_put_after_a_restart_unmounts(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        rig.driver.get("x")
        rig.restart().put("x")
        assert rig.mounts() == []

    def test_put_of_a_tree_in_use_takes_it_out_of_sight(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        with open(path + "/etc/passwd", "rb") as file:
            rig.driver.put("x")
            assert rig.mounts() == []
            assert not os.path.exists(path)
            assert file.read() == b"root"
        with rig.got("x") as root:
            assert root == path

    def test_remove_unmounts(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        rig.driver.get("x")
        rig.driver.remove("x")
        assert rig.mounts() == []
        assert not rig.driver.exists("x")
        # The count went with it: the id can be used again.
        rig.driver.create_read_write("x", "base")
        assert rig.driver.get("x") == path
        assert rig.mounts() == [path]
        rig.driver.put("x")
        assert rig.mounts() == []

    def test_parent_of_a_layer_cannot_be_removed(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        rig.driver.create("y", "x")
        with pytest.raises(LayerBusyError, match="x"):
            rig.driver.remove("base")
        with rig.got("y") as root:
            assert Path(root, "etc/passwd").read_bytes() == b"root"
        for layer in ("y", "x", "base"):
            rig.driver.remove(layer)
        assert [rig.driver.exists(layer) for layer in ("y", "x", "base")] == [False] * 3

    def test_edit_that_keeps_size_and_mtime_is_seen(self, rig: DriverRig) -> None:
        rig.make_base()
        with rig.got("base") as root:
            os.utime(root + "/etc/passwd", ns=(_OLD_NS, _OLD_NS))
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            write(root, "etc/passwd", b"toor")
            os.utime(root + "/etc/passwd", ns=(_OLD_NS, _OLD_NS))
        assert rig.lines("x", "base") == ["C /etc", "C /etc/passwd"]

    def test_diff_of_an_open_file_has_what_was_written(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        content = os.urandom(5 << 20)
        with rig.got("x") as root, open(root + "/log", "wb", buffering=0) as file:
            file.write(content)
            with rig.driver.diff("x", "base") as stream:
                archive = stream.read()
            assert content in archive

    def test_diff_of_a_mounted_layer_has_files_that_only_got_an_owner(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            os.chown(root + "/etc/passwd", 1, 2)
            while_mounted = rig.lines("x", "base")
            with rig.driver.diff("x", "base") as stream:
                archive = stream.read()
        assert while_mounted == rig.lines("x", "base") == ["C /etc", "C /etc/passwd"]
        with rig.driver.diff("x", "base") as stream:
            assert stream.read() == archive
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.extractfile("etc/passwd")
            assert member is not None
            assert member.read() == b"root"
            assert tar.getmember("etc/passwd").uid == 1

    def test_file_getter_of_an_applied_layer_mounts_nothing(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        rig.driver.apply_diff("x", "base", tar_of(("f", b"1")))
        files = file_getter(rig.driver, "x")
        with files.get(b"f") as file:
            assert file.read() == b"1"
        assert rig.mounts() == []
        files.close()

    def test_apply_to_a_parent_is_refused(self, rig: DriverRig) -> None:
        rig.make_base()
        rig.driver.create("x", "base")
        with pytest.raises(LayerBusyError, match="x"):
            rig.driver.apply_diff("base", "", tar_of(("f", b"1")))

    def test_sync(self, rig: DriverRig) -> None:
        """For a driver that can sync."""
        if not isinstance(rig.driver, SyncingDriver):
            return
        with pytest.raises(LayerNotFoundError):
            rig.driver.sync("nowhere")
        rig.make_base()
        rig.driver.sync("base")
