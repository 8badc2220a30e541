"""Files whose space takes long to give back: what is asked for meanwhile is answered, and the result is the same."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.support.sandbox import Sandbox, needs_root
from tests.support.trees import Caller
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.requests.job import completed
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree

pytest_plugins = ["tests.support.sandbox"]
needs_root()

MIB = 1024 * 1024
_SOON_S = 30.0


@pytest.fixture
def large(box: Sandbox) -> Iterator[Path]:
    """A file of 8 MiB in the upper layer of a mount, with setuid, that was changed long ago."""
    box.lower().file("small", "x")
    with box.mount():
        path = Path(box.at("large"))
        path.write_bytes(os.urandom(8 * MIB))
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(path, 0o4755)
        os.utime(path, ns=(1, 1))
        yield path


def shrink_by_path(path: Path, size: int) -> None:
    os.truncate(path, size)


def shrink_by_descriptor(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, size)
    os.close(fd)


def shrink_by_open(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    os.ftruncate(fd, size)
    os.close(fd)


@pytest.mark.parametrize("shrink", [shrink_by_path, shrink_by_descriptor, shrink_by_open])
@pytest.mark.parametrize("size", [0, 5, 4096])
def test_a_large_file_is_made_small(large: Path, shrink: Callable[[Path, int], None], size: int) -> None:
    expected = b"\0" * size if shrink is shrink_by_open else large.read_bytes()[:size]
    before = time.time_ns()
    shrink(large, size)
    st = large.stat()
    assert (st.st_size, st.st_mode & 0o7777) == (size, 0o4755)
    assert st.st_blocks <= 16
    assert before - 1_000_000_000 < st.st_mtime_ns <= time.time_ns()
    assert large.read_bytes() == expected
    os.truncate(large, 2 * MIB)
    assert large.read_bytes() == expected + bytes(2 * MIB - size)


def test_the_space_of_a_large_file_comes_back(large: Path, box: Sandbox) -> None:
    upper = box.in_upper("large")
    with large.open("rb") as file:
        os.unlink(large)
        assert holders_of_deleted(upper)
        assert len(file.read()) == 8 * MIB
    deadline = time.monotonic() + _SOON_S
    while holders_of_deleted(upper):
        assert time.monotonic() < deadline, "the server still has the file"
        time.sleep(0.05)


def holders_of_deleted(path: str) -> list[str]:
    """The open descriptors, of any process, of a file that was at ``path``."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it was closed, or its process has ended
            if os.readlink(fd) == f"{path} (deleted)":
                found.append(str(fd))
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[UnionTree]:
    for name in ("low", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "upper" / "large").write_bytes(bytes(8 * MIB))
    os.sync()
    options = MountOptions(
        lowerdirs=(str(tmp_path / "low"),), upperdir=str(tmp_path / "upper"), workdir=str(tmp_path / "work")
    )
    tree = open_tree(options)
    yield tree
    tree.close()


@pytest.mark.trio
@pytest.mark.parametrize("how", ["set", "open"])
@pytest.mark.parametrize("fails", [False, True])
async def test_nobody_waits_for_a_truncation(
    tree: UnionTree, monkeypatch: pytest.MonkeyPatch, how: str, *, fails: bool
) -> None:
    started, go = threading.Event(), threading.Event()
    real = os.ftruncate

    def ftruncate(fd: int, size: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            assert go.wait(_SOON_S)
            if fails:
                raise OSError(5, "as if the disk were gone")
        real(fd, size)

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    requests = UnionRequests(tree, tree.options)
    inode = tree.lookup(tree.root, b"large")
    done: list[int] = []

    async def truncate() -> None:
        if how == "set":
            attributes = await completed(requests.set_attributes(inode, AttributeChange(size=7), Caller()))
            done.append(attributes.size)
        else:
            tree.close_file(await completed(requests.open(inode, os.O_RDWR | os.O_TRUNC, Caller())))
            done.append(tree.attributes(inode).size)

    with trio.fail_after(_SOON_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(truncate)
            while not started.is_set():
                await trio.sleep(0.01)
            assert tree.attributes(inode).size == 8 * MIB  # asked for in the middle of it
            assert not done
            go.set()
    # When the thread could not do it, the one who asked still gets what he wanted, or the error.
    assert done == [7 if how == "set" else 0]
