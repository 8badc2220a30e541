"""Copied-up files of several names: they stay one file while mounted, for as long as a name is left.

The copy has a name of its own in the work directory, so that a name which somebody looks up later finds it. When the
last known name is removed, there may be others that nobody looked up, or names outside of the layer that count as links
all the same. A copy that nobody can find must not take room, so the layers are searched then. A layer does not say
under which other names one finds a file: the search reads all its directories, once in a mount, in a thread that knows
no more than descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from unionfs.fuse_ops.quota import Accounts
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.host.files import join, walk_paths
from unionfs.overlay import rules

_NO_PATHS: Final[list[bytes]] = []


class LinkIndex:
    """The paths of those files of some layers, on one device, that have several there, by inode number.

    Attributes:
        complete: whether it can be relied upon. Not so where reading a directory tells other numbers than stat(2)
            does, or where one cannot be read.
    """

    def __init__(self) -> None:
        self.complete = False
        self._paths: dict[int, list[bytes]] = {}
        self._redirects: set[bytes] = set()

    def paths(self, ino: int) -> list[bytes]:
        """The paths of a file, in whatever layer; none if there is but one."""
        return self._paths.get(ino, _NO_PATHS)

    def may_be_moved(self, path: bytes, redirects: Collection[bytes]) -> bool:
        """Whether a redirect of a layer, or one of ``redirects``, may show what is at ``path`` under another one."""
        above = path.split(b"/")[:-1]
        for redirect in (*self._redirects, *redirects):
            if redirect.startswith(b"/"):
                if path.startswith(redirect[1:] + b"/"):
                    return True
            elif redirect in above:
                return True
        return False


def index_links(lower_fds: Sequence[int], upper_fd: int, spaces: rules.Spaces, known: int) -> LinkIndex:
    """Read all directories of the layers ``lower_fds``, and those of the upper directory for their redirects.

    ``known`` is the inode number of a file of these layers. Raises nothing: what cannot be read makes it incomplete.
    """
    index = LinkIndex()
    seen: set[int] = set()
    several: set[int] = set()

    def count(ino: int, _: bytes) -> None:
        if ino in seen:
            several.add(ino)
        seen.add(ino)

    def note(ino: int, path: bytes) -> None:
        if ino in several:
            index._paths.setdefault(ino, []).append(path)

    try:
        for fd in lower_fds:
            _visit(fd, spaces, index._redirects, count)
        if several:
            for fd in lower_fds:
                _visit(fd, (), index._redirects, note)
        _visit(upper_fd, spaces, index._redirects, lambda ino, path: None)
    except OSError:
        return index
    index.complete = known in seen
    return index


def _visit(top_fd: int, spaces: rules.Spaces, redirects: set[bytes], see: Callable[[int, bytes], None]) -> None:
    """Call ``see`` with number and path of everything below ``top_fd`` but directories, whose redirects are added."""

    def enter(fd: int, path: bytes) -> list[bytes]:
        directories = []
        redirect = rules.read_redirect(b"/proc/self/fd/%d/." % fd, spaces)
        if redirect is not None:
            redirects.add(redirect)
        with os.scandir(fd) as items:
            for item in items:
                name = os.fsencode(item.name)
                if item.is_dir(follow_symlinks=False):
                    directories.append(name)
                else:
                    see(item.inode(), join(path, name))
        return directories

    walk_paths(top_fd, enter)


LinkSearch = Callable[[], LinkIndex]
"""The search, which knows descriptors only: any thread may call it. It raises nothing."""


class HardLinks:
    """The staged links of one tree: those names in the work directory."""

    def __init__(self, view: MergedView, accounts: Accounts) -> None:
        self._view = view
        self._accounts = accounts
        self._nameless: list[FileInode] = []  # of which it is not known whether they have a name
        self._indexes: dict[int, LinkIndex] = {}  # by device
        self._searching = -1  # the device of which one is made
        self.redirects: set[bytes] = set()  # made in this mount

    def lost_name(self, inode: FileInode) -> None:
        """A name of ``inode``, which has a staged link, was removed."""
        if inode.nlink == 0:
            self._release(inode)
        elif inode.orphan:
            self._nameless.append(inode)

    def _release(self, inode: FileInode) -> None:
        upper = self._view.upper
        assert upper is not None
        assert inode.staged_link is not None
        if inode.needed and inode.orphan_fd < 0:
            inode.orphan_fd = os.open(inode.staged_link, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper.work_fd)
        upper.discard(inode.staged_link)
        inode.staged_link = None
        inode.nlink = 0
        self._view.inodes.forget_links(inode)

    def begin_search(self) -> LinkSearch | None:
        """What has to be searched now that names were removed; None: nothing. Then :meth:`finish_search`."""
        if not self._nameless or self._searching >= 0:
            return None
        self._release_nameless()
        if not self._nameless:
            return None
        upper, key = self._view.upper, self._nameless[0].key
        assert upper is not None
        assert key is not None
        self._searching, known = key
        fds = [entry.layer.readable_fd for entry in self._view.lower.root if entry.layer.device == self._searching]
        upper_fd, spaces = upper.layer.readable_fd, self._view.lower.spaces
        return lambda: index_links(fds, upper_fd, spaces, known)

    def finish_search(self, index: LinkIndex | None) -> None:
        """The search has found ``index``; None: it was not made."""
        if index is not None:
            self._indexes[self._searching] = index
        self._searching = -1
        self._release_nameless()

    def _release_nameless(self) -> None:
        left = []
        for inode in self._nameless:
            if inode.staged_link is None or inode.key is None or not inode.orphan:
                continue  # it was given a name, or the last that counts was removed
            index = self._indexes.get(inode.key[0])
            if index is None:
                left.append(inode)
            elif not self._has_name(inode, index, inode.key[1]):
                try:
                    self._accounts.removing(inode, partial(self._release, inode))
                except OSError:  # no descriptor for those who still have it: at the next search then
                    left.append(inode)
                    continue
                self._view.inodes.drop_if_unneeded(inode)
        self._nameless = left

    def _has_name(self, inode: FileInode, index: LinkIndex, ino: int) -> bool:
        """Whether the merged tree has, or may have, a name of ``inode``; those found are its names from now on."""
        if not index.complete:
            return True
        found = False
        for path in index.paths(ino):
            if self._is_at(inode, path):
                found = True
            elif index.may_be_moved(path, self.redirects):
                return True
        return found

    def _is_at(self, inode: FileInode, path: bytes) -> bool:
        node: Inode = self._view.root
        try:
            for name in path.split(b"/"):
                below = self._view.find(node, name) if isinstance(node, DirInode) else None
                if below is None:
                    return False
                node = below
        except OSError:
            return True  # that is not known
        finally:
            self._view.inodes.drop_if_unneeded(node)
        return node is inode
