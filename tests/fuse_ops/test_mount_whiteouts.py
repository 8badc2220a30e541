"""Whiteouts and opaque directories: every dialect read, the kernel's written."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from tests.support.layers import OPAQUE, WHITEOUT
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import assert_same, snapshot, upper_entries, without_root_time

pytest_plugins = ["tests.support.sandbox"]
needs_root()


def listed(path: str) -> list[str]:
    found = sorted(os.listdir(path))
    for name in found:
        os.lstat(os.path.join(path, name))
    return found


def assert_missing(path: str) -> None:
    assert not os.path.lexists(path)
    assert os.path.basename(path) not in os.listdir(os.path.dirname(path))


def test_device_whiteouts_hide_files_and_directories(box: Sandbox) -> None:
    box.lower().whiteout("f").whiteout("d").whiteout("t/x")
    box.lower().file("f").file("d/inside").file("t/x").file("t/y")
    with box.mount():
        assert listed(box.target) == ["t"]
        assert listed(box.at("t")) == ["y"]
        for path in ("f", "d", "d/inside", "t/x"):
            assert not os.path.lexists(box.at(path))
        ours = snapshot(box.target)
    assert_same(ours, box.kernel_snapshot())


def test_an_opaque_directory_hides_what_is_below(box: Sandbox) -> None:
    box.lower().opaque("d").file("d/new").dir("d/sub")
    box.lower().file("d/old").file("d/sub/old").file("d/new", "other")
    with box.mount():
        assert listed(box.at("d")) == ["new", "sub"]
        assert listed(box.at("d/sub")) == []
        assert_missing(box.at("d/old"))
        ours = snapshot(box.target)
    assert_same(ours, box.kernel_snapshot())


def test_an_opaque_middle_layer_hides_only_what_is_below_it(box: Sandbox) -> None:
    box.lower().file("d/top")
    box.lower().opaque("d").file("d/middle")
    box.lower().file("d/bottom")
    with box.mount():
        assert listed(box.at("d")) == ["middle", "top"]
        ours = snapshot(box.target)
    assert_same(ours, box.kernel_snapshot())


def test_xattr_whiteouts_hide_in_a_directory_marked_so(box: Sandbox) -> None:
    top = box.lower()
    top.opaque("d", value=b"x").file("d/f").xattr("d/f", WHITEOUT, b"y").file("d/kept", "k")
    top.dir("d/sub")
    box.lower().file("d/f").file("d/g").file("d/sub/old")
    with box.mount():
        assert listed(box.at("d")) == ["g", "kept", "sub"]
        assert listed(box.at("d/sub")) == ["old"], "x does not hide what is below"
        assert_missing(box.at("d/f"))
        ours = snapshot(box.target)
        with open(box.at("d/f"), "w") as f:
            f.write("again")
        os.unlink(box.at("d/f"))
        assert_missing(box.at("d/f"))
    # The kernel shows the same; compared without the attribute of overlayfs itself, which is hidden.
    box.fresh_upper("upper2")
    assert_same(without_root_time(ours), without_root_time(box.kernel_snapshot()))


def test_aufs_whiteouts_hide(box: Sandbox) -> None:
    box.lower().file(".wh.f").file(".wh.d").file("t/.wh.x")
    box.lower().file("f").file("d/inside").file("t/x").file("t/y")
    with box.mount():
        assert listed(box.target) == ["t"]
        assert listed(box.at("t")) == ["y"]
        for path in ("f", "d", "d/inside", "t/x", ".wh.f", ".wh.d", "t/.wh.x"):
            assert not os.path.lexists(box.at(path)), path


def test_aufs_opaque_marks_hide(box: Sandbox) -> None:
    box.lower().file("d/.wh..wh..opq").file("d/new").dir("d/sub")
    box.lower().file("d/old").file("d/sub/old")
    with box.mount():
        assert listed(box.at("d")) == ["new", "sub"]
        assert listed(box.at("d/sub")) == []
        assert_missing(box.at("d/old"))
        assert not os.path.lexists(box.at("d/.wh..wh..opq"))


def test_same_layer_whiteout_hides_lower_layers_only(box: Sandbox) -> None:
    """[whsame]: ``.wh.x`` and ``x`` in one layer are a replaced object in OCI."""
    box.lower().file(".wh.x").file("x", "new").file(".wh.d").file("d/new")
    box.lower().file("x", "old").file("d/old")
    with box.mount():
        assert listed(box.target) == ["d", "x"]
        with open(box.at("x")) as f:
            assert f.read() == "new"
        assert listed(box.at("d")) == ["new"]
        assert_missing(box.at("d/old"))


def test_aufs_names_cannot_be_made_through_the_mount(box: Sandbox) -> None:
    """They would hide their name at the next mount."""
    box.lower().file("x")
    with box.mount():
        with pytest.raises(OSError):
            os.close(os.open(box.at(".wh.x"), os.O_CREAT | os.O_WRONLY))
        with pytest.raises(OSError):
            os.mkdir(box.at(".wh.d"))
        with pytest.raises(OSError):
            os.rename(box.at("x"), box.at(".wh.y"))
        assert listed(box.target) == ["x"]
    assert not [p for p in upper_entries(box.in_upper()) if ".wh." in p]


def test_removing_writes_the_kernels_whiteouts(box: Sandbox) -> None:
    box.lower().file("f").file("d/a").file("d/b").symlink("l", "f").file("t/keep").file("t/x")
    with box.mount():
        for name in ("f", "l", "t/x"):
            os.unlink(box.at(name))
        shutil.rmtree(box.at("d"))
        assert listed(box.target) == ["t"]
    assert upper_entries(box.in_upper()) == {
        "f": "whiteout",
        "l": "whiteout",
        "d": "whiteout",
        "t": "dir",
        "t/x": "whiteout",
    }
    box.assert_kernel_agrees()


def test_removing_what_only_the_upper_has_leaves_nothing(box: Sandbox) -> None:
    box.lower().file("f")
    with box.mount():
        os.mkdir(box.at("d"))
        with open(box.at("d/x"), "w"):
            pass
        shutil.rmtree(box.at("d"))
    assert upper_entries(box.in_upper()) == {}


def test_a_directory_made_over_a_whiteout_is_opaque(box: Sandbox) -> None:
    box.lower().file("d/old").file("f", "x")
    with box.mount():
        shutil.rmtree(box.at("d"))
        os.mkdir(box.at("d"))
        os.unlink(box.at("f"))
        os.mkdir(box.at("f"))
        assert listed(box.at("d")) == []
    assert os.getxattr(box.in_upper("d"), OPAQUE) == b"y"
    assert not [p for p in upper_entries(box.in_upper()) if ".wh." in p]
    box.assert_kernel_agrees()


def test_live_opaque_directory_hides_old_children_at_once(box: Sandbox) -> None:
    """[live-opaque]: stat by name and listing must say the same in the mount that replaced the directory."""
    box.lower().file("a").file("d/1").file("d/sub/2")
    with box.mount():
        os.stat(box.at("d/1"))
        os.stat(box.at("d/sub/2"))
        os.unlink(box.at("a"))
        shutil.rmtree(box.at("d"))
        os.mkdir(box.at("d"))
        with open(box.at("d/2"), "w"):
            pass
        for path in ("d/1", "d/sub", "d/sub/2"):
            assert not os.path.lexists(box.at(path)), path
        os.mkdir(box.at("d/sub"))
        assert listed(box.at("d/sub")) == []
        assert_missing(box.at("d/sub/2"))
    box.assert_kernel_agrees()


def test_a_name_made_again_is_the_new_object(box: Sandbox) -> None:
    box.lower().file("x", "old").file("d/y", "old")
    with box.mount():
        for turn in range(3):
            os.unlink(box.at("x"))
            assert_missing(box.at("x"))
            os.mkdir(box.at("x"))
            os.rmdir(box.at("x"))
            os.symlink("d", box.at("x"))
            os.unlink(box.at("x"))
            with open(box.at("x"), "w") as f:
                f.write(f"turn {turn}")
            with open(box.at("x")) as f:
                assert f.read() == f"turn {turn}"
    assert upper_entries(box.in_upper()) == {"x": "file"}
    box.assert_kernel_agrees()


def test_rmdir_refuses_a_merged_directory_with_entries(box: Sandbox) -> None:
    box.lower().file("d/a").file("e/f/g")
    with box.mount():
        for path in ("d", "e", "e/f"):
            with pytest.raises(OSError, match="not empty"):
                os.rmdir(box.at(path))
        os.unlink(box.at("d/a"))
        os.rmdir(box.at("d"))
        assert listed(box.target) == ["e"]
    box.assert_kernel_agrees()


def test_a_clients_own_whiteout_device_is_an_object(box: Sandbox) -> None:
    """An overlay whose upper directory is on our mount makes them; they hide nothing of ours."""
    box.lower().file("x", "x").file("d/y")
    with box.mount():
        os.unlink(box.at("x"))
        for name in ("x", "new", "d/z"):
            os.mknod(box.at(name), stat.S_IFCHR | 0o600, os.makedev(0, 0))
        assert listed(box.target) == ["d", "new", "x"]
        tree = snapshot(box.target)
        assert tree["d/z"].kind == "char"
        assert tree["d/z"].rdev == 0
    assert_same(box.union_snapshot(), tree)
    with box.mount():
        for name in ("x", "new", "d/z"):
            os.unlink(box.at(name))
        assert listed(box.target) == ["d"]
        os.unlink(box.at("d/y"))
        os.rmdir(box.at("d"))


def test_missing_names_are_found_when_they_are_made(box: Sandbox) -> None:
    """The kernel remembers missing names for long; a name made by any call must show at once."""
    box.lower().file("x", "x").file("d/y")

    def made(name: str) -> None:
        path = box.at(name)
        if name == "file":
            with open(path, "w"):
                pass
        elif name == "dir":
            os.mkdir(path)
        elif name == "link":
            os.link(box.at("x"), path)
        elif name == "symlink":
            os.symlink("x", path)
        elif name == "fifo":
            os.mkfifo(path)
        else:
            os.rename(box.at("d"), path)

    with box.mount():
        for name in ("file", "dir", "link", "symlink", "fifo", "renamed"):
            for _ in range(2):
                assert not os.path.lexists(box.at(name))
            made(name)
            assert os.path.lexists(box.at(name)), name
            assert name in os.listdir(box.target)
        assert os.path.exists(box.at("renamed/y"))
        assert not os.path.lexists(box.at("d"))
        assert not os.path.lexists(box.at("d/y"))


def test_layers_on_the_whole_stack_of_dialects(box: Sandbox) -> None:
    """Layers by different tools under one mount: each dialect hides in its turn."""
    box.lower().whiteout("by_char").file(".wh.by_mark").opaque("o1").file("o2/.wh..wh..opq")
    top = box.lower()
    top.file("x", "x").opaque("xw", value=b"x").file("xw/f").xattr("xw/f", WHITEOUT, b"")
    box.lower().file("by_char").file("by_mark").file("o1/a").file("o2/a").file("xw/f").file("xw/g")
    with box.mount():
        assert listed(box.target) == ["o1", "o2", "x", "xw"]
        assert listed(box.at("o1")) == listed(box.at("o2")) == []
        assert listed(box.at("xw")) == ["g"]
