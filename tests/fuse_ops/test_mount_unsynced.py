"""Copies of small files for new attributes: seen at once, synced later, and never lost in a crash."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.support.crash import kill, lose_unsynced, mark_of
from tests.support.mounts import UnionMount
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import assert_same
from tests.support.syscalls import renameat2
from unionfs.host.syscalls import RENAME_EXCHANGE
from unionfs.overlay.format import UNSYNCED

pytest_plugins = ["tests.support.sandbox"]
needs_root()

METACOPY = "trusted.overlay.metacopy"
ORIGIN = "trusted.overlay.origin"
DATA = b"contents " * 1000
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def noted(box: Sandbox) -> bool:
    return os.path.exists(f"{box.work}/unsynced")


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


CHANGES: dict[str, Callable[[str], None]] = {
    "chown": lambda path: os.chown(path, 1, 2),
    "chmod": lambda path: os.chmod(path, 0o600),
    "utime": lambda path: os.utime(path, ns=(10**9, 10**9)),
    "setxattr": lambda path: os.setxattr(path, "user.k", b"v"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_is_complete_at_once_and_marked_until_it_is_synced(box: Sandbox, change: str) -> None:
    box.lower().file("d/f", DATA)
    with box.mount():
        CHANGES[change](box.at("d/f"))
        assert mark_of(box.in_upper("d/f")) == UNSYNCED
        assert noted(box)
        assert read(box.in_upper("d/f")) == read(box.at("d/f")) == DATA  # engines pack the upper directory themselves
        assert METACOPY not in os.listxattr(box.at("d/f"))
    assert mark_of(box.in_upper("d/f")) is None
    assert not noted(box)
    assert read(box.in_upper("d/f")) == DATA
    assert_same(box.union_snapshot(), box.kernel_snapshot("index=off"))


def test_removing_an_attribute_marks_too(box: Sandbox) -> None:
    box.lower().file("f", DATA).xattr("f", "user.k", b"v")
    with box.mount():
        os.removexattr(box.at("f"), "user.k")
        assert mark_of(box.in_upper("f")) == UNSYNCED


Contents = dict[str, bytes | None]


def append(box: Sandbox) -> Contents:
    with open(box.at("f"), "ab") as f:
        assert mark_of(box.in_upper("f")) is None, "the file is open for writing, and the lower one still counts"
        f.write(b"more")
    return {"f": DATA + b"more"}


def rename(box: Sandbox) -> Contents:
    os.rename(box.at("f"), box.at("g"))
    assert mark_of(box.in_upper("g")) is None
    return {"f": None, "g": DATA}


def link(box: Sandbox) -> Contents:
    os.link(box.at("f"), box.at("g"))
    assert mark_of(box.in_upper("g")) is None
    return {"f": DATA, "g": DATA}


def exchange(box: Sandbox) -> Contents:
    renameat2(box.at("f"), box.at("other"), RENAME_EXCHANGE)
    assert mark_of(box.in_upper("other")) is None
    return {"f": b"other", "other": DATA}


def truncate(box: Sandbox) -> Contents:
    os.truncate(box.at("f"), 5)
    assert mark_of(box.in_upper("f")) is None
    return {"f": DATA[:5]}


def open_truncated(box: Sandbox) -> Contents:
    os.close(os.open(box.at("f"), os.O_WRONLY | os.O_TRUNC))
    assert mark_of(box.in_upper("f")) is None
    return {"f": b""}


def remove(box: Sandbox) -> Contents:
    os.unlink(box.at("f"))
    return {"f": None}


def replace(box: Sandbox) -> Contents:
    os.rename(box.at("other"), box.at("f"))
    return {"f": b"other", "other": None}


def move_directory(box: Sandbox) -> Contents:
    os.chown(box.at("d/f"), 1, 2)
    os.rename(box.at("d"), box.at("e"))
    return {"d/f": None, "e/f": DATA}


def remove_and_make_again(box: Sandbox) -> Contents:
    os.unlink(box.at("f"))
    with open(box.at("f"), "w") as f:
        f.write("new")
    return {"f": b"new"}


AFTERWARDS = [
    append,
    rename,
    link,
    exchange,
    truncate,
    open_truncated,
    remove,
    replace,
    move_directory,
    remove_and_make_again,
]


@pytest.mark.parametrize("what", AFTERWARDS, ids=lambda what: str(what.__name__))
@pytest.mark.parametrize("crash", [False, True], ids=["unmounted", "killed"])
def test_what_is_done_next_is_not_lost(box: Sandbox, what: Callable[[Sandbox], Contents], crash: bool) -> None:
    """What is written to a marked file must not be taken for what was there before, nor looked for elsewhere."""
    box.lower().file("f", DATA).file("other", "other").file("d/f", DATA)
    with box.mount("redirect_dir=on") as here:
        os.chown(box.at("f"), 1, 2)
        assert mark_of(box.in_upper("f")) == UNSYNCED
        expected = what(box)
        if crash:
            kill(here)
            lose_unsynced(box.in_upper())

    def check() -> None:
        for name, contents in expected.items():
            if contents is None:
                assert not os.path.lexists(box.at(name))
            else:
                assert read(box.at(name)) == contents

    with box.mount("redirect_dir=on"):
        check()
    assert not noted(box)
    with box.kernel("index=off", "redirect_dir=on", "metacopy=off"):
        check()


def test_after_a_crash_the_lower_file_counts(box: Sandbox) -> None:
    box.lower().file("d/f", DATA).file("d/e/g", DATA + b"!").file("h", "h")
    with box.mount() as here:
        for name in ("d/f", "d/e/g", "h"):
            os.chown(box.at(name), 1, 2)
        with open(box.at("h"), "w") as f:
            f.write("written")
        kill(here)
    assert lose_unsynced(box.in_upper()) == 2
    assert noted(box)
    with box.mount():
        assert (read(box.at("d/f")), read(box.at("d/e/g")), read(box.at("h"))) == (DATA, DATA + b"!", b"written")
        assert os.stat(box.at("d/f")).st_uid == 1
        assert (mark_of(box.in_upper("d/f")), noted(box)) == (None, False)
        assert read(box.in_upper("d/f")) == DATA


def unmounted(box: Sandbox, here: UnionMount) -> None:
    """Nothing more than the end of the mount."""


def killed(box: Sandbox, here: UnionMount) -> None:
    kill(here)
    assert lose_unsynced(box.in_upper()) == 1
    os.removexattr(box.in_upper("d"), "trusted.overlay.impure")  # it was not synced either


def written(box: Sandbox, here: UnionMount) -> None:
    with open(box.at("d/f"), "r+b") as f:
        f.write(b"C")
    kill(here)


def renamed(box: Sandbox, here: UnionMount) -> None:
    os.rename(box.at("d/f"), box.at("e/f"))
    os.rename(box.at("e/f"), box.at("d/f"))


@pytest.mark.parametrize("end", [unmounted, killed, written, renamed], ids=lambda end: str(end.__name__))
def test_a_copy_keeps_its_number_after_the_mount(box: Sandbox, end: Callable[[Sandbox, UnionMount], None]) -> None:
    """What says which lower file it is from, is recorded when the mark goes, or when the next mount finds it."""
    low = box.lower().file("d/f", DATA).dir("e")
    with box.mount() as here:
        number = os.stat(box.at("d/f")).st_ino
        os.chown(box.at("d/f"), 1, 2)
        assert os.stat(box.at("d/f")).st_ino == number
        assert ORIGIN not in os.listxattr(box.in_upper("d/f"))
        end(box, here)
    with box.mount():
        assert os.stat(box.at("d/f")).st_ino == number
        assert ORIGIN in os.listxattr(box.in_upper("d/f"))
    with box.kernel("index=off", "xino=on"):
        assert os.stat(box.at("d/f")).st_ino == os.stat(low.at("d/f")).st_ino


def test_what_a_crashed_mount_had_recorded_stays(box: Sandbox) -> None:
    """An older version recorded the origin at once."""
    box.lower().file("d/f", DATA)
    with box.mount() as here:
        os.chown(box.at("d/f"), 1, 2)
        os.setxattr(box.in_upper("d/f"), ORIGIN, b"")
        kill(here)
    with box.mount():
        assert os.getxattr(box.in_upper("d/f"), ORIGIN) == b""


def test_a_copy_takes_no_more_of_the_disk_than_its_data(box: Sandbox) -> None:
    """ext4 has room for one of the two attributes in the inode; the other would take a block, and keep it."""
    box.lower().file("f", DATA)
    with box.mount():
        os.chown(box.at("f"), 1, 2)
    plain = os.path.join(box.root, "plain")
    shutil.copyfile(box.in_upper("f"), plain)
    os.sync()
    assert os.stat(box.in_upper("f")).st_blocks == os.stat(plain).st_blocks


def test_capabilities_survive_a_crash(box: Sandbox) -> None:
    box.lower().file("f", DATA)
    with box.mount() as here:
        os.setxattr(box.at("f"), "security.capability", CAPABILITY)
        os.chmod(box.at("f"), 0o6755)
        kill(here)
    assert lose_unsynced(box.in_upper()) == 1
    with box.mount():
        assert read(box.at("f")) == DATA
        assert os.getxattr(box.at("f"), "security.capability") == CAPABILITY
        assert os.stat(box.at("f")).st_mode & 0o7777 == 0o6755


def test_the_kernel_shows_no_zeros_after_a_crash(box: Sandbox) -> None:
    """Without metacopy=on it refuses the file, as it does with its own; with it the lower file's data is shown."""
    box.lower().file("f", DATA)
    with box.mount() as here:
        os.chown(box.at("f"), 1, 2)
        kill(here)
    lose_unsynced(box.in_upper())
    with box.kernel("index=off"), pytest.raises(OSError):
        read(box.at("f"))
    with box.kernel("index=off", "metacopy=on", "redirect_dir=on"):
        assert read(box.at("f")) == DATA
        assert os.stat(box.at("f")).st_uid == 1


