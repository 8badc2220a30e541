"""A thread that stays SCHED_IDLE; what it does for a server is in test_beside_client."""

from __future__ import annotations

import os
import threading

import pytest

from unionfs.fuse_ops.direct.idle_thread import IdleThread


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
