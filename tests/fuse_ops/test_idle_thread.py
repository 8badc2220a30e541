"""A thread that stays SCHED_IDLE; what it does for a server is in test_beside_client."""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest

from unionfs.fuse_ops.speedups.placement import IdleThread


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_it_is_idle_and_ends() -> None:
    thread = IdleThread()
    try:
        assert os.sched_getscheduler(thread.id) == os.SCHED_IDLE
        assert thread.run(lambda: threading.get_native_id() == thread.id)
        assert os.sched_getscheduler(0) != os.SCHED_IDLE
    finally:
        thread.close()
    assert "unionfs-beside" not in names()


def test_none_is_left_where_the_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(PermissionError):
        IdleThread()
    assert "unionfs-beside" not in names()


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="no further thread"):
        IdleThread()


class Interrupting:
    """A queue whose use a signal's handler interrupts once, by raising an error before or after it."""

    def __init__(self, queue: SimpleQueue[Any], method: str, when: str) -> None:
        self.get, self.put = queue.get, queue.put
        usual = getattr(queue, method)

        def interrupted(*args: Any) -> None:
            setattr(self, method, usual)
            if when == "after":
                usual(*args)
            raise InterruptedError("a signal")

        setattr(self, method, interrupted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("queue", "method"), [("_calls", "put"), ("_results", "get")])
def test_a_signal_at_any_moment_leaves_it_in_step(
    queue: str, method: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, ended = IdleThread(), []

    def slow() -> bool:
        time.sleep(0.1)
        ended.append(True)
        return True

    try:
        monkeypatch.setattr(thread, queue, Interrupting(getattr(thread, queue), method, when))
        with pytest.raises(InterruptedError):
            thread.run(slow)
        assert len(ended) == (0 if (method, when) == ("put", "before") else 1), "it went on beside its caller"
        assert thread.run(lambda: False) is False, "the answer of another call"
    finally:
        thread.close()