def test_what_cannot_be_finished_is_told_and_kept(box: Sandbox) -> None:
    low = box.lower().file("f", DATA).file("g", DATA)
    with box.mount() as here:
        for name in "fg":
            os.chown(box.at(name), 1, 2)
        kill(here)
    lose_unsynced(box.in_upper())
    aside = box.new_dir("aside")
    shutil.copytree(low.at(""), aside, dirs_exist_ok=True)
    os.unlink(os.path.join(aside, "f"))
    with box.mount(lowers=[aside]) as here:
        assert "cannot finish the copy of f after a crash" in here.stderr
        with pytest.raises(OSError):
            read(box.at("f"))
        os.chown(box.at("g"), 3, 4)
    assert noted(box)
    with box.mount():
        assert read(box.at("f")) == DATA
    assert (mark_of(box.in_upper("f")), noted(box)) == (None, False)


def test_open_files_go_on_with_the_copy(box: Sandbox) -> None:
    box.lower().file("f", DATA)
    with box.mount(), open(box.at("f"), "rb", buffering=0) as reader:
        assert reader.read(8) == DATA[:8]
        os.chown(box.at("f"), 1, 2)
        os.fsync(reader.fileno())
        with open(box.at("f"), "r+b") as writer:
            writer.write(b"WRITTEN.")
        assert os.pread(reader.fileno(), 16, 0) == b"WRITTEN." + DATA[8:16]


