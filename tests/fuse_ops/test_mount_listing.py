"""Directory listings of a mounted union."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter

import pytest

from tests.support.mounts import KERNEL_OPTIONS
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import D_TYPES, kind_of, snapshot
from tests.support.syscalls import getdents, list_directory

pytest_plugins = ["tests.support.sandbox"]
needs_root()


def names(path: str) -> list[str]:
    return sorted(e.name for e in list_directory(path) if e.name not in (".", ".."))


def test_each_name_is_listed_once(box: Sandbox) -> None:
    box.lower().file("d/both", "top").file("d/one", "1").whiteout("d/gone")
    box.lower().file("d/both", "bottom").file("d/two", "2").file("d/gone")
    with box.mount():
        assert names(box.at("d")) == ["both", "one", "two"]
        with open(box.at("d/new"), "w"):
            pass
        os.unlink(box.at("d/one"))
        assert names(box.at("d")) == ["both", "new", "two"]


def test_dot_and_dot_dot_are_listed_with_their_inodes(box: Sandbox) -> None:
    box.lower().file("d/e/f")
    with box.mount():
        for path, above in (("d", "."), ("d/e", "d"), (".", ".")):
            found = {e.name: e for e in list_directory(box.at(path))}
            assert found["."].ino == os.stat(box.at(path)).st_ino
            if path != ".":  # what is above the root of a mount is the host's affair
                assert found[".."].ino == os.stat(box.at(above)).st_ino
            assert found["."].d_type == found[".."].d_type == D_TYPES["dir"]
            counts = Counter(e.name for e in list_directory(box.at(path)))
            assert counts["."] == counts[".."] == 1


def test_d_type_and_d_ino_agree_with_stat_for_every_type(box: Sandbox) -> None:
    low = box.lower()
    low.file("file").dir("dir").symlink("symlink", "x").socket("socket")
    low.node("fifo", stat.S_IFIFO).node("char", stat.S_IFCHR, 1, 3).node("block", stat.S_IFBLK, 7, 1)
    with box.mount():

        def check() -> None:
            listed = {e.name: e for e in list_directory(box.target) if e.name not in (".", "..")}
            assert len(listed) == 7
            for name, e in listed.items():
                st = os.lstat(box.at(name))
                assert kind_of(st.st_mode) == name
                assert (e.d_type, e.ino) == (D_TYPES[name], st.st_ino)

        check()
        for name in os.listdir(box.target):
            os.chown(box.at(name), 1, 1, follow_symlinks=False)
        check()
    with box.mount():
        check()


def test_entries_that_stay_are_listed_once_while_others_come_and_go(box: Sandbox) -> None:
    low = box.lower()
    for n in range(600):
        low.file(f"d/stay{n:03}")
    for n in range(600):
        low.file(f"d/go{n:03}")
    stay = {f"stay{n:03}" for n in range(600)}
    with box.mount():
        fd = os.open(box.at("d"), os.O_RDONLY)
        try:
            seen: list[str] = []
            turn = 0
            while more := getdents(fd, 4096):
                seen += [e.name for e in more]
                for n in range(turn * 30, turn * 30 + 30):
                    if n < 600:
                        os.unlink(box.at(f"d/go{n:03}"))
                with open(box.at(f"d/new{turn:03}"), "w"):
                    pass
                turn += 1
            assert turn > 5, "the directory was read in too few pieces for this test"
            counts = Counter(seen)
            assert {n for n in counts if n.startswith("stay")} == stay
            assert max(counts.values()) == 1
            os.lseek(fd, 0, os.SEEK_SET)
            again: list[str] = []
            while more := getdents(fd):
                again += [e.name for e in more]
            assert sorted(again) == sorted([".", "..", *os.listdir(box.at("d"))])
            assert "new000" in again
            assert "go000" not in again
        finally:
            os.close(fd)


def test_seeking_back_to_an_offset_continues_there(box: Sandbox) -> None:
    low = box.lower()
    for n in range(300):
        low.file(f"d/{n}")
    with box.mount():
        fd = os.open(box.at("d"), os.O_RDONLY)
        try:
            every = []
            while more := getdents(fd, 1024):
                every += more
            offsets = [e.offset for e in every]
            assert len(set(offsets)) == len(offsets)
            for at in (0, 1, 2, 57, 200, len(every) - 2):
                with open(box.at(f"d/x{at}"), "w"):
                    pass
                os.lseek(fd, every[at].offset, os.SEEK_SET)
                assert getdents(fd, 1024)[0].name == every[at + 1].name
        finally:
            os.close(fd)


def test_removing_everything_while_reading_empties_the_directory(box: Sandbox) -> None:
    low = box.lower()
    for n in range(1500):
        low.file(f"d/lower{n}")
    with box.mount():
        for n in range(1500):
            with open(box.at(f"d/upper{n}"), "w"):
                pass
        fd = os.open(box.at("d"), os.O_RDONLY)
        try:
            while more := getdents(fd, 2048):
                for e in more:
                    if e.name not in (".", ".."):
                        os.unlink(box.at(f"d/{e.name}"))
        finally:
            os.close(fd)
        assert os.listdir(box.at("d")) == []
        os.rmdir(box.at("d"))
    box.assert_kernel_agrees()


def test_a_hundred_thousand_entries(box: Sandbox) -> None:
    count = 100_000
    low = box.lower(huge=True)
    low.dir("d")
    for n in range(count):
        os.close(os.open(low.at(f"d/{n:06}"), os.O_CREAT | os.O_WRONLY))
    with box.mount():
        os.unlink(box.at("d/000007"))
        with open(box.at("d/new"), "w"):
            pass
        began = time.monotonic()
        found = [e.name for e in list_directory(box.at("d"))]
        seconds = time.monotonic() - began
        assert len(found) == len(set(found)) == count + 2  # one gone, one new, . and ..
        # Listing must not be quadratic; a linear one takes about three seconds here.
        assert seconds < 60
        assert os.path.exists(box.at("d/099999"))
        assert not os.path.exists(box.at("d/000007"))


def test_a_listing_is_new_after_changes(box: Sandbox) -> None:
    """The kernel may cache listings; what we change through the mount must show at once."""
    box.lower().file("d/a").file("d/b")
    with box.mount():
        for turn in range(20):
            assert names(box.at("d")) == ["a", "b"]
            os.rename(box.at("d/a"), box.at(f"d/a{turn}"))
            assert names(box.at("d")) == sorted([f"a{turn}", "b"])
            os.rename(box.at(f"d/a{turn}"), box.at("d/a"))


def test_names_of_any_bytes(box: Sandbox) -> None:
    low = box.lower()
    odd = [os.fsdecode(n) for n in (b"\xff\xfe", b"new\nline", b" ", b"-rf", b"caf\xc3\xa9", b"'\"\\", b"x" * 255)]
    for name in odd:
        low.file("d/" + name, name.encode("utf-8", "surrogateescape"))
    with box.mount():
        assert names(box.at("d")) == sorted(odd)
        for name in odd:
            os.rename(box.at("d/" + name), box.at(name))
            os.chmod(box.at(name), 0o600)
        assert set(odd) < set(snapshot(box.target))
    box.assert_kernel_agrees()


@pytest.mark.parametrize(
    ("options", "redirect", "number"), [((), b"x//y", errno.EINVAL), (("redirect_dir=nofollow",), b"/x", errno.EPERM)]
)
def test_a_name_that_cannot_be_looked_up_does_not_hide_the_others(
    box: Sandbox, options: tuple[str, ...], redirect: bytes, number: int
) -> None:
    top = box.lower()
    for name in ("a", "bad", "c"):
        top.dir(f"d/{name}")
    box.lower().file("d/bad/file").file("d/e").dir("x")
    os.setxattr(os.path.join(box.lowers[0], "d/bad"), "trusted.overlay.redirect", redirect)

    def seen(top: str) -> tuple[list[str], int | None]:
        with pytest.raises(OSError) as caught:
            os.stat(os.path.join(top, "d/bad"))
        return sorted(os.listdir(os.path.join(top, "d"))), caught.value.errno

    with box.kernel(*(options or KERNEL_OPTIONS)) as mnt:
        expected = seen(mnt)
    assert expected == (["a", "bad", "c", "e"], number)
    with box.mount(*options):
        assert seen(box.target) == expected
