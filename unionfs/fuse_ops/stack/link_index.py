"""All names that files have in some layers, as far as they have several: asked for where nobody looked them up.

A layer does not say under which other names one finds a file. So all its directories are read, which is done once in
a mount, if at all, and by a thread: it knows no more than descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Final

from unionfs.host.files import open_directory, walk_tree
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
    above: list[bytes] = []

    def enter(fd: int) -> list[bytes]:
        directories = []
        redirect = rules.read_redirect(b"/proc/self/fd/%d/." % fd, spaces)
        if redirect is not None:
            redirects.add(redirect)
        prefix = b"/".join(above) + b"/" if above else b""
        with os.scandir(fd) as items:
            for item in items:
                name = os.fsencode(item.name)
                if item.is_dir(follow_symlinks=False):
                    directories.append(name)
                else:
                    see(item.inode(), prefix + name)
        return directories

    def open_below(fd: int, name: bytes) -> int:
        below = open_directory(fd, name)
        if below >= 0:
            above.append(name)
        return below

    walk_tree(top_fd, enter, lambda fd, name: above.pop(), open_below)
