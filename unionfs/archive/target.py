"""The directory that an archive is unpacked into: finding parents, making room, removing trees.

A parent directory is opened once and kept while entries for it come, and let go as soon as anything is removed
that could have been part of its path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from unionfs.archive.removal import remove_all_but, remove_tree
from unionfs.archive.rooted import (
    DIRECTORY_FLAGS,
    HAVE_OPENAT2,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RootedDir,
    openat2,
)
from unionfs.archive.tar_format import show
from unionfs.errors import ArchiveError

_CACHED_PARENTS = 32
_CHUNK_BYTES = 3500  # of a path handed to the kernel at once; PATH_MAX is 4096
_PARENT_MODE = 0o755


class Parent(NamedTuple):
    """An open directory of the target."""

    fd: int
    inode: int


class Target:
    """The target directory of an unpack.

    Args:
        root: the directory.
        parents_owner: (uid, gid) of directories made because an entry needs them.
        remember: keep a note of what was made, which :meth:`remove_older` needs.
        opaque_xattr: for an overlay layer directory, the name of the xattr that marks an opaque directory.

    Raises:
        ArchiveError: there is no openat2(2) here.
    """

    def __init__(
        self, root: RootedDir, parents_owner: tuple[int, int], *, remember: bool, opaque_xattr: str | None = None
    ) -> None:
        if not HAVE_OPENAT2:
            raise ArchiveError(
                "unpacking needs openat2(2), which the kernel or a seccomp filter refuses; "
                "use Linux 5.6 or later and a current container runtime"
            )
        self.root = root
        self._parents_owner = parents_owner
        self._cache: OrderedDict[bytes, Parent] = OrderedDict()
        self._retired: list[int] = []
        self._opaque_xattr = opaque_xattr
        self._made: set[tuple[int, bytes]] | None = set() if remember else None
        self._top = Parent(os.dup(root.fd), os.fstat(root.fd).st_ino)

    def close(self) -> None:
        """Close every descriptor."""
        self._forget_parents()
        self._close_retired()
        os.close(self._top.fd)

    def remember(self, parent: Parent, name: bytes) -> None:
        """Note that ``name`` in ``parent`` comes from this archive."""
        if self._made is not None:
            self._made.add((parent.inode, name))

    # Parents

    def parent(self, parts: Sequence[bytes]) -> Parent:
        """The directory at ``parts``, made with mode 0755 where it is missing.

        Symlinks on the way are followed inside the target. It stays open until the next removal or until enough
        others were asked for, so it serves one entry.

        Raises:
            OSError: something on the way is not a directory.
        """
        self._close_retired()
        if not parts:
            return self._top
        path = b"/".join(parts)
        found = self._cache.get(path)
        if found is not None:
            self._cache.move_to_end(path)
            return found
        fd = self._open_or_make(parts)
        parent = Parent(fd, os.fstat(fd).st_ino)
        self._cache[path] = parent
        if len(self._cache) > _CACHED_PARENTS:
            os.close(self._cache.popitem(last=False)[1].fd)
        return parent

    @contextmanager
    def existing_parent(self, parts: Sequence[bytes]) -> Iterator[Parent]:
        """The directory at ``parts``, which must be there; links are followed inside the target."""
        fd = self._resolve(parts)
        try:
            yield Parent(fd, os.fstat(fd).st_ino)
        finally:
            os.close(fd)

    def open_existing_dir(self, path: bytes) -> int:
        """A readable descriptor of the directory ``path``, itself not a symlink."""
        parts = [part for part in path.split(b"/") if part]
        if not parts:
            return os.open(b".", DIRECTORY_FLAGS, dir_fd=self.root.fd)
        with self.existing_parent(parts[:-1]) as parent:
            return os.open(parts[-1], DIRECTORY_FLAGS, dir_fd=parent.fd)

    def _resolve(self, parts: Sequence[bytes]) -> int:
        if not parts:
            return os.dup(self.root.fd)
        path = b"/".join(parts)
        if len(path) > _CHUNK_BYTES:
            return self._resolve_long(parts)
        return openat2(self.root.fd, path, DIRECTORY_FLAGS & ~os.O_NOFOLLOW, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)

    def _resolve_long(self, parts: Sequence[bytes]) -> int:
        """A path longer than the kernel takes at once, one component at a time; symlinks do not count there."""
        fd = os.dup(self.root.fd)
        try:
            for part in parts:
                inner = os.open(part, DIRECTORY_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = inner
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open_or_make(self, parts: Sequence[bytes]) -> int:
        try:
            return self._resolve(parts)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
        # One step at a time from the top, so that each part is made inside of the one that is there already.
        fd = os.dup(self.root.fd)
        try:
            for i in range(len(parts)):
                inner = self._step(fd, parts, i)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _step(self, above: int, parts: Sequence[bytes], i: int) -> int:
        """A descriptor of the directory ``parts[i]`` in ``above``, which is the one at the parts before it."""
        name = parts[i]
        try:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=above)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        opaque = False
        try:
            info = os.lstat(name, dir_fd=above)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISLNK(info.st_mode):
                return self._through_link(parts[: i + 1])
            if self._opaque_xattr is None or not stat.S_ISCHR(info.st_mode) or info.st_rdev != 0:
                raise NotADirectoryError(errno.ENOTDIR, f"{show(b'/'.join(parts[: i + 1]))} is not a directory")
            # The archive deleted the name first: what it puts there now must not merge with what is below.
            os.unlink(name, dir_fd=above)
            opaque = True
        os.mkdir(name, 0o700, dir_fd=above)
        self.remember(Parent(above, os.fstat(above).st_ino), name)
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=above)
        try:
            os.fchown(fd, *self._parents_owner)
            if opaque:
                self._make_opaque(fd)
            os.fchmod(fd, _PARENT_MODE)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _through_link(self, parts: Sequence[bytes]) -> int:
        try:
            return self._resolve(parts)
        except FileNotFoundError:
            raise ArchiveError(
                f"{show(b'/'.join(parts))}: is a symlink to nowhere where a directory is needed; "
                "remove it or make the archive again"
            ) from None

    def _forget_parents(self) -> None:
        # Not closed at once: the entry at hand may be using one.
        self._retired.extend(parent.fd for parent in self._cache.values())
        self._cache.clear()

    def _close_retired(self) -> None:
        for fd in self._retired:
            os.close(fd)
        self._retired.clear()

    # Making and removing

    def make_dir(self, parent: Parent, name: bytes) -> int:
        """A descriptor of the directory ``name``, made (mode 0700) unless it is there; nothing else stays there.

        In an overlay layer, a directory that takes the place of something else hides what is below it.
        """
        replaced = False
        while True:
            try:
                os.mkdir(name, 0o700, dir_fd=parent.fd)
            except FileExistsError:
                try:
                    fd = os.open(name, DIRECTORY_FLAGS, dir_fd=parent.fd)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP) or replaced:
                        raise
                    self.remove(parent, name)
                    replaced = True
                    continue
            else:
                fd = os.open(name, DIRECTORY_FLAGS, dir_fd=parent.fd)
            break
        self.remember(parent, name)
        if replaced and self._opaque_xattr is not None:
            try:
                self._make_opaque(fd)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _make_opaque(self, fd: int) -> None:
        assert self._opaque_xattr is not None
        os.setxattr(fd, self._opaque_xattr, b"y")

    def remove(self, parent: Parent, name: bytes) -> None:
        """Remove ``name`` and all beneath it; nothing there is fine. Links are removed, not followed."""
        if self._made is not None:
            self._made.discard((parent.inode, name))
        try:
            info = os.lstat(name, dir_fd=parent.fd)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(info.st_mode):
            self._forget_parents()
            remove_tree(parent.fd, name)
            return
        if stat.S_ISLNK(info.st_mode):
            self._forget_parents()
        os.unlink(name, dir_fd=parent.fd)

    def remove_older(self, parent: Parent) -> None:
        """Remove everything in ``parent`` that was not made from this archive."""
        assert self._made is not None
        self._forget_parents()
        remove_all_but(parent.fd, self._made)
