"""Metadata-only copy-up, data-only layers, and layers that the kernel wrote with its options."""

from __future__ import annotations

import os
import stat

import pytest

from tests.support.layers import OLD_NS
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import allocated_bytes, assert_same, snapshot, upper_entries, without_root_time
from tests.support.syscalls import renameat2
from unionfs.host.syscalls import RENAME_EXCHANGE

pytest_plugins = ["tests.support.sandbox"]
needs_root()

METACOPY = "trusted.overlay.metacopy"
REDIRECT = "trusted.overlay.redirect"
BOTH = ("redirect_dir=on", "metacopy=on")
DATA = os.urandom(1 << 20)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def test_chown_and_chmod_copy_no_data(box: Sandbox) -> None:
    box.lower().file("d/f", DATA).file("small", "x")
    with box.mount(*BOTH):
        os.chown(box.at("d/f"), 1, 2)
        os.chmod(box.at("d/f"), 0o600)
        os.utime(box.at("d/f"), ns=(OLD_NS, OLD_NS))
        os.setxattr(box.at("d/f"), "user.k", b"v")
        st = os.stat(box.at("d/f"))
        assert (st.st_size, st.st_uid, st.st_gid, st.st_mtime_ns) == (len(DATA), 1, 2, OLD_NS)
        with open(box.at("d/f"), "rb") as f:
            assert f.read() == DATA
        assert METACOPY not in os.listxattr(box.at("d/f"))
    assert os.getxattr(box.in_upper("d/f"), METACOPY) is not None
    assert os.stat(box.in_upper("d/f")).st_size == len(DATA)
    assert allocated_bytes(box.in_upper("d/f")) <= 8192
    assert_same(box.union_snapshot(*BOTH), box.kernel_snapshot(*BOTH, "index=off"))


def test_the_first_write_copies_the_data(box: Sandbox) -> None:
    box.lower().file("d/f", DATA, mode=0o640)
    with box.mount(*BOTH):
        os.chown(box.at("d/f"), 1, 2)
        reader = os.open(box.at("d/f"), os.O_RDONLY)
        with open(box.at("d/f"), "r+b") as f:
            f.seek(100)
            f.write(b"written")
        expected = DATA[:100] + b"written" + DATA[107:]
        assert os.pread(reader, 1 << 21, 0) == expected
        os.close(reader)
    assert METACOPY not in os.listxattr(box.in_upper("d/f"))
    with open(box.in_upper("d/f"), "rb") as f:
        assert f.read() == expected
    assert_same(box.union_snapshot(*BOTH), box.kernel_snapshot(*BOTH, "index=off"))


def test_copying_the_data_takes_no_capabilities_away(box: Sandbox) -> None:
    """The kernel takes them from a file that is written to, and here it is the server that writes."""
    box.lower().file("f", DATA)
    with box.mount(*BOTH):
        os.setxattr(box.at("f"), "security.capability", CAPABILITY)
        os.close(os.open(box.at("f"), os.O_WRONLY))
        assert os.getxattr(box.at("f"), "security.capability") == CAPABILITY
    assert METACOPY not in os.listxattr(box.in_upper("f"))
    assert_same(box.union_snapshot(*BOTH), box.kernel_snapshot(*BOTH, "index=off"))


def test_truncate_of_a_metacopy(box: Sandbox) -> None:
    box.lower().file("f", DATA).file("g", DATA)
    with box.mount(*BOTH):
        for name in ("f", "g"):
            os.chmod(box.at(name), 0o600)
        os.truncate(box.at("f"), 10)
        with open(box.at("g"), "wb") as f:
            f.write(b"new")
        with open(box.at("f"), "rb") as f:
            assert f.read() == DATA[:10]
    assert_same(box.union_snapshot(*BOTH), box.kernel_snapshot(*BOTH, "index=off"))


def test_a_renamed_metacopy_finds_its_data(box: Sandbox) -> None:
    box.lower().file("d/f", DATA).file("e/g", DATA[::-1]).dir("x")
    with box.mount(*BOTH):
        os.chmod(box.at("d/f"), 0o600)
        os.rename(box.at("d/f"), box.at("d/f2"))
        os.rename(box.at("d/f2"), box.at("x/f3"))
        os.chmod(box.at("e/g"), 0o600)
        os.rename(box.at("e"), box.at("x/e"))
        os.link(box.at("x/f3"), box.at("linked"))
        tree = snapshot(box.target)
    assert allocated_bytes(box.in_upper("x/f3")) <= 8192
    assert_same(box.union_snapshot(*BOTH), tree)
    assert_same(tree, box.kernel_snapshot(*BOTH, "index=off"))
    with box.mount(*BOTH):
        with open(box.at("x/f3"), "rb") as f:
            assert f.read() == DATA
        with open(box.at("x/f3"), "ab") as f:
            f.write(b"end")
        with open(box.at("linked"), "rb") as f:
            assert f.read() == DATA + b"end"


