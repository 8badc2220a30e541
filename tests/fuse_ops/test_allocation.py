"""What a change will allocate, against what the file system says after it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.syscalls import fallocate
from unionfs.fuse_ops import quota
from unionfs.fuse_ops.quota import data_bytes, growth, round_up

BLOCK = 4096


@pytest.fixture(params=["extents", "holes"])
def fd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A file, on a file system that tells extents and, as tmpfs, on one that only tells holes."""
    if request.param == "holes":
        monkeypatch.setattr(quota, "_FIEMAP", 0xC0205400)  # ENOTTY
    opened = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def counted(fd: int) -> int:
    st = os.fstat(fd)
    return min(st.st_blocks * 512, round_up(st.st_size, BLOCK))


def test_round_up() -> None:
    assert [round_up(size, 4) for size in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_growth_is_what_a_write_takes(fd: int) -> None:
    rng = random.Random(1)
    for _ in range(150):
        offset, size = rng.randrange(60 * BLOCK), rng.randrange(1, 5 * BLOCK)
        before = counted(fd)
        expected = growth(fd, offset, size, BLOCK, before, 0)
        os.pwrite(fd, bytes(size), offset)
        # Meanwhile the file system may have taken a block for its notes on the extents.
        assert counted(fd) - before in (expected, expected + BLOCK)
        if rng.randrange(20) == 0:
            os.ftruncate(fd, rng.randrange(40 * BLOCK))


def test_nothing_grows_where_everything_is(fd: int) -> None:
    os.pwrite(fd, bytes(10 * BLOCK), 0)
    assert growth(fd, 100, 5 * BLOCK, BLOCK, 10 * BLOCK, 0) == 0
    assert growth(fd, 10 * BLOCK - 1, 2, BLOCK, 10 * BLOCK, 0) == BLOCK
    assert growth(fd, 100, 0, BLOCK, 10 * BLOCK, 0) == 0


def test_preallocated_blocks_are_there(fd: int) -> None:
    os.posix_fallocate(fd, 0, 8 * BLOCK)
    assert growth(fd, 0, 8 * BLOCK, BLOCK, 8 * BLOCK, 0) == 0
    assert growth(fd, 4 * BLOCK, 8 * BLOCK, BLOCK, 8 * BLOCK, 0) == 4 * BLOCK


@pytest.mark.disk
def test_what_is_allocated_beyond_the_end_counts_only_when_asked_for(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    fallocate(fd, 1, 0, 8 * BLOCK)  # FALLOC_FL_KEEP_SIZE
    assert growth(fd, 0, 8 * BLOCK, BLOCK, 0, 8 * BLOCK) == 0
    assert growth(fd, 0, 8 * BLOCK, BLOCK, 0, 0) == 8 * BLOCK
    os.close(fd)


def test_data_of_a_sparse_file(fd: int) -> None:
    os.ftruncate(fd, 1 << 40)
    assert data_bytes(fd, 1 << 40, BLOCK) == 0
    os.pwrite(fd, b"x", 5 * BLOCK + 1)
    os.pwrite(fd, bytes(2 * BLOCK), 1 << 30)
    assert data_bytes(fd, 1 << 40, BLOCK) == 3 * BLOCK
    assert data_bytes(fd, (1 << 30) + 1, BLOCK) == 2 * BLOCK


def test_many_extents(fd: int) -> None:
    """More than are asked for at a time."""
    for number in range(0, 400, 2):
        os.pwrite(fd, b"x", number * BLOCK)
    os.fsync(fd)
    assert growth(fd, 0, 400 * BLOCK, BLOCK, 200 * BLOCK, 0) == 200 * BLOCK
