"""Closes the last descriptors of files that have no name any more, which gives their space back.

That takes the file system below up to a second for a large file. The program that removed it has long had its answer by
then, but all others would wait for theirs: so it is done in a thread. Freeing a small file takes less time than handing
it over. A module of its own, because it is compiled and the threads are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.requests.waiting_calls import WaitingCalls
from unionfs.fuse_ops.tree.inodes import LastClose

_LARGE: Final = 2048  # blocks of 512 bytes
_QUEUE_MAX: Final = 64  # descriptors that wait for the thread; they count against the limit of open files


class LastCloseInThread(LastClose):
    """Closes descriptors, here or in a thread."""

    def __init__(self) -> None:
        # A transport may have to see to it where a thread is started from.
        self.outside: Callable[[Callable[[], None]], None] = lambda call: call()
        self._calls: WaitingCalls | None = None

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
            self._calls = WaitingCalls(1)
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
