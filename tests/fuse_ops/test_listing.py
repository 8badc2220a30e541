"""Offsets in a listing: they mean names, whatever happens to the directory."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.support.sandbox import needs_root
from tests.support.trees import ROOT, open_union
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.transports.direct import listing as listings
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.listing import DirectListing, PackedAttributes
from unionfs.fuse_ops.union.union_tree import UnionTree

needs_root()

_ROOM = 4096  # bytes: the least that the kernel asks for


@pytest.fixture
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnionTree]:
    root = tmp_path_factory.mktemp("listing")
    for name in ("lower", "upper", "work"):
        (root / name).mkdir()
    for number in range(300):
        (root / "lower" / f"{number:03}").touch()
    tree = open_union(root, "lower")
    yield tree
    tree.close()


def new_listing(tree: UnionTree, kept: listings.Listings | None = None) -> DirectListing:
    return DirectListing(tree, PackedAttributes(tree.view), 1, 0, UnionRequests(tree, tree.options), kept)


def entries(answer: bytes) -> list[tuple[bytes, int]]:
    """Names and the offsets after them."""
    found = []
    at = p.OUT_HEADER.size
    while at < len(answer):
        _, offset, length, _ = p.DIRENT.unpack_from(answer, at)
        found.append((answer[at + p.DIRENT.size : at + p.DIRENT.size + length], offset))
        at += -(-(p.DIRENT.size + length) // 8) * 8
    assert struct.unpack_from("=I", answer)[0] == len(answer)
    return found


def read(listing: DirectListing, tree: UnionTree, offset: int) -> list[tuple[bytes, int]]:
    answer = listing.answer(7, tree.root, offset, _ROOM, plus=False)
    assert len(answer) <= _ROOM + p.OUT_HEADER.size
    return entries(answer)


def read_all(listing: DirectListing, tree: UnionTree, offset: int = 0) -> list[bytes]:
    found: list[bytes] = []
    while page := read(listing, tree, offset):
        found += [name for name, _ in page]
        offset = page[-1][1]
    return found


ALL = sorted([b".", b"..", *(b"%03d" % number for number in range(300))])


def test_going_on_needs_nothing_that_was_kept(tree: UnionTree) -> None:
    first = read(DirectListing(tree, PackedAttributes(tree.view), 1, 0, UnionRequests(tree, tree.options)), tree, 0)
    rest = read_all(
        DirectListing(tree, PackedAttributes(tree.view), 1, 0, UnionRequests(tree, tree.options)), tree, first[-1][1]
    )
    assert sorted([name for name, _ in first] + rest) == ALL


@pytest.mark.parametrize("forgotten", [False, True])
def test_removing_what_was_read_hides_nothing_of_the_rest(tree: UnionTree, forgotten: bool) -> None:
    listing = new_listing(tree)
    seen: list[bytes] = []
    offset = 0
    while page := read(listing, tree, offset):
        for name, after in page:
            seen.append(name)
            offset = after
            if not name.startswith(b"."):
                tree.unlink(tree.root, name)
        if forgotten:
            listing = new_listing(tree)
    assert sorted(seen) == ALL
    assert read_all(listing, tree) == [b".", b".."]


def test_names_of_one_offset_stay_together(tree: UnionTree) -> None:
    # Seven names each: some group would lie across the end of a page.
    def make() -> DirectListing:
        kept = listings.Listings(tree.view, lambda name: 3 + int(name) // 7)
        return new_listing(tree, kept)

    listing = make()
    assert sorted(read_all(listing, tree)) == ALL
    for _, offset in read(listing, tree, 0)[2:]:
        again = read_all(make(), tree, offset)
        assert sorted(again) == [name for name in ALL[2:] if 3 + int(name) // 7 > offset]


def test_offsets_fit_programs_of_32_bits(tree: UnionTree) -> None:
    assert all(2 < listings.offset_of(b"%d" % number) < 1 << 31 for number in range(10_000))


def test_few_listings_are_kept(tree: UnionTree) -> None:
    kept = listings.Listings(tree.view)
    for number in range(40):
        name = b"dir%d" % number
        kept.start(tree.mkdir(tree.root, name, 0o755, ROOT))
    assert len(kept) <= 16