@pytest.mark.parametrize("maker", ["kernel", "ours"])
def test_a_metacopy_that_was_made_before_finds_its_data_when_it_is_moved(box: Sandbox, maker: str) -> None:
    """It has no redirect of its own then, or one that holds in its directory only."""
    names = ("renamed", "moved", "linked", "swapped", "turned")
    contents = {name: name.encode() * 100_000 for name in names}
    low = box.lower().dir("e").file("e/other", DATA)
    for name in names:
        low.file(f"d/{name}", contents[name])
    with box.kernel(*BOTH, "index=off") if maker == "kernel" else box.mount(*BOTH):
        for name in names:
            os.chmod(box.at(f"d/{name}"), 0o600)
        os.rename(box.at("d/turned"), box.at("d/turned2"))
    assert METACOPY in os.listxattr(box.in_upper("d/moved"))
    assert REDIRECT not in os.listxattr(box.in_upper("d/moved"))  # where it is, it is found without
    with box.mount(*BOTH):
        os.rename(box.at("d/renamed"), box.at("d/renamed2"))
        os.rename(box.at("d/moved"), box.at("e/moved2"))
        os.link(box.at("d/linked"), box.at("e/linked2"))
        os.unlink(box.at("d/linked"))
        renameat2(box.at("d/swapped"), box.at("e/other"), RENAME_EXCHANGE)
        os.rename(box.at("d/turned2"), box.at("e/turned3"))
        os.rename(box.at("d"), box.at("e/d"))
        tree = snapshot(box.target)
    assert_same(box.union_snapshot(*BOTH), tree)
    assert_same(tree, box.kernel_snapshot(*BOTH, "index=off"))
    with box.mount(*BOTH):
        places = {"e/d/renamed2": "renamed", "e/moved2": "moved", "e/linked2": "linked", "e/other": "swapped"}
        for place, name in (places | {"e/turned3": "turned"}).items():
            assert allocated_bytes(box.in_upper(place)) <= 8192
            with open(box.at(place), "rb") as f:
                assert f.read() == contents[name], place
        with open(box.at("e/d/swapped"), "rb") as f:
            assert f.read() == DATA


def test_every_name_of_a_hard_linked_metacopy_finds_its_data(box: Sandbox) -> None:
    low = box.lower().dir("x").file("d/a", DATA)
    low.link("d/b", to="d/a").link("y/c", to="d/a")
    places = ("x/moved", "d/b", "y/c", "x/further")
    with box.mount(*BOTH):
        os.chmod(box.at("d/a"), 0o600)
        os.rename(box.at("d/a"), box.at("x/moved"))
        os.link(box.at("d/b"), box.at("x/further"))
        assert {os.stat(box.at(place)).st_mode & 0o777 for place in places} == {0o600}
    for mounted in (box.mount(*BOTH), box.kernel(*BOTH, "index=off")):
        with mounted:
            for place in places:
                with open(box.at(place), "rb") as f:
                    assert f.read() == DATA, place
    assert allocated_bytes(box.in_upper("x/moved")) <= 8192


@pytest.mark.disk
def test_a_metacopy_without_room_for_a_redirect_is_copied_when_it_is_moved(box: Sandbox) -> None:
    directory = "/".join([letter * 250 for letter in "abcdefghij"])
    low = box.lower().dir("e").file(f"{directory}/f", DATA)
    low.xattr(f"{directory}/f", "user.large", bytes(2000))  # ext4 has one block of 4 KiB for the attributes of a file
    with box.mount(*BOTH):
        os.chmod(box.at(f"{directory}/f"), 0o600)
        assert METACOPY in os.listxattr(box.in_upper(f"{directory}/f"))
        os.rename(box.at(f"{directory}/f"), box.at("e/f"))
        with open(box.at("e/f"), "rb") as f:
            assert f.read() == DATA
    assert METACOPY not in os.listxattr(box.in_upper("e/f"))


