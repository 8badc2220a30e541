"""The ``vfs`` driver: every layer is a complete copy of its parent.

It needs nothing of the host and is what the other drivers are compared with. Layout and options are those of
Docker's driver of that name: trees in ``HOME/dir/ID``, mode 0755.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import home
from unionfs.drivers.contract import CreateOptions, check_layer_id, is_layer_id
from unionfs.drivers.files import TreeFiles
from unionfs.drivers.naive_diff import NaiveDiffDriver
from unionfs.drivers.quota import NoQuota, ProjectQuota, project_limits
from unionfs.drivers.storage_options import layer_options, parse_options, parse_size
from unionfs.drivers.tree_copy import copy_tree
from unionfs.errors import DriverError, LayerNotFoundError, OptionError, QuotaNotSupportedError
from unionfs.host import syscalls
from unionfs.host.fs_magic import fs_magic, fs_name
from unionfs.host.locks import NamedLocks
from unionfs.host.selinux import label_directory

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
