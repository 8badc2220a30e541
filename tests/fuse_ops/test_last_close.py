"""Where the last descriptor of a file without a name is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs.fuse_ops.requests.threads import LastCloses

MIB = 1024 * 1024
_SOON_S = 30.0


@pytest.fixture
def last_close() -> Iterator[LastCloses]:
    last_close = LastCloses()
    yield last_close
    last_close.wait()


@pytest.fixture
def others() -> set[threading.Thread]:
    """Threads of earlier tests, which go on for a while."""
    return {*threading.enumerate()}


class Closes:
    """Stands in the way of os.close: says which thread closed what, and lets others than this one wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.by: dict[int, threading.Thread] = {}
        self._real = os.close
        monkeypatch.setattr(os, "close", self._close)

    def _close(self, fd: int) -> None:
        self.by[fd] = threading.current_thread()
        if threading.current_thread() is not threading.main_thread():
            assert self.go.wait(_SOON_S)
        self._real(fd)


@pytest.fixture
def closes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Closes]:
    closes = Closes(monkeypatch)
    yield closes
    closes.go.set()


def unnamed(directory: Path, size: int) -> int:
    """An O_PATH descriptor, as the tree keeps them, of a file with ``size`` bytes that has no name any more."""
    path = directory / "file"
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # so that it has its blocks
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    path.unlink()
    return fd


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_small_file_is_closed_at_once(last_close: LastCloses, tmp_path: Path) -> None:
    fd = unnamed(tmp_path, 4096)
    last_close.close(fd)
    assert not is_open(fd)


def test_nobody_waits_for_a_large_one(
    last_close: LastCloses, closes: Closes, others: set[threading.Thread], tmp_path: Path
) -> None:
    fds = [unnamed(tmp_path, 2 * MIB) for _ in range(3)]
    for fd in fds:
        last_close.close(fd)
    assert all(is_open(fd) for fd in fds)
    closes.go.set()
    last_close.wait()
    assert not any(is_open(fd) for fd in fds)
    assert threading.main_thread() not in {closes.by[fd] for fd in fds}
    assert not any(thread.name == "unionfs-waiting" for thread in {*threading.enumerate()} - others)


def test_a_transport_says_when_threads_are_started(
    last_close: LastCloses, others: set[threading.Thread], tmp_path: Path
) -> None:
    later: list[Callable[[], None]] = []
    last_close.outside = later.append
    small, large = unnamed(tmp_path, 4096), unnamed(tmp_path, 2 * MIB)
    last_close.close(small)
    last_close.close(large)
    assert (is_open(small), is_open(large), len(later)) == (False, True, 1)
    assert not any(thread.name == "unionfs-waiting" for thread in {*threading.enumerate()} - others)
    later[0]()
    last_close.wait()
    assert not is_open(large)


def test_descriptors_do_not_pile_up(last_close: LastCloses, closes: Closes, tmp_path: Path) -> None:
    fd = unnamed(tmp_path, 2 * MIB)
    fds = [os.dup(fd) for _ in range(80)]
    os.close(fd)
    for fd in fds:
        last_close.close(fd)
    assert 50 < sum(is_open(fd) for fd in fds) < 70
