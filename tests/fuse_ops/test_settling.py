"""When copies that were to be synced later are synced, in a tree without a mount."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.trees import Caller, open_union
from unionfs.fuse_ops.copy_up import unsynced
from unionfs.fuse_ops.requests.job import completed
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.speedups import late_sync
from unionfs.fuse_ops.speedups.late_sync import LateSync
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree

if os.geteuid() != 0:
    pytest.skip("needs root for trusted attributes", allow_module_level=True)

NAMES = [f"f{i}" for i in range(6)]
CHANGE = AttributeChange(mode=0o600)


def open_new(tmp_path: Path) -> UnionTree:
    for name in ("low", "upper", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    for name in NAMES:
        (tmp_path / "low" / name).write_text(name * 100)
    return open_union(tmp_path, "low")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[UnionTree]:
    tree = open_new(tmp_path)
    yield tree
    tree.close()


def marked(tmp_path: Path) -> list[str]:
    upper = tmp_path / "upper"
    return sorted(f.name for f in upper.iterdir() if "trusted.overlay.metacopy" in os.listxattr(f))


async def change(requests: UnionRequests, *names: str) -> None:
    for name in names:
        inode = requests.tree.lookup(requests.tree.root, name.encode())
        await completed(requests.set_attributes(inode, CHANGE, Caller()))


@asynccontextmanager
async def settling_beside(
    requests: UnionRequests, before_thread: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Run the task that settles, as a transport does."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LateSync(requests, before_thread=before_thread).run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.trio
async def test_copies_are_settled_after_a_pause(
    tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_sync, "_PAUSE_S", 0.2)
    requests = UnionRequests(tree, tree.options)
    left: list[None] = []
    async with settling_beside(requests, lambda: left.append(None)):
        await change(requests, *NAMES[:3])
        assert marked(tmp_path) == NAMES[:3], "synced without a pause, in the middle of a chown -R"
        await until(lambda: not len(tree.copy_up.unsynced or ()))
        assert not marked(tmp_path)
        assert len(left) == 3, "a thread was started where the transport had not prepared for it"
        await change(requests, *NAMES[3:])
        assert marked(tmp_path) == NAMES[3:]
        await until(lambda: not len(tree.copy_up.unsynced or ()))
        assert not marked(tmp_path)
    assert len(tree.inodes) == 1, "what nobody uses any more is still remembered"


@pytest.mark.trio
async def test_an_open_file_is_left_alone(tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ctime must not change while somebody reads it, as tar notices."""
    monkeypatch.setattr(late_sync, "_PAUSE_S", 0.05)
    requests = UnionRequests(tree, tree.options)
    async with settling_beside(requests):
        await change(requests, *NAMES)
        file = tree.open(tree.lookup(tree.root, b"f2"), os.O_RDONLY)
        before = os.stat(tmp_path / "upper" / "f2").st_ctime_ns
        await until(lambda: marked(tmp_path) == ["f2"])
        await trio.sleep(0.2)
        assert os.stat(tmp_path / "upper" / "f2").st_ctime_ns == before
        tree.close_file(file)
        await until(lambda: not marked(tmp_path))


@pytest.mark.trio
async def test_many_are_not_kept_waiting(tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsynced, "MANY", 3)
    requests = UnionRequests(tree, tree.options)
    async with settling_beside(requests):
        await change(requests, *NAMES)
        await until(lambda: not marked(tmp_path))


