"""The snapshotter: containerd's contract over the database, the directories and the mounts.

Order of writes, so that a crash at any point leaves the old state or the new one: files first, then the database.
What the database does not know is deleted at the next start; what it knows is complete.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from unionfs.drivers.union import check_filesystem, check_fuse
from unionfs.engines.snapshotter.contract import LABEL_MAX_BYTES, Info, Kind, Mount, Usage
from unionfs.engines.snapshotter.directories import SnapshotDirectories
from unionfs.engines.snapshotter.filters import compile_filters
from unionfs.engines.snapshotter.mounts import (
    REF_LABEL,
    MountRequirements,
    Plan,
    SnapshotUnions,
    plan_mounts,
    unpacked_layer,
    writable_union,
)
from unionfs.engines.snapshotter.store import Chain, Record, SnapshotStore, check_active
from unionfs.errors import (
    DriverError,
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotStateError,
    SnapshotterError,
)
from unionfs.host.locks import NamedLocks, StoreLock
from unionfs.host.syscalls import in_user_namespace

_log = logging.getLogger(__name__)


class UnionSnapshotter:
    """A :class:`unionfs.engines.snapshotter.contract.Snapshotter`.

    Args:
        root: directory for everything it keeps; made where it does not exist.
        mount_options: options of every mount of ours (docs/unionfs-mount.md).
        overlay_unpack: let containerd unpack layers without a mount (:mod:`.mounts`). In a user namespace it never
            does: whiteouts as the kernel's overlayfs knows them cannot be made there.
        share_layers: a layer of an image that is there already, for whichever of containerd's namespaces, is not
            unpacked again.

    Raises:
        NotSupportedError: there is no FUSE here, or the file system of ``root`` cannot hold layers.
        StoreLockedError: another process uses ``root``.
        SnapshotterError: ``root`` cannot be used, or its database is damaged.
    """

    def __init__(
        self,
        root: str,
        mount_options: Sequence[str] = (),
        *,
        overlay_unpack: bool = True,
        share_layers: bool = False,
    ) -> None:
        self._directories = SnapshotDirectories(root)
        self._lock = StoreLock(os.path.join(self._directories.root, "lock"))
        try:
            check_fuse()
            database = os.path.join(self._directories.root, "metadata.sqlite3")
            if not os.path.exists(database):
                # Only then: on a full disk it would fail, and there must be a way to remove snapshots.
                check_filesystem(self._directories.snapshots)
            self._store = SnapshotStore(database, len(self._directories.present()))
            self._directories.recover(self._store.numbers())
        except BaseException:
            self._lock.release()
            raise
        self._unions = SnapshotUnions(mount_options)
        self._names = NamedLocks()
        self._overlay_unpack = overlay_unpack and not in_user_namespace()
        self._share_layers = share_layers

    @property
    def root(self) -> str:
        """Where everything is, as an absolute path without links."""
        return self._directories.root

    def stat(self, key: str) -> Info:
        """See :meth:`Snapshotter.stat`."""
        return self._store.get(key).info

    def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] = ()) -> Info:
        """See :meth:`Snapshotter.update`."""
        change: dict[str, str] = {}
        for field in fields:
            if field == "labels":
                break
            if not field.startswith("labels."):
                raise SnapshotArgumentError(f"field {field!r} of a snapshot cannot be changed; only labels can")
            key = field.removeprefix("labels.")
            change[key] = labels.get(key, "")
        else:
            if fields:
                _check_labels(change)
                return self._store.set_labels(name, change, replace=False)
        _check_labels(labels)
        return self._store.set_labels(name, labels, replace=True)

    def usage(self, key: str) -> Usage:
        """See :meth:`Snapshotter.usage`."""
        record = self._store.get(key)
        if record.usage is not None:
            return record.usage
        with _system_errors(f"measure snapshot {key}"):
            return self._directories.measure(record.number).usage

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """See :meth:`Snapshotter.mounts`."""
        with self._names.hold(key):
            record = self._store.get(key)
            if record.info.kind is Kind.COMMITTED:
                raise SnapshotStateError(f"snapshot {key} is committed and so cannot be mounted; make a view of it")
            with _system_errors(f"mount snapshot {key}"):
                return self._mount(self._plan(record.number, record.info, self._store.chain(record.info.parent)))

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See :meth:`Snapshotter.prepare`."""
        # containerd takes "exists already" as the answer to a layer that it named, looks for the label in the list, and
        # has the snapshot found as its own from then on; it removes it when no namespace needs it (core/metadata).
        layer = (labels or {}).get(REF_LABEL, "")
        if layer and self._share_layers and (found := self._store.find(parent, REF_LABEL, layer)):
            raise SnapshotExistsError(f"layer {layer} is there already, as snapshot {found}; use that")
        return self._create(Kind.ACTIVE, key, parent, labels or {})

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """See :meth:`Snapshotter.view`."""
        return self._create(Kind.VIEW, key, parent, labels or {})

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """See :meth:`Snapshotter.commit`."""
        _check_name(name)
        labels = dict(labels or {})
        # containerd 1.6 does not say it for images that are imported.
        if (layer := unpacked_layer(key)) and name.endswith(layer) and self._share_layers:
            labels.setdefault(REF_LABEL, layer)
        _check_labels(labels)
        with self._names.hold(key, name), _system_errors(f"commit snapshot {key}"):
            record = self._store.get(key)
            check_active(record)
            self._store.check_free(name)
            union = writable_union(self._directories, record.number, self._store.chain(record.info.parent))
            self._unions.end(union, MountRequirements.of_labels(record.info.labels, writable=True).mount_options())
            measured = self._directories.measure(record.number)
            self._directories.sync(record.number)
            self._store.commit(key, name, labels, measured.usage, redirected=measured.redirected)

    def remove(self, key: str) -> None:
        """See :meth:`Snapshotter.remove`."""
        with self._names.hold(key):
            record = self._store.remove(key)
            self._set_aside(record)

    def walk(self, filters: Sequence[str] = ()) -> list[Info]:
        """See :meth:`Snapshotter.walk`."""
        matches = compile_filters(filters)
        return [record.info for record in self._store.all() if matches(record.info)]

    def cleanup(self) -> None:
        """See :meth:`Snapshotter.cleanup`."""
        with _system_errors("clean up"):
            self._directories.delete_set_aside()

    def close(self) -> None:
        """See :meth:`Snapshotter.close`."""
        self._store.close()
        self._lock.release()

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        _check_name(key)
        _check_labels(labels)
        MountRequirements.of_labels(labels, writable=True)  # a bad one is told before anything is made
        with self._names.hold(key), _system_errors(f"prepare snapshot {key}"):
            chain = self._store.plan(key, parent)
            number = self._directories.create(chain.numbers)
            try:
                self._store.add(number, kind, key, parent, labels, planned=chain)
            except BaseException:
                with suppress(SnapshotterError):  # the next start deletes it; the first error is the one to tell
                    self._set_aside_number(number)
                raise
            # Only now, since its parents might have been removed meanwhile; without a mount it is complete, too.
            try:
                info = Info(name=key, parent=parent, kind=kind, created_ns=0, updated_ns=0, labels=labels)
                return self._mount(self._plan(number, info, chain))
            except BaseException:
                with suppress(SnapshotterError):
                    self._set_aside(self._store.remove(key))
                raise

    def _plan(self, number: int, info: Info, chain: Chain) -> Plan:
        return plan_mounts(
            self._directories,
            number,
            info.kind,
            info.name,
            chain,
            MountRequirements.of_labels(info.labels, writable=info.kind is Kind.ACTIVE),
            overlay_unpack=self._overlay_unpack,
        )

    def _mount(self, plan: Plan) -> tuple[Mount, ...]:
        if plan.union is not None:
            self._unions.ensure(plan.union, plan.options)
        return plan.mounts

    def _set_aside(self, record: Record) -> None:
        """Take the files away. It is removed already, so what fails here is left to the next start."""
        try:
            self._set_aside_number(record.number)
        except SnapshotterError as error:
            _log.warning("%s", error)

    def _set_aside_number(self, number: int) -> None:
        with _system_errors(f"remove the directory of snapshot {number}"):
            self._unions.detach(self._directories.paths(number).union)
            self._directories.set_aside(number)


def _check_name(name: str) -> None:
    if not name:
        raise SnapshotArgumentError("a snapshot's name is empty; give it one")


def _check_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        size = len(key.encode()) + len(value.encode())
        if size > LABEL_MAX_BYTES:
            raise SnapshotArgumentError(
                f"label {key[:60]} has {size} bytes with its value; make it at most {LABEL_MAX_BYTES}"
            )


@contextmanager
def _system_errors(doing: str) -> Iterator[None]:
    """Tell the errors of the system and of the driver's parts as the snapshotter's."""
    try:
        yield
    except DriverError as error:
        raise SnapshotterError(f"cannot {doing}: {error}") from error
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        advice = "; free space on that disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise SnapshotterError(f"cannot {doing}: {where}{error.strerror or error}{advice}") from error
