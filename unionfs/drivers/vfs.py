"""The ``vfs`` driver: every layer is a complete copy of its parent.

It needs nothing of the host and is what the other drivers are compared with. Layout and options are those of
Docker's driver of that name: trees in ``HOME/dir/ID``, mode 0755.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import home
from unionfs.drivers.contract import CreateOptions, check_layer_id, is_layer_id
from unionfs.drivers.files import TreeFiles
from unionfs.drivers.naive_diff import NaiveDiffDriver
from unionfs.drivers.quota import NoQuota, ProjectQuota, project_limits
from unionfs.drivers.storage_options import layer_options, parse_options
from unionfs.errors import DriverError, LayerNotFoundError, OptionError, QuotaNotSupportedError
from unionfs.fuse_ops.session.option_text import parse_size
from unionfs.host import syscalls
from unionfs.host.files import DIRECTORY_FLAGS, RootedDir, open_regular, open_tree, walk_tree
from unionfs.host.fs_magic import fs_magic, fs_name
from unionfs.host.locks import NamedLocks
from unionfs.host.selinux import label_directory
from unionfs.host.syscalls import in_user_namespace
from unionfs.overlay.copying import copy_attributes, copy_data, copy_times, copy_xattrs

_OPTIONS = ("size", "vfs.xattrs")
# Docker's name for "go on without xattrs", and our own.
_BEST_EFFORT = frozenset({"i_want_broken_containers", "best_effort"})


def init(root: str, options: Sequence[str], id_mapping: IdMapping) -> NaiveDiffDriver:
    """Make the driver with its home at ``root`` (an :data:`unionfs.drivers.contract.InitFunc`).

    Options: ``size`` (limit for container layers without one of their own), ``vfs.xattrs=best_effort`` (go on where
    the file system takes no xattrs).
    """
    given = parse_options(options, _OPTIONS, "vfs")
    xattrs = given.get("vfs.xattrs", "")
    if xattrs and xattrs not in _BEST_EFFORT:
        raise OptionError(f"vfs: option vfs.xattrs={xattrs} is unknown; write vfs.xattrs=best_effort or leave it out")
    proto = VfsDriver(root, id_mapping, size_bytes=parse_size(given.get("size", "0")), best_effort_xattrs=bool(xattrs))
    return NaiveDiffDriver(proto, id_mapping, best_effort_xattrs=bool(xattrs))


def look(root: str, options: Sequence[str], id_mapping: IdMapping) -> NaiveDiffDriver:
    """The driver to look at a home with (a :data:`unionfs.drivers.contract.LookFunc`); options are as for init."""
    parse_options(options, _OPTIONS, "vfs")
    proto = VfsDriver(root, id_mapping, size_bytes=0, best_effort_xattrs=False, read_only=True)
    return NaiveDiffDriver(proto, id_mapping)


class VfsDriver:
    """A :class:`ProtoDriver` that copies; see :func:`init`."""

    name = "vfs"

    def __init__(
        self,
        root: str,
        id_mapping: IdMapping,
        *,
        size_bytes: int,
        best_effort_xattrs: bool,
        read_only: bool = False,
    ) -> None:
        self._root = os.path.abspath(root)
        self._dirs = os.path.join(self._root, "dir")
        self._owner = home.root_owner(id_mapping)
        self._best_effort = best_effort_xattrs
        self._locks = NamedLocks()
        home.ensure_dir(self._root, 0o710, (os.geteuid(), self._owner[1]))
        home.ensure_dir(self._dirs, 0o710, (os.geteuid(), self._owner[1]))
        self._default_size = size_bytes
        self._limits: ProjectQuota | NoQuota = NoQuota(QuotaNotSupportedError("the store is opened to be read only"))
        if read_only:
            return
        home.sweep(self._dirs)
        self._limits = project_limits(self._root, self._dirs)
        if size_bytes:
            self._limits.check()

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create`."""
        if options is not None and options.storage_options:
            raise OptionError("--storage-opt is not supported for vfs on read-only layers; leave it out")
        self._create(layer_id, parent, options, 0)

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""
        size = self._default_size
        if options is not None:
            given = layer_options(options.storage_options, ("size",), "vfs")
            if "size" in given:
                size = parse_size(given["size"])
                self._limits.check()
        self._create(layer_id, parent, options, size)

    def remove(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        check_layer_id(layer_id, "remove")
        with self._locks.hold(layer_id):
            home.delete(home.set_aside(self._dirs, layer_id))

    def get(self, layer_id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`. The tree is always there, so nothing is mounted or counted."""
        return self._existing(layer_id, "get")

    def put(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        check_layer_id(layer_id, "put")

    def exists(self, layer_id: str) -> bool:
        """See :meth:`ProtoDriver.exists`."""
        return is_layer_id(layer_id) and os.path.isdir(self._path(layer_id))

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`."""
        facts = [("Backing Filesystem", fs_name(fs_magic(self._root)))]
        if self._best_effort:
            facts.append(("Extended file attributes", "best-effort"))
        return facts

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.get_metadata`."""
        return {"SourceDir": self._existing(layer_id, "describe")}

    def cleanup(self) -> None:
        """See :meth:`ProtoDriver.cleanup`."""

    def layer_ids(self) -> list[str]:
        """See :meth:`ListingDriver.layer_ids`."""
        return sorted(name for name in os.listdir(self._dirs) if is_layer_id(name))

    def sync(self, layer_id: str) -> None:
        """See :meth:`SyncingDriver.sync`."""
        path = self._existing(layer_id, "sync")
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    def diff_getter(self, layer_id: str) -> TreeFiles:
        """See :meth:`DiffGetterDriver.diff_getter`."""
        return TreeFiles(self._existing(layer_id, "read"))

    def _create(self, layer_id: str, parent: str, options: CreateOptions | None, size_bytes: int) -> None:
        check_layer_id(layer_id, "create")
        with self._locks.hold(layer_id):
            original = self._existing(parent, "create a layer on") if parent else None
            with home.new_dir(self._dirs, layer_id, 0o755, self._owner) as path:
                if size_bytes:
                    self._limits.apply(path, size_bytes)
                if options is not None:
                    label_directory(path, options.mount_label)
                if original is not None:
                    self._copy(original, path, layer_id)

    @staticmethod
    def _copy(original: str, path: str, layer_id: str) -> None:
        try:
            copy_tree(original, path)
        except OSError as error:
            where = os.fsdecode(error.filename or original)
            raise DriverError(
                f"cannot create layer {layer_id} as a copy of {original}: {where}: {error.strerror}; "
                "the copy was deleted, try again"
            ) from error

    def _existing(self, layer_id: str, doing: str) -> str:
        check_layer_id(layer_id, doing)
        path = self._path(layer_id)
        if not os.path.isdir(path):
            raise LayerNotFoundError(f"cannot {doing} layer {layer_id}: {path} does not exist; check the id")
        return path

    def _path(self, layer_id: str) -> str:
        return os.path.join(self._dirs, layer_id)


def copy_tree(source: str, target: str) -> None:
    """Make the empty directory ``target`` a copy of the directory ``source``, its root's attributes included.

    Raises:
        OSError: something cannot be read or made; the copy is incomplete then.
    """
    with open_tree(source) as original, RootedDir(target) as copy:
        _TreeCopy(original, copy).run()


class _TreeCopy:
    """One copy: goes through the source, and in the same steps through the target."""

    def __init__(self, source: int, target: RootedDir) -> None:
        self._source = source
        self._target = target
        self._here = os.dup(target.fd)  # where the walk is
        self._way: list[bytes] = []
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._skip_devices = in_user_namespace()

    def run(self) -> None:
        try:
            walk_tree(self._source, self._directory, self._leave, self._down)
            _finish(self._source, self._here)
        finally:
            os.close(self._here)

    def _down(self, source: int, name: bytes) -> int:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=source)
        try:
            self._move(name)
        except BaseException:
            os.close(fd)
            raise
        self._way.append(name)
        return fd

    def _leave(self, source: int, name: bytes) -> None:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=source)
        try:
            _finish(fd, self._here)
        finally:
            os.close(fd)
        self._move(b"..")  # nobody else writes to the target
        self._way.pop()

    def _move(self, name: bytes) -> None:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=self._here)
        os.close(self._here)
        self._here = fd

    def _directory(self, source: int) -> list[bytes]:
        """Copy what is in a directory, which exists in the target; the names of the directories in it."""
        directories = []
        for name in map(os.fsencode, os.listdir(source)):
            child = os.lstat(name, dir_fd=source)
            if stat.S_ISDIR(child.st_mode):
                os.mkdir(name, 0o700, dir_fd=self._here)
                directories.append(name)
            else:
                self._entry(source, self._here, name, child)
        return directories

    def _entry(self, source: int, target: int, name: bytes, info: os.stat_result) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and self._skip_devices:
            return  # a user namespace may not make them, and what is run in it could not use them
        if info.st_nlink > 1:
            first = self._first_names.get((info.st_dev, info.st_ino))
            if first is not None:
                self._link(first, target, name)
                return
            self._first_names[info.st_dev, info.st_ino] = b"/".join((*self._way, name))
        if kind == stat.S_IFREG:
            reading = open_regular(source, name)
            try:
                writing = os.open(
                    name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target
                )
                try:
                    copy_data(reading, writing, os.fstat(reading).st_size)
                finally:
                    os.close(writing)
            finally:
                os.close(reading)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, kind | 0o600, info.st_rdev, dir_fd=target)
        # Changing the owner clears setuid and capabilities, so it comes first.
        copy_attributes(target, name, info)
        copy_xattrs(_at(source, name), _at(target, name))
        copy_times(target, name, info)

    def _link(self, first: bytes, target: int, name: bytes) -> None:
        parent, _, base = first.rpartition(b"/")
        fd = self._target.open_dir(parent)
        try:
            os.link(base, name, src_dir_fd=fd, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(fd)


def _finish(source: int, target: int) -> None:
    """Give a directory the attributes of its original; its times come last, making what is in it changes them."""
    info = os.fstat(source)
    copy_attributes(target, b".", info)
    # All of them: in a complete tree, what looks like overlayfs' own belongs to a nested one.
    copy_xattrs(source, target)
    copy_times(target, b".", info)


def _at(dir_fd: int, name: bytes) -> bytes:
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)