@pytest.mark.trio
async def test_an_error_is_told_and_tried_again(
    tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(late_sync, "_PAUSE_S", 0.05)
    monkeypatch.setattr(late_sync, "_PAUSE_AFTER_ERROR_S", 0.05)
    requests = UnionRequests(tree, tree.options)
    broken = True

    def fail() -> None:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with caplog.at_level(logging.WARNING):
        async with settling_beside(requests, fail):
            await change(requests, "f0")
            await until(lambda: "Input/output error" in caplog.text)
            assert marked(tmp_path) == ["f0"]
            broken = False
            await until(lambda: not marked(tmp_path))


@pytest.mark.trio
async def test_a_file_that_cannot_be_synced_keeps_no_other_from_it(
    tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_sync, "_PAUSE_S", 0.05)
    requests = UnionRequests(tree, tree.options)
    fsync = os.fsync

    def fail(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(f"upper/{NAMES[0]}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    async with settling_beside(requests):
        await change(requests, *NAMES)
        await until(lambda: marked(tmp_path) == NAMES[:1])


def test_a_mark_that_cannot_be_removed_at_the_end_keeps_no_other(
    tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        tree.set_attributes(tree.lookup(tree.root, name.encode()), CHANGE, Caller())
    removexattr = os.removexattr

    def fail(path: bytes, name: bytes) -> None:
        if path.endswith(NAMES[0].encode()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        removexattr(path, name)

    copies = tree.copy_up.unsynced
    assert copies is not None
    with monkeypatch.context() as patched:
        patched.setattr(os, "removexattr", fail)
        with pytest.raises(OSError):
            copies.end(lambda: None, tree.copy_up.remove_mark)
    assert marked(tmp_path) == NAMES[:1]
    assert (tmp_path / "work" / "unsynced").exists()


@pytest.mark.trio
async def test_what_somebody_removed_behind_our_back_is_forgotten(
    tree: UnionTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_sync, "_PAUSE_S", 0.05)
    requests = UnionRequests(tree, tree.options)
    async with settling_beside(requests):
        await change(requests, *NAMES)
        (tmp_path / "upper" / "f1").unlink()
        await until(lambda: not len(tree.copy_up.unsynced or ()))
        assert not marked(tmp_path)
    assert len(tree.inodes) == 1


def test_the_end_does_without_what_was_removed_behind_our_back(tmp_path: Path) -> None:
    tree = open_new(tmp_path)
    for name in NAMES:
        tree.set_attributes(tree.lookup(tree.root, name.encode()), CHANGE, Caller())
    (tmp_path / "upper" / "f1").unlink()
    tree.close()
    assert not marked(tmp_path)
    assert not (tmp_path / "work" / "unsynced").exists()


def test_an_end_that_cannot_sync_leaves_marks_and_note(
    tree: UnionTree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inode = tree.lookup(tree.root, b"f0")
    tree.set_attributes(inode, CHANGE, Caller())
    copies = tree.copy_up.unsynced
    assert copies is not None

    def sync() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError):
        copies.end(sync, tree.copy_up.remove_mark)
    assert marked(tmp_path) == ["f0"]
    assert (tmp_path / "work" / "unsynced").exists()


def test_a_crashed_upper_that_cannot_be_searched_is_mounted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked files are found when they are looked up then, and the next mount tries again."""
    tree = open_new(tmp_path)
    tree.set_attributes(tree.lookup(tree.root, b"f0"), CHANGE, Caller())
    tree.copy_up.unsynced = None  # as a crash: nothing is settled
    tree.close()
    (tmp_path / "upper" / "f0").write_bytes(bytes(200))

    def fail(*_: object) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(late_sync, "_marked", fail)
        tree = open_new(tmp_path)
    assert "cannot look for unfinished copies after a crash" in tree.warnings[0]
    assert "Input/output error" in tree.warnings[0]
    file = tree.open(tree.lookup(tree.root, b"f0"), os.O_RDONLY)
    assert os.pread(file.fd, 200, 0) == b"f0" * 100
    tree.close_file(file)
    tree.close()
    assert (tmp_path / "work" / "unsynced").exists()
    tree = open_new(tmp_path)
    assert not tree.warnings
    tree.close()
    assert (tmp_path / "upper" / "f0").read_bytes() == b"f0" * 100
    assert not (tmp_path / "work" / "unsynced").exists()


def test_idle_trees_have_no_note(tree: UnionTree, tmp_path: Path) -> None:
    tree.lookup(tree.root, b"f0")
    assert not (tmp_path / "work" / "unsynced").exists()
