"""Brings copies whose data may not be on the disk yet there: some time after they were made, or after a crash.

See :mod:`unionfs.fuse_ops.copy_up.unsynced`. After a crash their data may be anything, and the lower files have it.

Not compiled: mypyc miscompiles a coroutine that waits in an ``except`` or a ``finally``, as the end of a nursery does.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from unionfs.fuse_ops.copy_up import unsynced
from unionfs.fuse_ops.copy_up.unsynced import unmark
from unionfs.fuse_ops.requests.job import completed
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.tree.inodes import FileInode, Inode
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host import syscalls
from unionfs.host.files import join, walk_paths, walk_tree
from unionfs.overlay.format import TRUSTED, UNSYNCED, USER
from unionfs.overlay.rules import entry_path, read_xattr


def recover(tree: UnionTree) -> list[str]:
    """Copy the data of each marked file of the upper directory again.

    Returns lines for people about what could not be done. For as long as there is such a file, the tree takes its data
    from the lower one.
    """
    assert tree.view.upper is not None
    upper_fd = tree.view.upper.layer.readable_fd
    tree.view.trusts_blocks = False
    failed: list[tuple[bytes, OSError]] = []
    try:
        for path in _marked(upper_fd, tree.view.xattrs.metacopy):
            try:
                _finish(tree, path)
            except OSError as error:
                failed.append((path, error))
        if not failed:
            syscalls.syncfs(upper_fd)
    except OSError as error:
        what, why = "look for unfinished copies", error.strerror
    else:
        if not failed:
            tree.view.trusts_blocks = True
            return []
        others = f" and {len(failed) - 1} more" if failed[1:] else ""
        what, why = f"finish the copy of {os.fsdecode(failed[0][0])}{others}", failed[0][1].strerror
    return [
        f"upperdir {tree.options.upperdir}: cannot {what} after a crash: {why}; "
        "their contents come from the lower layers until a mount can"
    ]


def _finish(tree: UnionTree, path: bytes) -> None:
    inode: Inode = tree.root
    for name in path.split(b"/"):
        inode = tree.lookup(inode, name)
    try:
        if isinstance(inode, FileInode) and inode.metacopy:
            tree.copy_up.recover(inode)
    finally:
        tree.inodes.drop_if_unneeded(inode)


def _marked(top_fd: int, mark: bytes) -> list[bytes]:
    """The paths of all files below ``top_fd`` whose attribute ``mark`` says that they are not synced."""
    found: list[bytes] = []

    def enter(fd: int, path: bytes) -> list[bytes]:
        directories, marked = _divided(fd, mark)
        found.extend(join(path, name) for name in marked)
        return directories

    walk_paths(top_fd, enter)
    return found


def _divided(fd: int, mark: bytes) -> tuple[list[bytes], list[bytes]]:
    """The names of the directories in the directory ``fd``, and those of its marked files."""
    directories, marked = [], []
    for name in map(os.fsencode, os.listdir(fd)):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            directories.append(name)
        elif stat.S_ISREG(st.st_mode) and read_xattr(entry_path(fd, name), mark) == UNSYNCED:
            marked.append(name)
    return directories, marked


def sync_marked(upperdir: str) -> None:
    """Settle all marked files of an upper directory without a mount, while the machine lives on which they were made.

    For one that becomes a layer though a server goes on to use it. That finds them settled when it gets to them. Raises
    OSError.
    """
    fd = os.open(upperdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
        for mark in (TRUSTED.metacopy, USER.metacopy):

            def enter(fd: int, mark: bytes = mark) -> list[bytes]:
                directories, marked = _divided(fd, mark)
                for name in marked:
                    unmark(entry_path(fd, name), mark, None)
                return directories

            walk_tree(fd, enter)
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


log = logging.getLogger(__name__)

_PAUSE_S: Final = 10.0  # long enough for a `chown -R` to end, and for most data to be on its way to the disk
_PAUSE_AFTER_ERROR_S: Final = 60.0


class LateSync:
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
                await self._sync(self._copies.copies())
                pause_s = _PAUSE_S
            except OSError as error:
                log.warning("cannot sync copied files: %s; trying again in a while", error.strerror)
                pause_s = _PAUSE_AFTER_ERROR_S
            if len(self._copies):
                self._added.set()

    async def run_beside(
        self,
        serve: Callable[[trio.Nursery], Awaitable[None]],
        gone: Callable[[], None],
        end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run as long as ``serve`` does, which may start tasks in the nursery it gets; then ``end``.

        ``gone`` is called at once when it is over, before what has been begun has ended.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.run)
                await serve(nursery)
                gone()
                nursery.cancel_scope.cancel()
        finally:
            if end is not None:
                await end()

    def _note(self) -> None:
        self._added.set()
        if self._copies is not None and len(self._copies) > unsynced.MANY:
            self._many.set()

    async def _sync(self, copies: list[FileInode]) -> None:
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
