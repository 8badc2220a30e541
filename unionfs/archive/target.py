"""The directory that an archive is unpacked into: finding parents, making room, removing what is older.

Every path is opened without following links (:func:`unionfs.host.files.open_confined`). A link on the way is read
here and followed inside the target, as a process with its root there would follow it.

A parent directory is opened once and kept while entries for it come, and let go as soon as anything is removed
that could have been part of its path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from unionfs.archive.overlay_view import Node, Place, PlainView, View
from unionfs.archive.tar_format import show
from unionfs.errors import ArchiveError
from unionfs.host.files import DIRECTORY_FLAGS, RootedDir, join, open_confined, remove_tree, walk_tree
from unionfs.host.syscalls import has_openat2
from unionfs.overlay.copying import copy_data, copy_mode, copy_owner, copy_times, copy_xattrs
from unionfs.overlay.format import META_MARK, OverlayXattrs
from unionfs.overlay.rules import entry_path

CACHED = 32
_PARENT_MODE = 0o755
NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ASIDE = META_MARK + b"aside"  # no entry of an archive has such a name
ACCESS_ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"

# path_resolution(7): so many links in one path. More components than anybody needs are a means to waste time.
MAX_LINKS = 40
MAX_LINK_STEPS = 256
_PATH_MAX = 4096

NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class Parent(NamedTuple):
    """An open directory of the target.

    Attributes:
        path: where it is, free of links.
        inherits: whether what is made in it gets an ACL from it.
        stat: as it was when it was opened.
    """

    fd: int
    inode: int
    path: bytes
    inherits: bool
    stat: os.stat_result


class _Made:
    """What comes from this archive: the directories that are new, and the names in others."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._names: dict[int, set[bytes]] = {}
        self._copies: dict[int, set[bytes]] = {}

    def add(self, directory: int, name: bytes) -> None:
        """``name`` in the directory of this inode number is an entry's."""
        self._copies.get(directory, set()).discard(name)
        if directory not in self._new:
            self._names.setdefault(directory, set()).add(name)

    def add_copy(self, directory: int, name: bytes) -> None:
        """``name`` is there only because something beneath it or another name of it is needed."""
        self._copies.setdefault(directory, set()).add(name)

    def add_directory(self, inode: int, *, new: bool) -> None:
        """A directory was made, in which nothing is known; ``new``: all that will be in it is the archive's."""
        self._names.pop(inode, None)
        self._copies.pop(inode, None)
        (self._new.add if new else self._new.discard)(inode)

    def discard(self, directory: int, name: bytes) -> None:
        """``name`` is gone."""
        self._names.get(directory, set()).discard(name)
        self._copies.get(directory, set()).discard(name)

    def is_new(self, inode: int) -> bool:
        """Whether the directory was made for the archive."""
        return inode in self._new

    def has(self, directory: int, name: bytes) -> bool:
        """Whether ``name`` is the archive's."""
        if directory in self._new:
            return name not in self._copies.get(directory, ())
        return name in self._names.get(directory, ())


