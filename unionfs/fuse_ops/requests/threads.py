"""Threads for calls that wait for the disk: those that answer a request, and the last close of a large file.

Handing a call to trio's threads and taking its result back costs two changes of thread and a turn of the scheduler,
about as much as reading a small file. Any thread may write a reply to /dev/fuse, so each call sends its own answer.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_THREADS_MAX: Final = 16
_IDLE_S: Final = 5.0  # a thread that has nothing to do for so long ends

Call = Callable[[], None]


class CallThreads:
    """Runs calls in threads of its own, which are started when all others are busy.

    ``limit`` is how many calls may wait at the same time; further ones queue up behind them.
    """

    def __init__(self, limit: int = _THREADS_MAX) -> None:
        self._limit = limit
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._open = 0  # calls that are queued or running
        self._closed = False

    def __len__(self) -> int:
        return self._open

    @property
    def has_threads(self) -> bool:
        """Whether there is anything to wait for in :meth:`close`."""
        return bool(self._threads)

    def start(self, call: Call) -> None:
        """Run ``call`` in a thread, soon; here and now where none can be started. It must not raise."""
        with self._lock:
            if self._closed:
                raise RuntimeError("no further calls are taken")
            self._open += 1
            if self._open > len(self._threads) and len(self._threads) < self._limit:
                self._start_thread()
            if self._threads:
                self._queue.put(call)
                return
        self._make(call)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="unionfs-waiting", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the limit of processes; others will do what there is to do, if there are any
            log.debug("no thread for a call: %s", error)
        else:
            self._threads.add(thread)

    def _work(self) -> None:
        while True:
            try:
                call = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    # A call that was counted but not queued yet may rely on this thread.
                    if self._open >= len(self._threads) and not self._closed:
                        continue
                    self._threads.discard(threading.current_thread())
                    return
            if call is None:
                return
            self._make(call)

    def _make(self, call: Call) -> None:
        try:
            call()
        except Exception:
            log.exception("a call in a thread failed")
        with self._lock:
            self._open -= 1

    def close(self) -> None:
        """Wait until all calls have ended; none can be started any more."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()


_LARGE: Final = 2048  # blocks of 512 bytes
_QUEUE_MAX: Final = 64  # descriptors that wait for the thread; they count against the limit of open files


class LastCloses:
    """Closes the last descriptors of files that have no name any more, which gives their space back.

    That takes the file system below up to a second for a large file. The program that removed it has long had its
    answer by then, but all others would wait: so a thread does it. Freeing a small file takes less time than handing it
    over.
    """

    def __init__(self) -> None:
        # A transport may have to see to it where a thread is started from.
        self.outside: Callable[[Callable[[], None]], None] = lambda call: call()
        self._calls: CallThreads | None = None

    def close(self, fd: int) -> None:
        """Close ``fd``, which may be the last descriptor of a file without a name."""
        try:
            large = os.fstat(fd).st_blocks > _LARGE
        except OSError:
            large = False
        if not large:
            os.close(fd)
            return
        if self._calls is None:
            self._calls = CallThreads(1)
        calls = self._calls
        if len(calls) < _QUEUE_MAX:
            self.outside(lambda: calls.start(lambda: os.close(fd)))
        else:
            os.close(fd)

    def wait(self) -> None:
        """Wait until all are closed, and end the thread."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None
