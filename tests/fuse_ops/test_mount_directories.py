"""Renaming directories of every kind, with the kernel's redirects."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from tests.support.layers import OPAQUE
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import Snapshot, assert_same, snapshot, upper_entries, without_root_time
from tests.support.syscalls import renameat2

pytest_plugins = ["tests.support.sandbox"]
needs_root()

REDIRECT = "trusted.overlay.redirect"


def three_layers(box: Sandbox) -> None:
    box.lower().file("d/top", "t").whiteout("d/gone")
    box.lower().file("d/middle", "m").file("d/sub/x", "x2")
    box.lower().file("d/bottom", "b").file("d/gone").file("d/sub/x", "x3").file("d/sub/deep/y", "y").dir("other")


def test_rename_of_a_merged_directory(box: Sandbox) -> None:
    """fuse-overlayfs answers EXDEV: npm, apt and rustup trip over it."""
    three_layers(box)
    with box.mount():
        before = snapshot(box.at("d"))
        os.rename(box.at("d"), box.at("moved"))
        assert not os.path.lexists(box.at("d"))
        assert_same(snapshot(box.at("moved")), before)
    # The directory alone is in the upper, not its content.
    assert upper_entries(box.in_upper()) == {"d": "whiteout", "moved": "dir"}
    assert os.getxattr(box.in_upper("moved"), REDIRECT) in (b"d", b"/d")
    box.assert_kernel_agrees()


def test_rename_into_another_directory_and_back(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        before = snapshot(box.at("d"))
        os.rename(box.at("d"), box.at("other/d"))
        os.rename(box.at("other/d/sub"), box.at("sub"))
        with open(box.at("sub/new"), "w"):
            pass
    assert os.getxattr(box.in_upper("other/d"), REDIRECT) == b"/d"
    box.assert_kernel_agrees()
    with box.mount():
        os.unlink(box.at("sub/new"))
        os.rename(box.at("sub"), box.at("other/d/sub"))
        os.rename(box.at("other/d"), box.at("d"))
        after = snapshot(box.at("d"))
        # Only the directories in which something was renamed have a new time.
        assert_same(_timeless(after, ".", "sub"), _timeless(before, ".", "sub"))
    box.assert_kernel_agrees()


def _timeless(tree: Snapshot, *paths: str) -> Snapshot:
    return {p: replace(e, mtime_ns=0) if p in paths else e for p, e in tree.items()}


def test_rename_below_a_renamed_directory(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        os.rename(box.at("d"), box.at("e"))
        os.rename(box.at("e/sub/deep"), box.at("e/deep"))
        os.rename(box.at("e/deep"), box.at("e/sub/again"))
        os.rename(box.at("e"), box.at("f"))
        assert os.listdir(box.at("f/sub/again")) == ["y"]
    box.assert_kernel_agrees()
    with box.mount():
        with open(box.at("f/sub/again/y"), "a") as f:
            f.write("more")
        with open(box.at("f/sub/again/y")) as f:
            assert f.read() == "ymore"
    box.assert_kernel_agrees()


def test_a_new_directory_at_the_old_name_is_empty(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        os.rename(box.at("d"), box.at("e"))
        os.mkdir(box.at("d"))
        assert os.listdir(box.at("d")) == []
        assert not os.path.lexists(box.at("d/bottom"))
        os.mkdir(box.at("d/sub"))
        assert os.listdir(box.at("d/sub")) == []
    assert os.getxattr(box.in_upper("d"), OPAQUE) == b"y"
    box.assert_kernel_agrees()


def test_rename_over_an_empty_merged_directory(box: Sandbox) -> None:
    three_layers(box)
    box.lower().file("target/x").dir("empty")
    with box.mount():
        with pytest.raises(OSError, match="not empty"):
            os.rename(box.at("d"), box.at("target"))
        os.unlink(box.at("target/x"))
        os.rename(box.at("d"), box.at("target"))
        assert sorted(os.listdir(box.at("target"))) == ["bottom", "middle", "sub", "top"]
        os.rename(box.at("target/sub"), box.at("empty"))
    box.assert_kernel_agrees()


def test_exchange_of_directories_and_files(box: Sandbox) -> None:
    three_layers(box)
    box.lower().file("e/e1").file("f", "f")
    with box.mount():
        renameat2(box.at("d"), box.at("e"), 2)
        assert os.listdir(box.at("d")) == ["e1"]
        renameat2(box.at("e/sub"), box.at("f"), 2)
        with open(box.at("e/sub")) as f:
            assert f.read() == "f"
        assert sorted(os.listdir(box.at("f"))) == ["deep", "x"]
    box.assert_kernel_agrees()


def test_rename_of_an_upper_directory_with_lower_files_moved_in(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        os.mkdir(box.at("new"))
        os.rename(box.at("d/bottom"), box.at("new/bottom"))
        os.rename(box.at("d/sub"), box.at("new/sub"))
        os.rename(box.at("new"), box.at("newer"))
        with open(box.at("newer/sub/x")) as f:
            assert f.read() == "x2"
    box.assert_kernel_agrees()


def test_a_renamed_directory_can_be_removed(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        os.rename(box.at("d"), box.at("e"))
        shutil.rmtree(box.at("e"))
        assert os.listdir(box.target) == ["other"]
    assert upper_entries(box.in_upper()) == {"d": "whiteout"}
    box.assert_kernel_agrees()


def test_open_directory_is_followed_when_renamed(box: Sandbox) -> None:
    three_layers(box)
    with box.mount():
        fd = os.open(box.at("d"), os.O_RDONLY)
        try:
            os.rename(box.at("d"), box.at("e"))
            assert sorted(os.listdir(fd)) == ["bottom", "middle", "sub", "top"]
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            assert os.path.exists(box.at("e/new"))
            os.mkdir(box.at("d"))
            assert "new" in os.listdir(fd)
        finally:
            os.close(fd)
        old = os.getcwd()
        os.chdir(box.at("e"))
        try:
            os.rename(box.at("e"), box.at("other/f"))
            assert os.path.exists("new")
            assert os.path.samefile("..", box.at("other"))
        finally:
            os.chdir(old)
    box.assert_kernel_agrees()


def test_without_redirects_a_merged_directory_is_exdev(box: Sandbox) -> None:
    three_layers(box)
    with box.mount("redirect_dir=off"):
        for name in ("d", "d/sub/deep"):
            with pytest.raises(OSError) as caught:
                os.rename(box.at(name), box.at("moved"))
            assert caught.value.errno == 18
        os.mkdir(box.at("pure"))
        os.rename(box.at("pure"), box.at("pure2"))
    box.assert_kernel_agrees()


def test_long_redirects(box: Sandbox) -> None:
    """The kernel takes redirects up to 256 bytes; a longer one would not be read back."""
    deep = "/".join("x" * 60 for _ in range(6))
    box.lower().file(deep + "/d/f", "f").file("n" * 255 + "/f", "f")
    with box.mount():
        for source in (deep + "/d", "n" * 255):
            try:
                os.rename(box.at(source), box.at("moved"))
            except OSError as error:
                assert error.errno == 18  # EXDEV, as the kernel
                assert os.path.exists(box.at(source + "/f"))
            else:
                assert os.path.exists(box.at("moved/f"))
                os.rename(box.at("moved"), box.at("moved" + str(len(source))))
    box.assert_kernel_agrees()


@pytest.mark.parametrize("as_lower", [False, True])
def test_redirects_and_opaque_directories_of_the_kernel_are_read(box: Sandbox, as_lower: bool) -> None:
    three_layers(box)
    with box.kernel("redirect_dir=on"):
        os.rename(box.at("d"), box.at("other/d"))
        os.rename(box.at("other/d/sub/deep"), box.at("deep"))
        os.mkdir(box.at("d"))
        with open(box.at("d/new"), "w"):
            pass
        theirs = snapshot(box.target, check_ino=False)
    if as_lower:
        assert box.upper is not None
        box.lowers.insert(0, box.upper)
        box.fresh_upper("upper2")
    assert_same(without_root_time(box.union_snapshot()), without_root_time(theirs))
    if as_lower:
        with box.mount():
            os.rename(box.at("other/d"), box.at("again"))
            with open(box.at("again/sub/x"), "a") as f:
                f.write("more")
        box.assert_kernel_agrees()


def test_our_upper_as_a_lower_layer(box: Sandbox) -> None:
    """What an engine does at commit: the upper of one mount is the top lower of the next."""
    three_layers(box)
    for turn in range(3):
        with box.mount():
            os.rename(box.at("d"), box.at("t"))
            os.rename(box.at("t/sub"), box.at(f"sub{turn}"))
            os.mkdir(box.at("d"))
            os.rename(box.at(f"sub{turn}"), box.at("d/sub"))
            os.rename(box.at("t"), box.at(f"t{turn}"))
            tree = snapshot(box.target)
        assert_same(tree, box.kernel_snapshot())
        assert box.upper is not None
        box.lowers.insert(0, box.upper)
        box.fresh_upper(f"upper{turn}")
        assert_same(without_root_time(box.union_snapshot()), without_root_time(tree))
