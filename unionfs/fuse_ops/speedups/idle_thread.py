"""A thread of the policy SCHED_IDLE, which does what the thread that asks for it then waits for."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable


class IdleThread:
    """Stands in for the one thread that uses it; only one of the two runs at a time.

    Entering SCHED_IDLE takes no privilege, leaving it does. A thread that never leaves it needs none.

    Raises OSError where the policy is not allowed, or no thread.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[bool | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="unionfs-beside", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise OSError("no further thread can be started") from error
        self.id: int = self._thread.native_id or 0
        try:
            self.run(_become_idle)
        except BaseException:
            self.close()
            raise

    def run(self, call: Callable[[], bool]) -> bool:
        """Have the thread do ``call``, and return or raise what that does."""
        try:
            self._calls.put(call)
            result = self._results.get()
        except BaseException:  # from a signal; but two threads must not run, even now
            self._settle()
            raise
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the thread."""
        self._calls.put(None)
        self._thread.join()

    def _settle(self) -> None:
        """Wait until the thread has done what it was given, whether or not that was, and take what it answered."""
        mark = InterruptedError()

        def answer() -> bool:
            raise mark

        self._calls.put(answer)
        while self._results.get() is not mark:
            pass

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            result: bool | BaseException
            try:
                result = call()
            except BaseException as error:
                result = error
            self._results.put(result)
            del call, result  # which keep what they know alive


def _become_idle() -> bool:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return True
