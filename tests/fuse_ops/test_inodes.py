"""Inode numbers that do not collide, and inodes that go when nobody needs them."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.fuse_ops.tree.inodes import ROOT_INO, UNKNOWN_INO, DirInode, InodeNumbers, InodeTable


def table() -> tuple[InodeTable, DirInode]:
    inodes = InodeTable(InodeNumbers(iter([10, 20])))
    return inodes, inodes.new_directory(ROOT_INO)


def test_numbers_of_the_first_device_are_kept() -> None:
    assert InodeNumbers(iter([10, 20])).of((10, 1234)) == 1234


def test_a_remount_gives_the_same_numbers() -> None:
    first, second = InodeNumbers(iter([10, 20])), InodeNumbers(iter([11, 21]))
    assert first.of((20, 5)) == second.of((21, 5)) != 5


@given(
    st.sets(st.tuples(st.sampled_from([10, 20, 30]), st.integers(0, 2**64 - 1)), max_size=20),
    st.sampled_from(["auto", "on", "off"]),
)
def test_different_files_have_different_numbers(reals: set[tuple[int, int]], xino: str) -> None:
    inodes = InodeTable(InodeNumbers(iter([10, 20]), xino))
    given_out = [inodes.new_file(stat.S_IFREG, inodes.numbers.of(real)).ino for real in reals]
    assert len(set(given_out)) == len(reals)
    assert all(ROOT_INO < number < 2**64 for number in given_out)


@pytest.mark.parametrize("xino", ["auto", "off"])
def test_numbers_fit_32_bits(xino: str) -> None:
    numbers = InodeNumbers(iter(range(40)), xino)
    given_out = [numbers.of((device, ino)) for device in range(25) for ino in (2, 3, 1 << 25, (1 << 26) - 1)]
    assert len(set(given_out)) == len(given_out)
    assert max(given_out) < 1 << 32
    again = InodeNumbers(iter(range(40)), xino)
    assert (numbers.of((7, 77)) == again.of((7, 77))) == (xino == "auto")
    assert numbers.of((7, 1 << 26)) == 7 << 56 | 1 << 26 if xino == "auto" else numbers.of((7, 1 << 26)) < 1 << 32


def test_numbers_of_the_kernel() -> None:
    """``xino=on``: those of further devices have the device in their highest bits."""
    numbers = InodeNumbers(iter([10, 20]), "on")
    assert numbers.of((10, 5)) == 5
    assert numbers.of((20, 5)) == 1 << 56 | 5


def test_numbers_never_end() -> None:
    numbers = InodeNumbers(iter([10]))
    numbers._next_virtual = UNKNOWN_INO - 1
    assert [numbers.virtual() for _ in range(3)] == [UNKNOWN_INO - 1, 1 << 63, (1 << 63) + 1]


def test_a_number_in_use_is_not_given_twice() -> None:
    inodes, _ = table()
    first, second = inodes.new_file(stat.S_IFREG, 77), inodes.new_file(stat.S_IFREG, 77)
    assert first.ino == 77
    assert second.ino != 77


def test_a_directory_stays_for_its_children() -> None:
    inodes, root = table()
    directory, file = inodes.new_directory(5), inodes.new_file(stat.S_IFREG, 6)
    directory.add_place(root, b"d")
    file.add_place(directory, b"f")
    directory.lookups, file.lookups = 0, 1
    inodes.drop_if_unneeded(directory)
    assert len(inodes) == 3
    file.lookups = 0
    inodes.drop_if_unneeded(file)
    assert len(inodes) == 1, "the last child takes its directory with it"
    assert not root.children


def test_places_of_a_linked_file() -> None:
    inodes, root = table()
    file = inodes.new_file(stat.S_IFREG, 6)
    for name in (b"a", b"b", b"c"):
        file.add_place(root, name)
    assert {name for _, name in file.places()} == {b"a", b"b", b"c"}
    file.remove_place(root, b"a")
    assert {name for _, name in file.places()} == {b"b", b"c"}
    file.remove_place(root, b"b")
    file.remove_place(root, b"c")
    assert file.orphan
    assert not root.children


def test_linked_files_are_found_by_the_real_one() -> None:
    inodes, root = table()
    file = inodes.new_file(stat.S_IFREG, 6)
    file.add_place(root, b"a")
    inodes.remember_links(file, (10, 6))
    assert inodes.linked((10, 6)) is file
    inodes.drop_if_unneeded(file)
    assert inodes.linked((10, 6)) is None
