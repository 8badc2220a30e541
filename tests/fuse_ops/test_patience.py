"""When a request may wait for the disk in the thread that serves all others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.option_text import parse_options
from unionfs.fuse_ops.speedups.waiting import InlineWaitPolicy
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import Opcode
from unionfs.fuse_ops.transports.direct.transport import DirectTransport


def alone(sender: int = 7) -> InlineWaitPolicy:
    watch = InlineWaitPolicy()
    for _ in range(1000):
        watch.request_from(sender)
    return watch


def test_one_sender_after_a_while() -> None:
    watch = InlineWaitPolicy()
    watch.request_from(7)
    assert not watch.may_wait()
    assert alone().may_wait()


def test_another_sender_ends_it() -> None:
    watch = alone()
    watch.request_from(8)
    assert not watch.may_wait()
    watch.request_from(7)
    assert not watch.may_wait()


def test_two_in_turns_are_never_alone() -> None:
    watch = InlineWaitPolicy()
    for number in range(1000):
        watch.request_from(7 + number % 2)
        assert not watch.may_wait()


def test_senders_of_another_pid_namespace_cannot_be_told_apart() -> None:
    assert not alone(0).may_wait()


def test_a_slow_disk_ends_it_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = alone()
    start = time.perf_counter()
    monkeypatch.setattr("unionfs.fuse_ops.speedups.waiting.time.perf_counter", lambda: start + 1e-3)
    watch.waited_since(start)
    assert watch.may_wait()
    monkeypatch.setattr("unionfs.fuse_ops.speedups.waiting.time.perf_counter", lambda: start + 1.0)
    watch.waited_since(start)
    assert not watch.may_wait()
    monkeypatch.setattr("unionfs.fuse_ops.speedups.waiting.time.perf_counter", lambda: start + 10.5)
    assert not watch.may_wait()
    monkeypatch.setattr("unionfs.fuse_ops.speedups.waiting.time.perf_counter", lambda: start + 11.5)
    assert watch.may_wait()


@pytest.mark.parametrize(("background", "expected"), [(Opcode.RELEASE, True), (Opcode.GETATTR, False)])
def test_what_nobody_waits_for_is_nobodys(tmp_path: Path, background: Opcode, expected: bool) -> None:
    (tmp_path / "lower").mkdir()
    options = parse_options([f"lowerdir={tmp_path}/lower"]).options
    tree = open_tree(options)
    answers = os.open("/dev/null", os.O_RDWR)
    transport = DirectTransport(tree, options)
    transport.mount(f"/dev/fd/{answers}")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                for code, pid in ((Opcode.GETATTR, 7), (background, 0)):
                    header = p.IN_HEADER.pack(p.IN_HEADER.size + 16, code, 1, 1, 0, 0, pid, 0, 0)
                    transport.dispatch(memoryview(header + bytes(16)), nursery)

    trio.run(main)
    assert transport.served.inline_waits.may_wait() is expected
    transport.close()
    tree.close()


def who_syncs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: Opcode,
    inline_waits: InlineWaitPolicy,
    sizes: Sequence[int],
    flags: int = 0,
    took: float = 0,
) -> list[tuple[str, bool]]:
    """What syncs the root directory, or a file of so many bytes, when the kernel asks for it; whether in a thread.

    It asks for each of ``sizes``, and is answered after ``took`` seconds.
    """
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "upper" / "file").touch()
    words = [f"lowerdir={tmp_path}/lower", f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work"]
    options = parse_options(words).options
    tree = open_tree(options)
    answered, answers = os.pipe()
    transport = DirectTransport(tree, options)
    transport.mount(f"/dev/fd/{answers}")
    transport.served.inline_waits = inline_waits
    handle = transport.served.requests.add_file(
        tree.open(tree.lookup(tree.root, b"file"), os.O_RDWR), os.O_RDWR, cached=False
    )
    body = p.FSYNC_IN.pack(handle, flags, 0)
    header = p.IN_HEADER.pack(p.IN_HEADER.size + len(body), code, 1, 1, 0, 0, 7, 0, 0)
    synced: list[tuple[str, bool]] = []
    now = time.perf_counter()

    def watch(name: str) -> None:
        def watched(fd: int) -> None:
            synced.append((name, threading.current_thread() is not threading.main_thread()))
            nonlocal now
            now += took

        monkeypatch.setattr(os, name, watched)

    def fstat(fd: int) -> os.stat_result:
        raise AssertionError("who has seen a time makes the next sync write the inode")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            transport.dispatch(memoryview(header + body), nursery)

    watch("fsync")
    watch("fdatasync")
    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for number, size in enumerate(sizes):
        os.truncate(tmp_path / "upper" / "file", size)
        trio.run(main)
        assert os.read(answered, 100) == p.OUT_HEADER.pack(p.OUT_HEADER.size, 0, 1)
        assert len(synced) == number + 1
    monkeypatch.undo()
    transport.close()
    tree.close()
    os.close(answered)
    return synced


MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "in_thread"),
    [
        pytest.param([4096], [False], id="small"),
        pytest.param([8 * MIB], [True], id="large"),
        pytest.param([8 * MIB] * 3, [True, False, False], id="large, with little to write"),
        pytest.param([8 * MIB, 9 * MIB, 10 * MIB], [True, False, False], id="grows a little"),
        pytest.param([8 * MIB, 16 * MIB, 16 * MIB], [True, True, False], id="grows much"),
        pytest.param([8 * MIB, 4096, 8 * MIB], [True, False, True], id="written anew"),
    ],
)
def test_a_file_with_much_to_write_is_synced_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], in_thread: list[bool]
) -> None:
    synced = who_syncs(tmp_path, monkeypatch, Opcode.FSYNC, alone(), sizes)
    assert [by for _, by in synced] == in_thread


def test_a_large_file_that_took_long_is_synced_in_a_thread_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = who_syncs(tmp_path, monkeypatch, Opcode.FSYNC, alone(), [8 * MIB] * 3, took=0.02)
    assert [by for _, by in synced] == [True] * 3


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_directory_is_synced_on_the_spot_for_one_that_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    synced = who_syncs(tmp_path, monkeypatch, Opcode.FSYNCDIR, alone() if is_alone else InlineWaitPolicy(), [0])
    assert synced == [("fsync", not is_alone)]


@pytest.mark.parametrize("code", [Opcode.FSYNC, Opcode.FSYNCDIR])
@pytest.mark.parametrize(("flags", "call"), [(0, "fsync"), (p.FSYNC_FDATASYNC, "fdatasync")])
def test_no_more_is_synced_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Opcode, flags: int, call: str
) -> None:
    assert who_syncs(tmp_path, monkeypatch, code, alone(), [4096], flags) == [(call, False)]