def test_tar_sees_no_change_while_it_reads(box: Sandbox) -> None:
    low = box.lower()
    for i in range(200):
        low.file(f"d/{i}", DATA)
    with box.mount():
        subprocess.run(["chown", "-R", "1:2", box.at("d")], check=True)
        command = ["tar", "-C", box.target, "-cf", f"{box.root}/t.tar", "d"]
        done = subprocess.run(command, check=False, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    assert not [name for name in os.listdir(box.in_upper("d")) if mark_of(box.in_upper(f"d/{name}"))]


@pytest.mark.parametrize("option", ["volatile", "fsync=0", "quota=67108864", "metacopy=on,redirect_dir=on"])
def test_mounts_that_mark_nothing(box: Sandbox, option: str) -> None:
    """Nothing is synced anyhow; the space is counted; the data stays below."""
    box.lower().file("f", DATA)
    with box.mount(*option.split(",")):
        os.chown(box.at("f"), 1, 2)
        assert mark_of(box.in_upper("f")) != UNSYNCED
        assert not noted(box)


def test_files_that_are_not_marked(box: Sandbox) -> None:
    """Large ones, empty ones, and those that have other names, under which their lower file would not be found."""
    low = box.lower().file("large", os.urandom(2 << 20)).file("empty", "").file("one", DATA)
    os.link(low.at("one"), low.at("two"))
    with box.mount():
        for name in ("large", "empty", "one"):
            os.chown(box.at(name), 1, 2)
            assert mark_of(box.in_upper(name)) is None
        assert not noted(box)


def test_a_second_mount_of_the_work_directory_marks_nothing(box: Sandbox) -> None:
    box.lower().file("f", DATA).file("g", DATA)
    first = box.target
    with box.mount():
        os.chown(box.at("f"), 1, 2)
        box.target = box.new_dir("second")
        with box.mount():
            assert read(box.at("f")) == DATA
            os.chown(box.at("g"), 1, 2)
            assert mark_of(box.in_upper("g")) is None
        box.target = first
        assert mark_of(box.in_upper("f")) == UNSYNCED
