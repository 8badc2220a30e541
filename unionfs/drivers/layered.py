"""What the layered drivers share: everything but the mount itself.

A :class:`Mounter` mounts a :class:`Stack`; the rest (layout, counts, differences) is the same for a file system of
ours and for the kernel's. Differences come from a layer's own directory, so they cost what changed and not what the
image holds, and they are exact (contract rows 44-54, 79).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

from unionfs.archive.changes import Change, changes_of_upper, size_of
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.pack import PackOptions, pack_changes
from unionfs.archive.sizes import tree_size
from unionfs.archive.stream import held_stream
from unionfs.archive.tar_reader import Readable
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.drivers import home
from unionfs.drivers.contract import Checker, CreateOptions, FileGetCloser, check_layer_id
from unionfs.drivers.files import LayerFiles
from unionfs.drivers.naive_diff import NaiveDiff
from unionfs.drivers.overlay_home import LayerPaths, OverlayHome
from unionfs.drivers.storage_options import layer_options
from unionfs.errors import LayerBusyError, OptionError
from unionfs.fuse_ops.session.option_text import parse_size
from unionfs.host import mounts, syscalls, unmount
from unionfs.host.locks import NamedLocks
from unionfs.host.mounts import is_dead, mounts_inside
from unionfs.overlay.format import TRUSTED, USER, may_use_trusted
from unionfs.overlay.rules import Spaces

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What to mount, and where.

    Attributes:
        home: the driver's home, an absolute path.
        target: the mount point.
        lowers: directories, top first, as absolute paths.
        upper: takes the changes; None for a read-only mount.
        work: the work directory; None for a read-only mount.
        mount_label: SELinux context for all files; empty for none.
        size_bytes: limit for what ``upper`` holds; 0 for none.
    """

    home: str
    target: str
    lowers: tuple[str, ...]
    upper: str | None = None
    work: str | None = None
    mount_label: str = ""
    size_bytes: int = 0


class Mounter(Protocol):
    """Mounts and unmounts unions."""

    def mount(self, stack: Stack) -> None:
        """Mount, and return when the mount can be used; raises :class:`unionfs.errors.MountError`."""

    def take_down(self, target: str, *, lazy: bool) -> None:
        """Unmount ``target``, remove the mount point, and wait for what served it.

        With ``lazy`` it is taken out of sight at once, and what serves it ends with its last user. So it does when it
        is in use in another mount namespace.

        Raises:
            OSError: it cannot be unmounted; EBUSY when it is in use.
        """

    def settle(self, target: str) -> None:
        """Have everything written to the mount so far arrive in its upper directory."""


class SizeLimits(Protocol):
    """Limits what the directories of layers hold."""

    def check(self) -> None:
        """Raise :class:`unionfs.errors.QuotaNotSupportedError` if no limit can be enforced."""

    def apply(self, directory: str, size_bytes: int) -> None:
        """Limit what the new layer's ``directory``, still empty, may hold."""

    def mount_limit(self, directory: str) -> int:
        """The limit of the layer in ``directory`` that its mount has to enforce itself, in bytes; 0 for none."""


