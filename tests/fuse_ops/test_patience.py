"""When a request may wait for the disk in the thread that serves all others."""

from __future__ import annotations

import time

import pytest

from unionfs.fuse_ops.patience import Patience


def alone(sender: int = 7) -> Patience:
    watch = Patience()
    for _ in range(1000):
        watch.request_from(sender)
    return watch


def test_one_sender_after_a_while() -> None:
    watch = Patience()
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
    watch = Patience()
    for number in range(1000):
        watch.request_from(7 + number % 2)
        assert not watch.may_wait()


def test_senders_of_another_pid_namespace_cannot_be_told_apart() -> None:
    assert not alone(0).may_wait()


def test_a_slow_disk_ends_it_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = alone()
    start = time.perf_counter()
    monkeypatch.setattr("unionfs.fuse_ops.patience.time.perf_counter", lambda: start + 1e-3)
    watch.waited_since(start)
    assert watch.may_wait()
    monkeypatch.setattr("unionfs.fuse_ops.patience.time.perf_counter", lambda: start + 1.0)
    watch.waited_since(start)
    assert not watch.may_wait()
    monkeypatch.setattr("unionfs.fuse_ops.patience.time.perf_counter", lambda: start + 60.0)
    assert watch.may_wait()