class Target:
    """The target directory of an unpack that takes it for a complete tree.

    Args:
        root: the directory.
        parents_owner: (uid, gid) of directories made because an entry needs them.

    Raises:
        ArchiveError: there is no openat2(2) here.
    """

    def __init__(self, root: RootedDir, parents_owner: tuple[int, int]) -> None:
        if not has_openat2():
            raise ArchiveError(
                "unpacking needs openat2(2), which the kernel or a seccomp filter refuses; "
                "use Linux 5.6 or later and a current container runtime"
            )
        self.root = root
        self._parents_owner = parents_owner
        self._view: View = PlainView(root)
        self._space: OverlayXattrs | None = None
        self._parents: OrderedDict[bytes, Parent] = OrderedDict()
        self._retired: list[int] = []
        self._made = _Made()
        self._cleaned: set[int] = set()  # directories that hold nothing older than the archive
        self._times: dict[tuple[int, int], tuple[bytes, int, int]] = {}
        self._has_lowers = False
        self._link_on_way = False  # where the last path that was not found has a link
        self._following = False
        self._links: set[bytes] = set()  # those that led to the parents that are kept
        self._top = self._opened(os.dup(root.fd), b"")

    def close(self) -> None:
        """Close every descriptor."""
        self._forget()
        self._close_retired()
        os.close(self._top.fd)

    def remember(self, parent: Parent, name: bytes) -> None:
        """Note that ``name`` in ``parent`` comes from this archive."""
        self._made.add(parent.inode, name)
        if self._links and join(parent.path, name) in self._links:
            self._forget()  # it hides a link of a layer below

    # Parents

    def parent(self, parts: Sequence[bytes]) -> Parent:
        """The directory at ``parts``, made with mode 0755 where it is missing.

        Links on the way are followed inside the target, also to what is missing. It stays open until the next removal
        or until enough others were asked for, so it serves one entry.

        Raises:
            OSError: something on the way is not a directory.
        """
        self._close_retired()
        return self._to_change(self._found(parts) or self._reached(parts))

    def _found(self, parts: Sequence[bytes]) -> Parent | None:
        """The directory at ``parts`` if it is there and no link is on the way."""
        if not parts:
            return self._top
        path = b"/".join(parts)
        known = self._parents.get(path)
        if known is not None:
            self._parents.move_to_end(path)
            return known
        try:
            fd = open_confined(self.root.fd, path, DIRECTORY_FLAGS)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            self._link_on_way = error.errno != errno.ENOENT  # ENOTDIR: at the very end of it
            return None
        return self._keep(path, self._opened(fd, path))

    def _reached(self, parts: Sequence[bytes]) -> Parent:
        """The directory at ``parts``, found and made step by step."""
        path = b"/".join(parts)
        above = [known for known in self._parents if path.startswith(known + b"/")]
        done = max(above, key=len, default=b"")
        base = self._parents[done] if done else self._top
        for name in path[len(done) :].lstrip(b"/").split(b"/"):
            done = join(done, name)
            base = self._keep(done, self._step(base, name))
        return base

    def find(self, parts: Sequence[bytes]) -> Parent | None:
        """The directory at ``parts`` if the target has it, links followed."""
        self._close_retired()
        found = self._found(parts)
        if found is None and (self._link_on_way or self._has_lowers):
            names, node = self.resolve(parts)
            found = self._found(names) if node is not None and names != list(parts) else None
        return self._to_change(found) if found is not None else None

    def _step(self, above: Parent, name: bytes) -> Parent:
        """The directory ``name`` in ``above``, made if it is missing."""
        path = join(above.path, name)
        try:
            return self._opened(os.open(name, DIRECTORY_FLAGS, dir_fd=above.fd), path)
        except FileNotFoundError:
            return self._missing(above, name)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
        info = os.lstat(name, dir_fd=above.fd)
        if stat.S_ISLNK(info.st_mode):
            return self._linked(above, name)
        return self._blocked(above, name, info)

    def _linked(self, above: Parent, name: bytes) -> Parent:
        if self._following:  # names that were just found to be none are links now: somebody plays
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(join(above.path, name)))
        names, _ = self.resolve([*above.path.split(b"/"), name])
        self._following = True
        try:
            found = self._found(names) or self._reached(names)
        finally:
            self._following = False
        return found._replace(fd=os.dup(found.fd))  # it is kept under two names

    def _missing(self, above: Parent, name: bytes) -> Parent:
        self._to_change(above)
        os.mkdir(name, 0o700, dir_fd=above.fd)
        self.remember(above, name)
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=above.fd)
        try:
            self._new_directory(fd, new=True)
            os.fchown(fd, *self._parents_owner)
            if above.inherits:
                drop_acls(fd)
            os.fchmod(fd, _PARENT_MODE)
        except BaseException:
            os.close(fd)
            raise
        return self._opened(fd, join(above.path, name))

    def _blocked(self, above: Parent, name: bytes, info: os.stat_result) -> Parent:
        raise no_directory(join(above.path, name))

    def resolve(self, parts: Sequence[bytes]) -> tuple[list[bytes], Node | None]:
        """The names that ``parts`` lead to when links are followed inside the target, and the directory there, if any.

        Raises:
            OSError: something on the way is no directory; there are too many links.
        """
        names: list[bytes] = []
        nodes: list[Node | None] = [self._view.root()]
        todo = list(reversed(parts))
        is_long = sum(map(len, parts)) + len(parts) > _PATH_MAX  # nobody follows links in these, nor does the kernel
        links = steps = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if names:
                    names.pop()
                    nodes.pop()
                continue
            node = self._look(nodes[-1], name)
            if node is None or node.is_dir:
                names.append(name)
                if is_long:
                    nodes.clear()
                nodes.append(node)
                continue
            if not stat.S_ISLNK(node.stat.st_mode):
                raise no_directory(b"/".join((*names, name)))
            self._links.add(b"/".join((*names, name)))
            inner = _read_link(node).split(b"/")
            links += 1
            steps += len(inner)
            if is_long or links > MAX_LINKS or steps > MAX_LINK_STEPS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(b"/".join((*names, name))))
            if not inner[0]:
                names.clear()
                del nodes[1:]
            todo.extend(reversed(inner))
        return names, nodes[-1]

    def _look(self, node: Node | None, name: bytes) -> Node | None:
        if node is None:
            return None
        with self._view.open(node) as directory:
            return directory.lookup(name)

    def _opened(self, fd: int, path: bytes) -> Parent:
        info = os.fstat(fd)
        return Parent(fd, info.st_ino, path, _has_default_acl(fd), info)

    def _to_change(self, parent: Parent) -> Parent:
        """``parent``, in which something is about to be made or removed: without an entry, it keeps its time."""
        info = parent.stat
        if parent.path and not self._made.is_new(info.st_ino):
            self._times.setdefault((info.st_dev, info.st_ino), (parent.path, info.st_atime_ns, info.st_mtime_ns))
        return parent

    def _new_directory(self, fd: int, *, new: bool) -> None:
        info = os.fstat(fd)
        self._made.add_directory(info.st_ino, new=new)
        self._times.pop((info.st_dev, info.st_ino), None)
        self._cleaned.discard(info.st_ino)

    def _keep(self, path: bytes, parent: Parent) -> Parent:
        self._parents[path] = parent
        if len(self._parents) > CACHED:
            os.close(self._parents.popitem(last=False)[1].fd)
        return parent

    def _forget(self) -> None:
        # Not closed at once: the entry at hand may be using one.
        self._retired.extend(parent.fd for parent in self._parents.values())
        self._parents.clear()
        self._links.clear()
        self.root.forget()

    def _close_retired(self) -> None:
        for fd in self._retired:
            os.close(fd)
        self._retired.clear()

    def default_acl_changed(self) -> None:
        """What is made in directories from now on may inherit something else."""
        self._forget()
        self._top = self._top._replace(inherits=_has_default_acl(self._top.fd))

    # Times

    def set_times(self, fd: int, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        """Remember the times for the directory ``fd``: what is made in it changes them until :meth:`set_all_times`."""
        info = os.fstat(fd)
        self._times[info.st_dev, info.st_ino] = path, atime_ns, mtime_ns

    def set_all_times(self) -> None:
        """Give the directories their times."""
        self._forget()
        for identity, (path, atime_ns, mtime_ns) in self._times.items():
            try:
                fd = self.root.open_dir(path)
            except OSError:
                continue  # a later entry removed it
            try:
                info = os.fstat(fd)
                if (info.st_dev, info.st_ino) == identity:
                    os.utime(fd, ns=(atime_ns, mtime_ns))
            except PermissionError:
                pass  # somebody else's, in which we may write
            finally:
                os.close(fd)

    # Making and removing

    def make_dir(self, parent: Parent, name: bytes) -> tuple[int, bool]:
        """A descriptor of the directory ``name``, and whether it is new (of mode 0700). Nothing else stays there."""
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
                self.remember(parent, name)
                return fd, False
            fd = os.open(name, DIRECTORY_FLAGS, dir_fd=parent.fd)
            try:
                self._new_directory(fd, new=True)
                self.remember(parent, name)
                if replaced:
                    self._replaced(fd, join(parent.path, name))
            except BaseException:
                os.close(fd)
                raise
            return fd, True

    def _replaced(self, fd: int, path: bytes) -> None:
        """The directory ``fd`` took the place of something else."""

    def link_source(self, parts: Sequence[bytes]) -> Parent:
        """The directory of what a hard link names; it serves until the next call.

        Raises:
            FileNotFoundError: it is not there.
            IsADirectoryError: it is a directory.
        """
        parent = self.find(parts[:-1])
        if parent is None:
            raise nothing_at(parts)
        if stat.S_ISDIR(os.lstat(parts[-1], dir_fd=parent.fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fsdecode(b"/".join(parts)))
        return parent

    def separate(self, parent: Parent, name: bytes) -> None:
        """Make ``name`` a file of its own if it has other names and none is this archive's.

        It is about to be changed, which in a layer above would not change the others.
        """
        info = os.lstat(name, dir_fd=parent.fd)
        if info.st_nlink < 2 or self._made.has(parent.inode, name):
            return
        os.rename(name, _ASIDE, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        place = Place(self.root, join(parent.path, _ASIDE))
        self._copy_file(parent, name, Node(info, place, place, (), None))
        os.unlink(_ASIDE, dir_fd=parent.fd)

    def _copy_file(self, parent: Parent, name: bytes, node: Node) -> None:
        """Make ``name`` a copy of anything but a directory."""
        kind = stat.S_IFMT(node.stat.st_mode)
        above, _, base = node.place.rel.rpartition(b"/")
        source = node.place.layer.open(above, os.O_PATH | os.O_DIRECTORY)
        try:
            if kind == stat.S_IFREG:
                self._copy_contents(parent, name, node)
            elif kind == stat.S_IFLNK:
                os.symlink(os.readlink(base, dir_fd=source), name, dir_fd=parent.fd)
            else:
                os.mknod(name, kind | 0o600, node.stat.st_rdev, dir_fd=parent.fd)
            self._made.add_copy(parent.inode, name)
            target = entry_path(parent.fd, name)
            if parent.inherits and kind != stat.S_IFLNK:
                drop_acls(target)
            copy_owner(parent.fd, name, node.stat)
            copy_xattrs(entry_path(source, base), target, self._space)
            copy_mode(parent.fd, name, node.stat)
            copy_times(parent.fd, name, node.stat)
        finally:
            os.close(source)

    def _copy_contents(self, parent: Parent, name: bytes, node: Node) -> None:
        if node.data is None:
            raise ArchiveError(
                f"{show(join(parent.path, name))}: is a metadata-only copy whose data is in none of the layers; "
                "give all the lower layers it was made over"
            )
        source = node.data.layer.open_file(node.data.rel)
        try:
            fd = os.open(name, NEW_FILE_FLAGS, 0o600, dir_fd=parent.fd)
            try:
                copy_data(source, fd, os.fstat(source).st_size)
            finally:
                os.close(fd)
        finally:
            os.close(source)

    def remove(self, parent: Parent, name: bytes) -> None:
        """Remove ``name`` and all beneath it; nothing there is fine. Links are removed, not followed."""
        self._made.discard(parent.inode, name)
        try:
            info = os.lstat(name, dir_fd=parent.fd)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(info.st_mode) or stat.S_ISLNK(info.st_mode):
            self._forget()
        remove_tree(parent.fd, name)

    # Whiteouts

    def white_out(self, parts: Sequence[bytes], name: bytes, owner: Callable[[], tuple[int, int]]) -> None:
        """Hide what ``name`` in the directory at ``parts`` was before this archive.

        Args:
            parts: if there is no such directory, there is nothing to hide.
            name: what is hidden. What this archive put there or beneath it stays, whichever came first: OCI image-spec,
                layer.md, "Whiteouts".
            owner: gives (uid, gid) of what marks the hiding.
        """
        parent = self._existing(parts)
        if parent is not None:
            self._remove_older(parent, name)

    def hide_all(self, parts: Sequence[bytes]) -> None:
        """Hide everything that the directory at ``parts`` had before this archive."""
        parent = self._existing(parts)
        if parent is not None:
            self._clean(parent.fd)

    def _existing(self, parts: Sequence[bytes]) -> Parent | None:
        try:
            return self.find(parts)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            return None

    def _remove_older(self, parent: Parent, name: bytes) -> os.stat_result | None:
        """Remove ``name`` as far as it is not this archive's; lstat of what stays."""
        try:
            info = os.lstat(name, dir_fd=parent.fd)
        except FileNotFoundError:
            return None
        ours = self._made.has(parent.inode, name) and not self._is_whiteout(info)
        if not stat.S_ISDIR(info.st_mode):
            if ours:
                return info
            self.remove(parent, name)
            return None
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=parent.fd)
        try:
            self._clean(fd)
        finally:
            os.close(fd)
        if not ours and _rmdir(parent.fd, name):
            self._made.discard(parent.inode, name)
            return None
        return info

    def _clean(self, fd: int) -> None:
        """Remove everything beneath ``fd`` that is not this archive's. A directory stays if something in it does."""
        self._forget()
        walk_tree(fd, self._remove_older_files, self._remove_older_directory)

    def _remove_older_files(self, fd: int) -> list[bytes]:
        inode = os.fstat(fd).st_ino
        if inode in self._cleaned:
            return []
        self._cleaned.add(inode)
        directories = []
        for name in map(os.fsencode, os.listdir(fd)):
            info = os.lstat(name, dir_fd=fd)
            if stat.S_ISDIR(info.st_mode):
                directories.append(name)
            elif self._is_whiteout(info) or not self._made.has(inode, name):
                os.unlink(name, dir_fd=fd)
                self._made.discard(inode, name)
        return directories

    def _remove_older_directory(self, fd: int, name: bytes) -> None:
        inode = os.fstat(fd).st_ino
        if not self._made.has(inode, name) and _rmdir(fd, name):
            self._made.discard(inode, name)

    def _is_whiteout(self, info: os.stat_result) -> bool:
        return False


def drop_acls(path: bytes | int) -> None:
    """Remove what a new object inherited from its directory."""
    for name in (ACCESS_ACL, DEFAULT_ACL):
        try:
            os.removexattr(path, name, follow_symlinks=isinstance(path, int))
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EACCES):
                raise


def _has_default_acl(fd: int) -> bool:
    try:
        os.getxattr(fd, DEFAULT_ACL)
    except OSError:
        return False
    return True


def _read_link(node: Node) -> bytes:
    above, _, name = node.place.rel.rpartition(b"/")
    fd = node.place.layer.open(above, os.O_PATH | os.O_DIRECTORY)
    try:
        return os.readlink(name, dir_fd=fd)
    finally:
        os.close(fd)


def _rmdir(dir_fd: int, name: bytes) -> bool:
    """Whether the directory was removed, since there is nothing in it."""
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def no_directory(path: bytes) -> NotADirectoryError:
    return NotADirectoryError(errno.ENOTDIR, f"{show(path)} is not a directory")


def nothing_at(parts: Sequence[bytes]) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(b"/".join(parts)))