class LayeredDriver:
    """A driver over an :class:`OverlayHome`.

    Args:
        name: the driver's name.
        layers: the home.
        mounter: mounts its layers.
        limits: enforces sizes.
        id_mapping: streams carry the container's ids, layers the host's.
        default_size_bytes: limit for container layers without one of their own; 0 for none.
        native_diff: take differences from a layer's own directory. False where the kernel leaves it incomplete.
        read_only: the home is only looked at, so nothing in it is put right.
    """

    def __init__(
        self,
        name: str,
        layers: OverlayHome,
        mounter: Mounter,
        limits: SizeLimits,
        id_mapping: IdMapping,
        *,
        default_size_bytes: int = 0,
        native_diff: bool = True,
        read_only: bool = False,
    ) -> None:
        self._name = name
        self._layers = layers
        self._mounter = mounter
        self._limits = limits
        self._default_size = default_size_bytes
        self._native_diff = native_diff
        self._checker = MountChecker()
        self._counter = RefCounter(self._checker)
        self._locks = NamedLocks()
        self._naive = NaiveDiff(self, id_mapping)
        self._spaces: Spaces = (TRUSTED if may_use_trusted() else USER,)
        self._pack = PackOptions(to_container=id_mapping.to_container, spaces=self._spaces)
        self._unpack = UnpackOptions(to_host=id_mapping.to_host, parents_owner=layers.owner)
        if not read_only:
            layers.recover()
            self._detach_dead()

    @property
    def name(self) -> str:
        """See :attr:`ProtoDriver.name`."""
        return self._name

    # Making and removing

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create`."""
        given = layer_options(options.storage_options, ("size",), self._name) if options is not None else {}
        if "size" in given:
            raise OptionError("--storage-opt size is only supported for ReadWrite Layers; leave it out")
        self._create(layer_id, parent, 0)

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""
        given = layer_options(options.storage_options, ("size",), self._name) if options is not None else {}
        size = self._default_size
        if "size" in given:
            size = parse_size(given["size"])
        if size:
            self._limits.check()
        self._create(layer_id, parent, size)

    def _create(self, layer_id: str, parent: str, size_bytes: int) -> None:
        check_layer_id(layer_id, "create")
        if parent:
            check_layer_id(parent, "create a layer on")

        def limit(directory: str) -> None:
            if size_bytes:
                self._limits.apply(directory, size_bytes)

        with self._locks.hold(layer_id, parent):
            self._layers.create(layer_id, parent, limit)

    def remove(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        check_layer_id(layer_id, "remove")
        with self._locks.hold(layer_id):
            if self._layers.exists(layer_id):
                self._layers.check_childless(layer_id, "remove")
                merged = self._layers.paths(layer_id).merged
                self._unmount_for_good(layer_id, merged)
                self._counter.forget(merged)
            home.delete(self._layers.set_aside(layer_id))

    def _unmount_for_good(self, layer_id: str, merged: str) -> None:
        """Unmount whatever is at ``merged`` and inside, also when it was mounted several times."""
        for point in [*mounts_inside(merged), merged]:
            reason = "more is mounted there each time"
            for _ in home.attempts():
                if mounts.top_mount(point) is None:
                    break
                try:
                    if point == merged:
                        self._mounter.take_down(point, lazy=is_dead(point))
                    else:
                        unmount.unmount(point, lazy=is_dead(point))
                except OSError as error:
                    reason = str(error.strerror)
            if mounts.top_mount(point) is not None:
                raise LayerBusyError(
                    f"cannot remove layer {layer_id}: {point} cannot be unmounted: {reason}{home.used_by(merged)}; "
                    "end what uses it and try again"
                )

    # Mounting

    def get(self, layer_id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`. A base layer is its own directory and is neither mounted nor counted."""
        check_layer_id(layer_id, "get")
        with self._locks.hold(layer_id):
            paths = self._layers.existing(layer_id, "get")
            if not self._layers.has_parent(layer_id):
                return paths.diff
            # A mount that died or was taken away since is made anew, whoever else has it.
            if self._counter.increment(paths.merged) > 1 and self._checker.is_mounted(paths.merged):
                return paths.merged
            try:
                self._mount(layer_id, paths, mount_label)
            except BaseException:
                if self._counter.decrement(paths.merged) == 0:
                    self._take_down(paths.merged)
                raise
            return paths.merged

    def put(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        check_layer_id(layer_id, "put")
        with self._locks.hold(layer_id):
            if not self._layers.exists(layer_id) or not self._layers.has_parent(layer_id):
                return
            merged = self._layers.paths(layer_id).merged
            if self._counter.decrement(merged) == 0:
                self._take_down(merged)

    def _mount(self, layer_id: str, paths: LayerPaths, mount_label: str) -> None:
        if mounts.top_mount(paths.merged) is not None:
            self._take_down(paths.merged)  # it is dead, or it would be handed out
        with suppress(FileExistsError):
            os.mkdir(paths.merged, 0o700)
            os.chown(paths.merged, *self._layers.owner)
        lowers = self._layers.lower_dirs(layer_id)
        if self._layers.is_committed(layer_id):
            # Its children rely on it not to change.
            stack = Stack(
                home=self._layers.root,
                target=paths.merged,
                lowers=(f"{self._layers.root}/l/{self._layers.link_name(layer_id)}", *lowers),
                mount_label=mount_label,
            )
            self._mounter.mount(stack)
            return
        if not os.path.isdir(paths.work):
            os.mkdir(paths.work, 0o700)
            os.chown(paths.work, *self._layers.owner)
        stack = Stack(
            home=self._layers.root,
            target=paths.merged,
            lowers=tuple(lowers),
            upper=paths.diff,
            work=paths.work,
            mount_label=mount_label,
            size_bytes=self._limits.mount_limit(paths.base),
        )
        self._mounter.mount(stack)
        with suppress(FileNotFoundError):
            # Made by the mount as the host's root; in a container with mapped ids the same directory is used again.
            os.chown(paths.work + "/work", *self._layers.owner)

    def _take_down(self, merged: str) -> None:
        """Unmount as far as possible and remove the mount point, which also takes it from other mount namespaces."""
        if mounts.top_mount(merged) is not None:
            try:
                self._mounter.take_down(merged, lazy=is_dead(merged))
            except OSError as error:
                _log.warning(
                    "%s: %s%s; it is out of sight and ends with its last user",
                    merged,
                    error.strerror,
                    home.used_by(merged),
                )
                self._detach(merged)
        with suppress(OSError):
            os.rmdir(merged)

    def _detach(self, merged: str) -> None:
        try:
            self._mounter.settle(merged)
            self._mounter.take_down(merged, lazy=True)
        except OSError as error:
            _log.warning("cannot unmount %s: %s", merged, error.strerror)

    def _detach_dead(self) -> None:
        """Remove mounts of an earlier process whose servers are gone; those that live are taken over when touched."""
        for point in mounts_inside(self._layers.root):
            if point.endswith("/merged") and is_dead(point):
                _log.warning("%s: its server is gone; unmounting it", point)
                self._take_down(point)

    def cleanup(self) -> None:
        """See :meth:`ProtoDriver.cleanup`."""
        for point in mounts_inside(self._layers.root):
            if os.path.basename(point) == "merged" and os.path.dirname(os.path.dirname(point)) == self._layers.root:
                with self._locks.hold(os.path.basename(os.path.dirname(point))):
                    self._take_down(point)
                    self._counter.forget(point)

    # Telling

    def exists(self, layer_id: str) -> bool:
        """See :meth:`ProtoDriver.exists`."""
        return self._layers.exists(layer_id)

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`."""
        raise NotImplementedError

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.get_metadata`."""
        paths = self._layers.existing(layer_id, "describe")
        facts = {"WorkDir": paths.work, "MergedDir": paths.merged, "UpperDir": paths.diff}
        lower = [self._layers.paths(parent).diff for parent in self._layers.lower_ids(layer_id)]
        return {"LowerDir": ":".join(lower)} | facts if lower else facts

    def layer_ids(self) -> list[str]:
        """See :meth:`ListingDriver.layer_ids`."""
        return self._layers.layer_ids()

    def sync(self, layer_id: str) -> None:
        """See :meth:`SyncingDriver.sync`."""
        paths = self._layers.existing(layer_id, "sync")
        self._settle(paths)
        fd = os.open(paths.diff, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    # Differences

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        """See :meth:`DiffDriver.diff`."""
        if not self._is_own_change(layer_id, parent, "diff"):
            return self._naive.diff(layer_id, parent)
        with ExitStack() as held:
            return held_stream(pack_changes(self._own_changes(layer_id), self._pack), held)

    def changes(self, layer_id: str, parent: str = "") -> list[Change]:
        """See :meth:`DiffDriver.changes`."""
        if not self._is_own_change(layer_id, parent, "list the changes of"):
            return self._naive.changes(layer_id, parent)
        return list(self._own_changes(layer_id))

    def diff_size(self, layer_id: str, parent: str = "") -> int:
        """See :meth:`DiffDriver.diff_size`."""
        if not self._is_own_change(layer_id, parent, "size"):
            return self._naive.diff_size(layer_id, parent)
        return size_of(self._own_changes(layer_id))

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        """See :meth:`DiffDriver.apply_diff`. The size is that of the layer's own directory, each file once."""
        check_layer_id(layer_id, "apply a diff to")
        with self._locks.hold(layer_id):
            paths = self._layers.existing(layer_id, "apply a diff to")
            self._layers.check_childless(layer_id, "apply a diff to")
            if self._is_own_change(layer_id, parent, "apply a diff to") and not self._is_mounted(paths):
                lowers = self._layers.lower_dirs(layer_id)
                # A base layer is mounted by nobody: in it, marks for what is below would be seen.
                mode = WhiteoutMode.OVERLAY if lowers else WhiteoutMode.DELETE
                unpack(stream, paths.diff, replace(self._unpack, whiteouts=mode, lowers=lowers))
                return tree_size(paths.diff)
        # Through the mount: who uses it is to see the changes.
        return self._naive.apply_diff(layer_id, parent, stream)

    def diff_getter(self, layer_id: str) -> FileGetCloser:
        """See :meth:`DiffGetterDriver.diff_getter`. Nothing is mounted unless a file's contents lie in a parent."""
        paths = self._layers.existing(layer_id, "read")
        return LayerFiles(paths.diff, lambda: self.get(layer_id), lambda: self.put(layer_id))

    def _is_own_change(self, layer_id: str, parent: str, doing: str) -> bool:
        """Whether the changes since ``parent`` are exactly what the layer's own directory holds."""
        self._layers.existing(layer_id, doing)
        if parent:
            self._layers.existing(parent, "compare with")
        return self._native_diff and self._layers.is_parent(layer_id, parent)

    def _own_changes(self, layer_id: str) -> Iterator[Change]:
        paths = self._layers.paths(layer_id)
        self._settle(paths)
        return changes_of_upper(paths.diff, self._layers.lower_dirs(layer_id), spaces=self._spaces)

    def _is_mounted(self, paths: LayerPaths) -> bool:
        return mounts.top_mount(paths.merged) is not None

    def _settle(self, paths: LayerPaths) -> None:
        if self._is_mounted(paths):
            with suppress(OSError):  # it may be unmounted at this moment, which writes everything too
                self._mounter.settle(paths.merged)


# Counts of how often a path was asked to be mounted, which survive a restart of the process while mounts live on. The
# rules are moby's RefCounter: on the first touch of a path the mount table is asked, and a path that is mounted starts
# at 1; an entry that falls to 0 is forgotten, so that the next touch asks again.


class MountChecker:
    """A :class:`Checker` that asks the kernel's mount table, and the file system whether its server still answers."""

    def is_mounted(self, path: str) -> bool:
        """See :meth:`Checker.is_mounted`; a mount whose server is gone does not count."""
        return mounts.top_mount(path) is not None and not is_dead(path)


class RefCounter:
    """Counts by mount path.

    Args:
        checker: asked once for each path that has no count.
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def increment(self, path: str) -> int:
        """Count one user more; the new count. The caller keeps others from the same path meanwhile."""
        return self._add(path, 1)

    def decrement(self, path: str) -> int:
        """Count one user less, never below 0; the new count."""
        return self._add(path, -1)

    def forget(self, path: str) -> None:
        """Drop the count of a path that is not mounted any more."""
        with self._lock:
            self._counts.pop(path, None)

    def paths(self) -> list[str]:
        """The paths with a count, sorted."""
        with self._lock:
            return sorted(self._counts)

    def _add(self, path: str, step: int) -> int:
        with self._lock:
            count = self._counts.get(path)
        if count is None:
            # Not under the lock: a FUSE server that takes its time must not hold up everybody.
            count = 1 if self._checker.is_mounted(path) else 0
        count = max(0, count + step)
        with self._lock:
            if count:
                self._counts[path] = count
            else:
                self._counts.pop(path, None)
        return count
