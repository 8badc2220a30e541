"""Hard links and inode numbers through a mount."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.support.layers import OLD_NS
from tests.support.mounts import mounted_tmpfs
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import snapshot, upper_entries

pytest_plugins = ["tests.support.sandbox"]
needs_root()


def ino(path: str) -> int:
    return os.lstat(path).st_ino


def read(path: str) -> str:
    with open(path) as f:
        return f.read()


def write(path: str, text: str, mode: str = "w") -> None:
    with open(path, mode) as f:
        f.write(text)


def linked(box: Sandbox) -> list[str]:
    box.lower().file("a", "data").link("b", to="a").link("d/c", to="a").file("other")
    return ["a", "b", "d/c"]


def test_names_of_a_lower_inode_are_one_file(box: Sandbox) -> None:
    names = linked(box)
    with box.mount():
        assert len({ino(box.at(n)) for n in names}) == 1
        assert {os.stat(box.at(n)).st_nlink for n in names} == {3}


@pytest.mark.parametrize("seen_before", [True, False])
def test_names_stay_one_file_after_copy_up_of_one(box: Sandbox, seen_before: bool) -> None:
    """[hardlinks]: also for names that were not looked up before the copy-up."""
    names = linked(box)
    with box.mount():
        if seen_before:
            for n in names:
                os.stat(box.at(n))
        write(box.at("b"), "more", "a")
        assert {read(box.at(n)) for n in names} == {"datamore"}
        assert len({ino(box.at(n)) for n in names}) == 1
        assert {os.stat(box.at(n)).st_nlink for n in names} == {3}
        os.chmod(box.at("d/c"), 0o600)
        assert {os.stat(box.at(n)).st_mode & 0o777 for n in names} == {0o600}
        write(box.at("a"), "again")
        assert {read(box.at(n)) for n in names} == {"again"}


def test_removing_one_name_leaves_the_others_linked(box: Sandbox) -> None:
    """[hardlinks]: in fuse-overlayfs the names that are left do not share an inode any more."""
    names = linked(box)
    with box.mount():
        before = ino(box.at("a"))
        os.unlink(box.at("a"))
        rest = names[1:]
        assert {ino(box.at(n)) for n in rest} == {before}
        assert {os.stat(box.at(n)).st_nlink for n in rest} == {2}
        write(box.at("b"), "new")
        assert read(box.at("d/c")) == "new"
        os.unlink(box.at("b"))
        assert os.stat(box.at("d/c")).st_nlink == 1
        assert read(box.at("d/c")) == "new"


def test_a_changed_file_keeps_the_names_that_were_used(box: Sandbox) -> None:
    """[hardlinks]: the change is there under every name that was looked at, as links of one upper file.

    The kernel says which file is changed, not by which name: to put the change under one of them only, as overlayfs
    does, would be a guess, and a wrong guess loses the change at the next mount.
    """
    linked(box)
    with box.mount():
        for n in ("a", "d/c"):
            os.stat(box.at(n))
        os.utime(box.at("a"), ns=(1, 1))
    assert upper_entries(box.in_upper()) == {"a": "file", "d": "dir", "d/c": "file"}
    assert ino(box.in_upper("a")) == ino(box.in_upper("d/c"))
    with box.mount():
        assert os.stat(box.at("a")).st_mtime_ns == os.stat(box.at("d/c")).st_mtime_ns == 1
        assert ino(box.at("a")) == ino(box.at("d/c"))


def test_link_counts_follow_link_and_unlink(box: Sandbox) -> None:
    box.lower().file("low", "x").file("d/y")
    with box.mount():
        write(box.at("up"), "u")
        for name in ("low", "up"):
            assert os.stat(box.at(name)).st_nlink == 1
            for n in range(5):
                os.link(box.at(name), box.at(f"d/{name}{n}"))
                assert os.stat(box.at(name)).st_nlink == n + 2
                assert ino(box.at(f"d/{name}{n}")) == ino(box.at(name))
            os.unlink(box.at(name))
            assert os.stat(box.at(f"d/{name}0")).st_nlink == 5
            os.rename(box.at(f"d/{name}0"), box.at(f"d/{name}1"))  # two names of one file: nothing happens
            assert os.stat(box.at(f"d/{name}1")).st_nlink == 5
            os.rename(box.at(f"d/{name}0"), box.at("d/y"))
            assert os.stat(box.at(f"d/{name}1")).st_nlink == 5
        tree = snapshot(box.target)
    box.assert_kernel_agrees()
    assert box.union_snapshot() == tree


def test_links_to_special_files_and_symlinks(box: Sandbox) -> None:
    box.lower().symlink("l", "x").socket("s")
    with box.mount():
        for name in ("l", "s"):
            os.link(box.at(name), box.at(name + "2"), follow_symlinks=False)
            assert ino(box.at(name)) == ino(box.at(name + "2"))
            assert os.lstat(box.at(name)).st_nlink == 2
        with pytest.raises(PermissionError):
            os.link(box.target, box.at("dir"))
    box.assert_kernel_agrees()


def test_link_counts_do_not_change_by_reading(box: Sandbox) -> None:
    """tar says "file changed as we read it" when they do."""
    names = linked(box)
    with box.mount():
        counts = []
        for _ in range(2):
            for n in names:
                counts.append(os.stat(box.at(n)).st_nlink)
                read(box.at(n))
                counts.append(os.stat(box.at(n)).st_nlink)
        assert set(counts) == {3}


def test_inode_numbers_stay_over_copy_up_and_remount(box: Sandbox) -> None:
    low = box.lower().file("f", "x").file("d/g", "y").symlink("l", "f").dir("d/e").file("m/x", "1")
    box.lower().file("m/y", "2")
    names = ["f", "d", "d/g", "d/e", "l", "m", "m/x", "m/y"]
    with box.mount():
        before = {n: ino(box.at(n)) for n in names}
        assert len(set(before.values())) == len(names)
        for n in names:
            os.chown(box.at(n), 1, 1, follow_symlinks=False)
            assert ino(box.at(n)) == before[n], n
        write(box.at("new"), "n")
        os.mkdir(box.at("newdir"))
        before |= {n: ino(box.at(n)) for n in ("new", "newdir")}
        os.rename(box.at("d"), box.at("d2"))
        os.rename(box.at("f"), box.at("f2"))
        assert ino(box.at("d2")) == before["d"]
        assert ino(box.at("d2/g")) == before["d/g"]
        assert ino(box.at("f2")) == before["f"]
    with box.mount():
        moved = {"d": "d2", "f": "f2", "d/g": "d2/g", "d/e": "d2/e"}
        for n, number in before.items():
            assert ino(box.at(moved.get(n, n))) == number, n
    assert ino(low.at("f")) == before["f"], "on one file system the numbers are the real ones"


def test_inode_numbers_are_those_of_the_kernel(box: Sandbox) -> None:
    box.lower().file("f", "x").file("d/g", "y").symlink("l", "f").dir("e").file("m/x")
    box.lower().file("m/y").file("bottom")
    names = ["f", "d/g", "l", "m/x", "m/y", "bottom", "d", "e", "m"]
    with box.mount():
        for n in ("f", "l", "m/y", "e"):
            os.chown(box.at(n), 1, 1, follow_symlinks=False)
        ours = {n: ino(box.at(n)) for n in names}
    with box.kernel():
        theirs = {n: ino(box.at(n)) for n in names}
    assert ours == theirs


@pytest.mark.parametrize("xino", ["auto", "on"])
def test_layers_on_several_file_systems_do_not_collide(box: Sandbox, xino: str) -> None:
    low = box.lower()
    for n in range(100):
        low.file(f"l1/{n}")
    with (
        mounted_tmpfs(os.path.join(box.root, "t1")) as t1,
        mounted_tmpfs(os.path.join(box.root, "t2")) as t2,
    ):
        for index, root in enumerate((t1, t2)):
            layer = box.lower(root)
            for n in range(100):
                layer.file(f"t{index}/{n}", str(n))
            layer.file(f"t{index}/a").link(f"t{index}/b", to=f"t{index}/a")
        with box.mount(f"xino={xino}"):
            tree = snapshot(box.target)  # checks d_ino too
            numbers: dict[int, str] = {}
            for path, e in tree.items():
                number = ino(box.at(path))
                if not e.links:
                    assert number not in numbers, (path, numbers.get(number))
                numbers[number] = path
            assert (max(numbers) < 1 << 32) == (xino == "auto"), "programs of 32 bits could not use them"
            assert tree["t0/a"].links == ("t0/b",)
            before = {p: ino(box.at(p)) for p in tree}
            for path in ("t0/5", "t1/5", "l1/5", "t1"):
                os.chmod(box.at(path), 0o700)
            assert {p: ino(box.at(p)) for p in tree} == before
        with box.mount(f"xino={xino}"):
            for path in ("t0/5", "t1/5", "l1/5"):
                assert ino(box.at(path)) == before[path], path


def test_one_device_number_for_the_whole_mount(box: Sandbox) -> None:
    with mounted_tmpfs(os.path.join(box.root, "t1")) as t1:
        box.lower(t1).file("f").dir("d")
        box.lower().file("g").dir("e")
        with box.mount():
            assert len({os.lstat(box.at(n)).st_dev for n in (".", "f", "d", "g", "e")}) == 1


def test_times_of_linked_names_are_one(box: Sandbox) -> None:
    linked(box)
    with box.mount():
        os.utime(box.at("a"), ns=(OLD_NS + 9, OLD_NS + 9))
        assert os.stat(box.at("d/c")).st_mtime_ns == OLD_NS + 9
        os.chown(box.at("d/c"), 5, 6)
        assert os.stat(box.at("b")).st_uid == 5


@pytest.mark.parametrize("move", [os.link, os.rename])
def test_a_file_copied_up_earlier_keeps_its_number(box: Sandbox, move: Callable[[str, str], None]) -> None:
    """The directory that it comes to is marked, so that whoever looks there first asks for its origin."""
    box.lower().file("a/f", "x").dir("b")
    with box.mount():
        number = os.stat(box.at("a/f")).st_ino
        os.chmod(box.at("a/f"), 0o600)
    with box.mount():
        move(box.at("a/f"), box.at("b/f"))
    with box.mount():
        assert os.stat(box.at("b/f")).st_ino == number
    with box.kernel():
        assert os.stat(box.at("b/f")).st_ino == number
