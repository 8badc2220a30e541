"""Threads for calls that wait for the disk."""

from __future__ import annotations

import threading

import pytest

from unionfs.fuse_ops.requests import threads
from unionfs.fuse_ops.requests.threads import CallThreads

_SOON_S = 30.0


def test_calls_wait_beside_each_other_up_to_the_limit() -> None:
    calls = CallThreads(limit=3)
    together = threading.Barrier(4)

    def meet() -> None:
        together.wait(_SOON_S)

    for _ in range(3):
        calls.start(meet)
    together.wait(_SOON_S)  # all three are running, or this breaks
    calls.close()
    assert len(calls) == 0


def test_more_calls_than_threads_are_all_made() -> None:
    calls = CallThreads(limit=2)
    done: list[int] = []
    for number in range(200):
        calls.start(lambda number=number: done.append(number))  # type: ignore[misc]
    calls.close()
    assert sorted(done) == list(range(200))


def test_close_waits_for_what_is_running_and_takes_no_more() -> None:
    calls = CallThreads()
    go = threading.Event()
    ended: list[bool] = []
    calls.start(lambda: ended.append(go.wait(_SOON_S)))
    threading.Timer(0.05, go.set).start()
    calls.close()
    assert ended == [True]
    with pytest.raises(RuntimeError):
        calls.start(lambda: None)


def test_a_call_that_raises_leaves_the_thread_usable(caplog: pytest.LogCaptureFixture) -> None:
    calls = CallThreads(limit=1)
    done: list[bool] = []

    def fail() -> None:
        raise OSError("as if the disk were gone")

    calls.start(fail)
    calls.start(lambda: done.append(True))
    calls.close()
    assert done == [True]
    assert "as if the disk were gone" in caplog.text


def test_idle_threads_end_and_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_IDLE_S", 0.01)
    calls = CallThreads(limit=2)
    for _ in range(3):
        made = threading.Event()
        before = {thread.ident for thread in threading.enumerate()}
        calls.start(made.set)
        assert made.wait(_SOON_S)
        for thread in threading.enumerate():
            if thread.ident not in before and thread.name == "unionfs-waiting":
                thread.join(_SOON_S)
                assert not thread.is_alive()
    calls.close()


@pytest.mark.parametrize("first", [False, True], ids=["none", "no second one"])
def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """The limit of processes is reached: a call is made later, or here, but it is made."""
    calls = CallThreads(limit=2)
    go, done = threading.Event(), list[threading.Thread]()
    if first:
        calls.start(lambda: done.append(threading.current_thread()) if go.wait(_SOON_S) else None)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    calls.start(lambda: done.append(threading.current_thread()))
    assert done == ([] if first else [threading.main_thread()])
    go.set()
    calls.close()
    assert len(done) == 1 + first
    assert len(calls) == 0
