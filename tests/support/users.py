"""Running a piece of a test as another user, in a child process."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def in_child(work: Callable[[], Result], timeout_s: float = 60.0) -> Result:
    """Call ``work`` in a forked child; its result or exception is the caller's.

    Also the way to touch memory mapped from a file: a page fault keeps Python's lock, and one that the server
    never answers would stop the whole test run.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer: tuple[bool, object] = (True, work())
        except BaseException as error:
            try:
                pickle.dumps(error)
                answer = (False, error)
            except Exception:
                answer = (False, AssertionError(traceback.format_exc()))
        with os.fdopen(writer, "wb") as f:
            pickle.dump(answer, f)
        os._exit(0)
    os.close(writer)
    signal_at = time.monotonic() + timeout_s
    os.set_blocking(reader, False)
    data = b""
    try:
        while True:
            try:
                block = os.read(reader, 65536)
            except BlockingIOError:
                if time.monotonic() > signal_at:
                    os.kill(pid, signal.SIGKILL)
                    raise TimeoutError("the child process did not finish") from None
                time.sleep(0.002)
                continue
            if not block:
                break
            data += block
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    if not data:
        raise AssertionError("the child process died")
    good, value = pickle.loads(data)
    if not good:
        raise value
    return value  # type: ignore[no-any-return]


def as_user(uid: int, work: Callable[[], Result], gid: int | None = None, groups: Sequence[int] = ()) -> Result:
    """Call ``work`` as ``uid``, without any capability."""

    def become() -> Result:
        os.setgroups(list(groups))
        group = uid if gid is None else gid
        os.setresgid(group, group, group)
        os.setresuid(uid, uid, uid)
        return work()

    return in_child(become)
