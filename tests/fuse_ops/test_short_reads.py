"""Reads that wait awake: when they do, and that they read the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs.fuse_ops.speedups.placement import ClientAffinity
from unionfs.fuse_ops.speedups.waiting import ShortReads

CONTENTS = os.urandom(10_000)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file that is on the disk only."""
    (tmp_path / "file").write_bytes(CONTENTS)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd
    os.close(fd)


@pytest.fixture
def reads() -> ShortReads:
    """Those of a server that runs beside its client."""
    beside = ClientAffinity()
    beside.active = True
    return ShortReads(beside)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flags of every preadv(2)."""
    return record(monkeypatch, lambda: None)


def record(monkeypatch: pytest.MonkeyPatch, before_nowait: Callable[[], None]) -> list[int]:
    calls: list[int] = []
    real_preadv = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        calls.append(flags)
        if flags & os.RWF_NOWAIT:
            before_nowait()
        return real_preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def read(reads: ShortReads, fd: int, size: int = 10_000, offset: int = 0) -> bytes:
    data = memoryview(bytearray(size))
    return bytes(data[: reads.read(fd, data, offset)])


def test_it_reads_from_the_disk_and_from_memory(reads: ShortReads, fd: int, calls: list[int]) -> None:
    assert read(reads, fd) == CONTENTS
    assert calls[0] == os.RWF_NOWAIT
    calls.clear()
    assert read(reads, fd, 1000, 500) == CONTENTS[500:1500]
    assert len(calls) == 1


def test_the_end_of_the_file(reads: ShortReads, fd: int) -> None:
    assert read(reads, fd, 16_384) == CONTENTS
    assert read(reads, fd, 4096, 8192) == CONTENTS[8192:]
    assert read(reads, fd, 4096, 12_288) == b""


def test_it_sleeps_when_others_may_want_the_processor(fd: int, calls: list[int]) -> None:
    assert read(ShortReads(ClientAffinity()), fd) == CONTENTS
    assert calls == [0]


def test_a_slow_disk_is_slept_for(reads: ShortReads, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise BlockingIOError(errno.EAGAIN, "not yet")

    calls = record(monkeypatch, wait)
    assert read(reads, fd) == CONTENTS
    assert len(calls) > 2 and set(calls[:-1]) == {os.RWF_NOWAIT} and calls[-1] == 0
    calls.clear()
    for _ in range(64):
        assert read(reads, fd) == CONTENTS
    assert calls == [0] * 64
    assert read(reads, fd) == CONTENTS  # perhaps it is faster by now
    assert calls[64] == os.RWF_NOWAIT


def test_a_file_system_that_cannot_say(reads: ShortReads, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    calls = record(monkeypatch, refuse)
    assert [read(reads, fd) for _ in range(3)] == [CONTENTS] * 3
    assert calls == [os.RWF_NOWAIT, 0, 0, 0]


def test_an_error_is_the_callers(reads: ShortReads, fd: int, calls: list[int], tmp_path: Path) -> None:
    another, fd = fd, os.open(tmp_path / "file", os.O_WRONLY)
    with pytest.raises(OSError) as raised:
        read(reads, fd)
    assert raised.value.errno == errno.EBADF
    os.close(fd)
    calls.clear()
    assert read(reads, another) == CONTENTS
    assert calls[0] == os.RWF_NOWAIT, "it says nothing about other files"
