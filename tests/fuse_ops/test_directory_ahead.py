"""Directories of lower layers are read from the disk before they are asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import needs_root
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.option_text import parse_options
from unionfs.fuse_ops.speedups import reading_ahead
from unionfs.fuse_ops.speedups.reading_ahead import DirectoryReadAhead
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache, LayerDir, open_lower
from unionfs.host import io_uring
from unionfs.host.io_uring import LookupRing

needs_root()


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[LayerDir]:
    for number in range(200):
        (tmp_path / "top" / f"dir-{number}").mkdir(parents=True)
    cache = DescriptorCache(64)
    layer = open_lower(str(tmp_path), 0, cache)
    yield layer
    cache.close()
    layer.close()


def wait_until_done(ring: LookupRing) -> None:
    deadline = time.monotonic() + 10
    while ring.room < io_uring._ENTRIES:
        assert time.monotonic() < deadline, "the kernel does not come to an end"
        time.sleep(0.001)


def make_cold(ahead: DirectoryReadAhead) -> None:
    for _ in range(2):
        ahead.record_latency(1.0, 1, 1)
    assert ahead.wants_more


class Recorder:
    """In the place of the ring."""

    room_left = 1000

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.submitted = 0

    def add(self, dir_fd: int, path: bytes) -> bool:
        if len(self.names) >= self.room_left:
            return False
        self.names.append(path.rpartition(b"/")[0])
        return True

    def submit(self) -> None:
        self.submitted = len(self.names)

    def close(self) -> None:
        pass


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(reading_ahead, "LookupRing", lambda: recorder)
    return recorder


class TestRing:
    def test_more_names_than_it_has_room_for(self, layer: LayerDir) -> None:
        ring = LookupRing()
        try:
            added = 0
            while ring.add(layer.fd, b"top/dir-%d/x" % added):
                added += 1
            assert added == io_uring._ENTRIES
            ring.submit()
            wait_until_done(ring)
            for _ in range(50):  # the counters go round
                assert ring.add(layer.fd, b"top/missing")
                ring.submit()
                wait_until_done(ring)
        finally:
            ring.close()

    def test_a_name_that_is_too_long_ends_nothing(self, layer: LayerDir) -> None:
        ring = LookupRing()
        try:
            assert not ring.add(layer.fd, b"x" * 100_000)
            assert ring.add(layer.fd, b"y" * 10_000)  # longer than a path may be
            ring.submit()
            wait_until_done(ring)
            assert ring.room == io_uring._ENTRIES
        finally:
            ring.close()

    def test_names_are_looked_up(self, layer: LayerDir, tmp_path: Path) -> None:
        ring = LookupRing()
        try:
            io_uring._results[:256] = bytes(256)
            assert ring.add(layer.fd, b"top/missing")
            ring.submit()
            wait_until_done(ring)
            assert io_uring._results[:256] == bytes(256)
            assert ring.add(layer.fd, b"top/dir-1")
            ring.submit()
            wait_until_done(ring)
            # struct statx: the inode number is at 32.
            assert int.from_bytes(io_uring._results[32:40], sys.byteorder) == (tmp_path / "top" / "dir-1").stat().st_ino
        finally:
            ring.close()


class TestWhatIsRead:
    def test_nothing_while_the_disk_is_fast(self) -> None:
        ahead = DirectoryReadAhead()
        for _ in range(100):
            ahead.record_latency(20e-6, 1, 5)
        assert not ahead.wants_more

    def test_the_latest_first_and_nothing_twice(self, layer: LayerDir, ring: Recorder) -> None:
        ahead = DirectoryReadAhead()
        make_cold(ahead)
        ring.room_left = 2
        ahead.prefetch([(layer, b"a"), (layer, b"b"), (layer, b"c")])
        ahead.prefetch([(layer, b"d"), (layer, b"a")])
        ring.room_left = 100
        ahead.prefetch([(layer, b"e")])
        assert ring.names == [b"a", b"b", b"e", b"d", b"c"]
        assert ring.submitted == 5

    def test_it_is_busy_for_a_moment(self, layer: LayerDir, ring: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        ahead = DirectoryReadAhead()
        make_cold(ahead)
        assert not ahead.busy  # the disk is slow, but nothing is read
        ahead.prefetch([(layer, b"a")])
        assert ahead.busy
        now += 0.005
        assert ahead.busy
        now += 0.006
        assert not ahead.busy

    def test_nothing_that_is_too_deep_to_be_named(self, layer: LayerDir, ring: Recorder) -> None:
        ahead = DirectoryReadAhead()
        make_cold(ahead)
        ahead.prefetch([(layer, b"deep/" * 20_000), (layer, b"a")])
        assert ring.names == [b"a"]

    def test_a_kernel_without_io_uring(self, layer: LayerDir, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> LookupRing:
            raise PermissionError(1, "not here")

        monkeypatch.setattr(reading_ahead, "LookupRing", refuse)
        ahead = DirectoryReadAhead()
        make_cold(ahead)
        ahead.prefetch([(layer, b"a")])
        assert not ahead.wants_more
        ahead.close()

    def test_a_fork_makes_a_ring_of_its_own(self, layer: LayerDir, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Recorder] = []

        def make() -> Recorder:
            made.append(Recorder())
            return made[-1]

        monkeypatch.setattr(reading_ahead, "LookupRing", make)
        ahead = DirectoryReadAhead()
        make_cold(ahead)
        ahead.prefetch([(layer, b"a")])
        ahead.prefetch([(layer, b"b")])
        assert len(made) == 1
        monkeypatch.setattr(os, "getpid", lambda: -1)
        ahead.prefetch([(layer, b"c")])
        assert [ring.names for ring in made] == [[b"a", b"b"], [b"c"]]


def test_a_merged_directory_is_read_in_all_layers_at_once(tmp_path: Path, ring: Recorder) -> None:
    layers = [tmp_path / str(number) for number in range(12)]
    for layer in layers:
        (layer / "d").mkdir(parents=True)
        (layer / "d" / f"from-{layer.name}").touch()
    words = ["lowerdir=" + ":".join(map(str, layers))]
    tree = open_tree(parse_options(words).options)
    try:
        directory = tree.lookup(tree.root, b"d")
        tree.names(tree.root)
        assert ring.names == []
        assert isinstance(tree.view.lower.observer, DirectoryReadAhead)
        make_cold(tree.view.lower.observer)
        assert len(tree.names(directory)) == 12
        assert ring.names == [b"d"] * 11  # the first one is read here and now
    finally:
        tree.close()