@pytest.mark.parametrize("as_lower", [False, True])
def test_metacopies_of_the_kernel_are_read(box: Sandbox, as_lower: bool) -> None:
    box.lower().file("d/f", DATA).file("d/moved", DATA[::-1]).file("written", "x").dir("e")
    with box.kernel(*BOTH, "index=off"):
        os.chown(box.at("d/f"), 1, 2)
        os.chmod(box.at("d/moved"), 0o600)
        os.rename(box.at("d/moved"), box.at("e/m"))
        os.rename(box.at("d"), box.at("e/d"))
        with open(box.at("written"), "a") as f:
            f.write("y")
        theirs = snapshot(box.target, check_ino=False)
    assert box.upper is not None
    if as_lower:
        box.lowers.insert(0, box.upper)
        box.fresh_upper("upper2")
    # Whoever reads such a layer needs the data, whether or not it would make metacopies itself.
    for options in (BOTH, ("redirect_dir=on",)):
        ours = box.union_snapshot(*options)
        assert_same(without_root_time(ours), without_root_time(theirs))
    with box.mount(*BOTH), open(box.at("e/m"), "ab") as f:
        f.write(b"more")
    tree = box.union_snapshot(*BOTH)
    assert tree["e/m"].size == len(DATA) + 4
    assert_same(tree, box.kernel_snapshot(*BOTH, "index=off"))


def test_an_indexed_upper_of_the_kernel_is_read(box: Sandbox) -> None:
    box.lower().file("a", "data").link("b", to="a").link("d/c", to="a").file("e/f", "x")
    with box.kernel("redirect_dir=on", "index=on", "metacopy=on"):
        with open(box.at("a"), "a") as f:
            f.write("more")
        os.rename(box.at("e"), box.at("e2"))
        os.chmod(box.at("e2/f"), 0o600)
        os.stat(box.at("d/c"))
    # Names that were not copied up are, without an index, the lower file.
    theirs = box.kernel_snapshot(*BOTH, "index=off")
    ours = box.union_snapshot(*BOTH)
    for path in ("a", "e2", "e2/f"):
        assert ours[path].digest == theirs[path].digest
        assert ours[path].mode == theirs[path].mode
    assert set(ours) == set(theirs)


def data_only(box: Sandbox) -> tuple[str, str]:
    """A layer of metacopies and a data-only layer, as composefs makes them."""
    meta, data = box.lower(), box.lower()
    data.file("objects/01", DATA).file("objects/02", "two").file("hidden", "not to be seen")
    for path, size, target in (("d/f", len(DATA), b"/objects/01"), ("g", 3, b"/objects/02"), ("bad", 9, b"/none")):
        meta.sparse(path, size, 0, b"")
        meta.xattr(path, METACOPY, b"").xattr(path, REDIRECT, target)
    return meta.root, data.root


def test_data_only_layers_are_followed(box: Sandbox) -> None:
    meta, data = data_only(box)
    from tests.support.mounts import mount_program, mounted_program

    box.freeze()
    options = f"lowerdir={meta}::{data},upperdir={box.upper},workdir={box.work},redirect_dir=on,metacopy=on"
    with mounted_program([mount_program(), "-o", options, box.target], box.target):
        assert sorted(os.listdir(box.target)) == ["bad", "d", "g"]
        assert not os.path.lexists(box.at("hidden"))
        assert not os.path.lexists(box.at("objects"))
        with open(box.at("d/f"), "rb") as f:
            assert f.read() == DATA
        with open(box.at("g"), "rb") as f:
            assert f.read() == b"two"
        assert os.stat(box.at("bad")).st_size == 9
        with pytest.raises(OSError):
            os.open(box.at("bad"), os.O_RDONLY)
        with open(box.at("g"), "a") as f:
            f.write("more")
        with open(box.at("g")) as f:
            assert f.read() == "twomore"
        os.chmod(box.at("d/f"), 0o600)
        os.rename(box.at("d/f"), box.at("moved"))
        with open(box.at("moved"), "rb") as f:
            assert f.read() == DATA
    box.check_lowers()


def test_metacopy_keeps_capabilities_and_special_modes(box: Sandbox) -> None:
    low = box.lower().file("f", DATA, mode=0o4755)
    low.xattr("f", "user.a", b"1")
    with box.mount(*BOTH):
        os.utime(box.at("f"), ns=(1, 1))
        st = os.stat(box.at("f"))
        assert stat.S_IMODE(st.st_mode) == 0o4755
        assert os.getxattr(box.at("f"), "user.a") == b"1"
    assert upper_entries(box.in_upper()) == {"f": "file"}
    assert allocated_bytes(box.in_upper("f")) <= 8192
