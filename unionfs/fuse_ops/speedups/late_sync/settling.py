"""Settles copies whose data may not be on the disk yet, some time after they were made and when nobody uses them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final

import trio

from unionfs.fuse_ops.copy_up import unsynced
from unionfs.fuse_ops.requests.job import completed
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.tree.inodes import FileInode

log = logging.getLogger(__name__)

_PAUSE_S: Final = 10.0  # long enough for a `chown -R` to end, and for most data to be on its way to the disk
_PAUSE_AFTER_ERROR_S: Final = 60.0


class Settling:
    """The task that settles the copies of one mount. It sleeps while there are none.

    ``in_trio`` has a call done in trio's thread, in the end, when a copy is made by another one; ``before_thread`` is
    called before a thread may be started.
    """

    def __init__(
        self,
        requests: UnionRequests,
        in_trio: Callable[[Callable[[], None]], None] = lambda call: call(),
        before_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_thread = before_thread
        self._requests = requests
        self._in_trio = in_trio
        self._copies = requests.tree.copy_up.unsynced
        self._added, self._many = trio.Event(), trio.Event()

    async def run(self) -> None:
        """Go on until cancelled; what is left then is settled when the tree is closed."""
        if self._copies is None:
            return
        self._copies.added = lambda: self._in_trio(self._note)
        pause_s = _PAUSE_S
        while True:
            await self._added.wait()
            with trio.move_on_after(pause_s):
                await self._many.wait()
            self._added, self._many = trio.Event(), trio.Event()
            try:
                await self._settle(self._copies.copies())
                pause_s = _PAUSE_S
            except OSError as error:
                log.warning("cannot sync copied files: %s; trying again in a while", error.strerror)
                pause_s = _PAUSE_AFTER_ERROR_S
            if len(self._copies):
                self._added.set()

    def _note(self) -> None:
        self._added.set()
        if self._copies is not None and len(self._copies) > unsynced.MANY:
            self._many.set()

    async def _settle(self, copies: list[FileInode]) -> None:
        """Settle those that can be, and raise what the first of the others raised."""
        first: OSError | None = None
        for inode in copies:
            # It changes the ctime, of which tar says "file changed as we read it".
            if inode.unsynced and not inode.handles:
                try:
                    await completed(self._requests.sync_copy(inode), self._before_thread)
                except FileNotFoundError:  # somebody has changed the upper directory
                    log.debug("%s is gone", os.fsdecode(inode.path()))
                    self._requests.tree.copy_up.forget_unsynced(inode)
                    self._requests.tree.inodes.drop_if_unneeded(inode)
                except OSError as error:
                    first = first or error
        if first is not None:
            raise first
