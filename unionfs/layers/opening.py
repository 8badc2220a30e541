"""Opening a layer store by its root directory.

The layout below the root is Docker's: ``DRIVER/`` is the driver's home, ``image/DRIVER/layerdb/`` the records.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.registry import PRIORITY, Registry, default_registry
from unionfs.errors import DriverError, LayerStoreError, StoreLockedError, StoreNotFoundError
from unionfs.host import disk
from unionfs.host.locks import StoreLock
from unionfs.host.syscalls import in_user_namespace
from unionfs.layers.file_metadata import FileMetadataStore
from unionfs.layers.identity import ALGORITHM
from unionfs.layers.store import LayerStore

ROOT_VARIABLE = "UNIONFS_ROOT"


def default_root() -> str:
    """Where the layers of this user are: ``$UNIONFS_ROOT``, else ``/var/lib/unionfs`` or below the home directory.

    Who is root of a user namespace only, and may not write to ``/var/lib``, is the user that made it.
    """
    if root := os.environ.get(ROOT_VARIABLE):
        return os.path.abspath(root)
    if os.geteuid() == 0 and (os.access("/var/lib", os.W_OK) or not in_user_namespace()):
        return "/var/lib/unionfs"
    data = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "unionfs")


def open_store(
    root: str | os.PathLike[str] | None = None,
    driver: str = "",
    options: Sequence[str] = (),
    *,
    id_mapping: IdMapping | None = None,
    registry: Registry | None = None,
    recover: bool = True,
    read_only: bool = False,
    wait: Callable[[StoreLockedError], None] | None = None,
) -> LayerStore:
    """Open the layer store at ``root``, or make one there.

    Args:
        root: the directory, which may be Docker's data root while Docker is stopped; None for :func:`default_root`.
        driver: ``unionfs``, ``overlay2``, ``vfs`` or another; empty: the one that was used there, else the best one
            that works on this host.
        options: ``key=value`` texts for the driver.
        id_mapping: the owners' mapping; None for none.
        registry: the drivers to choose from; None for ours and those of installed packages.
        recover: see :class:`LayerStore`.
        read_only: only look at what is there: no lock is taken, nothing is written or cleaned up, and nothing mounted,
            so that it works while another process has the store open, and on a read-only file system. What that
            process changes meanwhile is not seen, or is gone when it is read.
        wait: called when another process has the store open, and returns when it is to be tried again
            (:func:`unionfs.host.locks.wait_until_free`); None: that is an error.

    Raises:
        StoreLockedError: another process has it open.
        StoreNotFoundError: there is none to look at.
        NotSupportedError: the driver cannot work here, or none does.
        DriverError: several drivers were used there, name one.
        LayerStoreError: the directory cannot be made or used.
    """
    where = os.path.abspath(default_root() if root is None else root)
    drivers = registry or default_registry()
    if read_only:
        return _look(where, driver, options, id_mapping, drivers)
    while True:
        try:
            return _open(where, driver, options, id_mapping, drivers, recover)
        except StoreLockedError as error:
            if wait is None or not error.lock:
                raise
            wait(error)


def _look(
    where: str, driver: str, options: Sequence[str], id_mapping: IdMapping | None, drivers: Registry
) -> LayerStore:
    name = driver or _used_before(where, drivers)
    if not name or not os.path.isdir(_place(where, name)):
        raise StoreNotFoundError(f"there is no layer store at {where}; name the directory of one (--root)")
    records = FileMetadataStore(_place(where, name), read_only=True)
    return LayerStore(drivers.look_at(name, where, options, id_mapping), records)


def _open(
    where: str,
    driver: str,
    options: Sequence[str],
    id_mapping: IdMapping | None,
    drivers: Registry,
    recover: bool,
) -> LayerStore:
    with _alone(where):
        name = driver or _used_before(where, drivers)
        lock = None
        try:
            if name and os.path.isdir(_place(where, name)):
                # Locked before the driver looks at its home, where it cleans up after a crash.
                records, lock = _locked_records(where, name)
                made = drivers.get_driver(name, where, options, id_mapping)
            else:
                made = drivers.new(where, name, options, id_mapping)
                records, lock = _locked_records(where, made.name)
            return LayerStore(made, records, lock, recover=recover)
        except BaseException:
            if lock is not None:
                lock.release()
            raise


def _place(root: str, driver: str) -> str:
    return os.path.join(root, "image", driver, "layerdb")


def _locked_records(root: str, driver: str) -> tuple[FileMetadataStore, StoreLock]:
    try:
        records = FileMetadataStore(_place(root, driver))
        return records, StoreLock(os.path.join(records.root, "lock"))
    except OSError as error:
        raise _unusable(root, error) from error


def _used_before(root: str, registry: Registry) -> str:
    """The driver whose records are there; empty when that does not decide it.

    Records of nothing, as a mere look with another driver leaves them, count only if there are no others.

    Raises:
        DriverError: several have something.
    """
    try:
        there = os.listdir(os.path.join(root, "image"))
    except OSError:
        return ""
    found = [name for name in PRIORITY if name in there]
    found += [name for name in sorted(there) if name not in PRIORITY and registry.is_registered(name)]
    in_use = [name for name in found if _holds_something(_place(root, name))]
    if len(in_use) > 1:
        raise DriverError(
            f"{root} contains several valid graphdrivers: {', '.join(in_use)}; name one of them (--driver)"
        )
    return next(iter(in_use or found), "")


def _holds_something(layerdb: str) -> bool:
    """Whether there is a layer or a read-write layer, readable or not."""
    for part in (ALGORITHM, "mounts"):
        with suppress(FileNotFoundError), os.scandir(os.path.join(layerdb, part)) as entries:
            if any(entries):
                return True
    return False


@contextmanager
def _alone(root: str) -> Iterator[None]:
    """Nobody else opens a store there at the same moment, before it is known which lock is the store's."""
    try:
        disk.ensure_dir(root, 0o711)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(root, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _unusable(root: str, error: OSError) -> LayerStoreError:
    return LayerStoreError(
        f"cannot use {root} for layers: {os.fsdecode(error.filename or root)}: {error.strerror}; "
        f"give another directory (--root, or {ROOT_VARIABLE})"
    )
