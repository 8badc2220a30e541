"""A container from its creation to its end: read-write layer, mount, configuration, and cleaning up.

Everything here is done with the layer store open. While a container runs it is closed, so that others can work; what
they must know is in the container's :class:`Place`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from unionfs.engines.run import spec
from unionfs.engines.run.cgroups import limits_here
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.process import check_command, make_process, resolve_user
from unionfs.engines.run.records import Place, Record, Running, boot_id
from unionfs.engines.run.rootfs import RootFs
from unionfs.engines.run.runner import kill_runner
from unionfs.engines.run.runtime import Runtime, find_runtime
from unionfs.engines.run.volumes import Volumes, fill, root_of
from unionfs.errors import MountNameConflictError, RunError, StoreLockedError, UnionfsError
from unionfs.layers import LayerStore, Problem, RWLayer, open_store
from unionfs.layers.identity import INIT_SUFFIX
from unionfs.layers.metadata import Unreadable

_log = logging.getLogger(__name__)

_MAX_WAIT_S = 180.0
"""For twenty others that start at once on a slow machine; a long pull is not waited for."""
_SHORT_DIGITS = 12  # of an id as a host name


@dataclass(frozen=True, slots=True)
class Ready:
    """A container that is mounted and configured, and waits to be started.

    Attributes:
        place: locked.
        mount_id: its id for the runtime, too.
    """

    name: str
    mount_id: str
    place: Place
    runtime: Runtime
    terminal: bool
    interactive: bool


class Containers:
    """The containers of an open layer store.

    Args:
        store: must stay open as long as this is used.
        rootless: we are root of a user namespace only.
    """

    def __init__(self, store: LayerStore, *, rootless: bool = False) -> None:
        self._store = store
        self._rootless = rootless
        # Only a store in files can say where it is.
        image_root = os.path.dirname(store.records.root)  # type: ignore[attr-defined]
        self._directory = os.path.join(image_root, "containers")
        self._volumes = Volumes(root_of(store))
        # One handle for each: the last one that is released removes the layer.
        self._handles: dict[str, RWLayer] = {}

    def prepare_new(self, record: Record, chain_id: str, runtime: str = "") -> Ready:
        """Make a container on a layer, and :meth:`prepare` it. If that fails, it is gone again.

        Args:
            record: how it is to be run; an empty name becomes a random one.
            chain_id: the layer, ``""`` for none.
            runtime: the name of one; empty for the best that is there.

        Raises:
            RunError: the name is taken, or the container cannot be run.
            LayerDoesNotExistError: there is no such layer.
            MountError: the mount failed.
        """
        place, rw = self._create(record, chain_id)
        try:
            return self.prepare(place, runtime)
        except BaseException:
            self._store.release_rw_layer(rw, keep_parents=True)
            place.remove()
            raise

    def _create(self, record: Record, chain_id: str) -> tuple[Place, RWLayer]:
        volumes = tuple(
            volume.model_copy(update={"source": self._volumes.path_of(volume.name)}) if volume.name else volume
            for volume in record.options.volumes
        )
        options = record.options.model_copy(update={"volumes": volumes})
        name = record.name or secrets.token_hex(6)
        record = record.model_copy(update={"name": name, "options": options, "created": time.time()})
        directories, files = spec.mount_points(options)

        def init(path: str) -> None:
            with RootFs(path) as rootfs:
                for volume in volumes:
                    if volume.name and self._volumes.make(volume.name):
                        fill(volume.source, rootfs, volume.destination)
                for name in directories:
                    rootfs.make_dir(name)
                for name in files:
                    rootfs.make_file(name)

        try:
            rw = self._store.create_rw_layer(record.name, chain_id, init=init)
        except MountNameConflictError as error:
            raise RunError(
                f"there is a container {record.name} already; start it again with: unionfs container start "
                f"{record.name}, or remove it with: unionfs container rm {record.name}"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST):
                raise RunError(
                    f"nothing can be mounted on {os.fsdecode(error.filename or '?')} in this image "
                    f"({error.strerror}); give another destination"
                ) from error
            raise
        self._handles[rw.mount_id] = rw
        place = Place(self._directory, rw.mount_id)
        try:
            place.make(record)
        except BaseException:
            self._store.release_rw_layer(rw, keep_parents=True)
            raise
        return place, rw

    def place_of(self, name: str) -> Place | None:
        """The place of a container; None for one that was made by something else than :meth:`prepare_new`.

        Raises:
            MountDoesNotExistError: there is no container of this name.
        """
        place = Place(self._directory, self._store.get_mount_id(name))
        return place if place.exists() else None

    def users_of(self, volume: str) -> list[str]:
        """The containers that have a named volume."""
        found = []
        for place in self._places():
            with suppress(RunError):
                record = place.record()
                if any(one.name == volume for one in record.options.volumes):
                    found.append(record.name)
        return sorted(found)

    def find(self, name: str) -> Place:
        """The place of a container that can be started again.

        Raises:
            MountDoesNotExistError: there is no container of this name.
            RunError: it was made by something else than :meth:`prepare_new`.
        """
        place = self.place_of(name)
        if place is None:
            raise RunError(
                f"container {name} was not made by unionfs run, so there is nothing to start in it; mount it (unionfs "
                "container mount), or commit it and run the layer (unionfs run --layer)"
            )
        return place

    def prepare(self, place: Place, runtime: str = "") -> Ready:
        """Mount a container and write its configuration. On failure it is as it was; see :meth:`finish`.

        Args:
            place: of the container.
            runtime: the name of one; empty for the best that is there.

        Raises:
            RunError: it is running, mounted, or cannot be run.
            MountError: the mount failed.
        """
        record = place.record()
        _check_limits(record.options, rootless=self._rootless)
        if record.options.terminal and not os.isatty(0):
            raise RunError("-t needs a terminal as standard input; leave it out")
        found = find_runtime(runtime, place.state, rootless=self._rootless)
        rw = self._rw_layer(record.name, place.mount_id)
        if rw is None:
            raise RunError(f"container {record.name} was removed; unionfs container ls shows those that are there")
        if not place.take(tries=5):
            raise RunError(f"container {record.name} is running; end it first, or run another one of its image")
        if rw.is_mounted():
            place.let_go()
            raise RunError(f"container {record.name} is mounted; run: unionfs container umount {record.name}")
        try:
            place.mark_running(
                Running(
                    pid=os.getpid(),
                    boot=boot_id(),
                    runtime=found.name,
                    path=found.path,
                    rootless=self._rootless,
                    started=time.time(),
                )
            )
            self._configure(place, record, found, rw.mount())
        except BaseException:
            self._end(place, rw)
            place.let_go()
            raise
        options = record.options
        return Ready(record.name, rw.mount_id, place, found, options.terminal, options.interactive)

    def _configure(self, place: Place, record: Record, runtime: Runtime, path: str) -> None:
        options = record.options
        for volume in options.volumes:
            if volume.name:
                self._volumes.make(volume.name)  # it may have been removed since
            source = volume.source
            if not os.path.exists(source):
                raise RunError(f"volume {source}: it is not there any more; make it, or remove the container")
        hostname = options.hostname or short_id(place)
        with RootFs(path) as rootfs:
            user = resolve_user(rootfs, options.user or record.config.user)
            process = make_process(record.config, options, user, hostname)
            hidden = options.destinations
            check_command(rootfs, process.args[0], process.search, process.cwd, [*hidden, "/dev", "/proc", "/sys"])
            if not any(process.cwd == one or process.cwd.startswith(one + "/") for one in hidden):
                try:
                    rootfs.make_dir(process.cwd)
                except OSError as error:
                    raise RunError(f"working directory {process.cwd}: {error.strerror}; give another (-w)") from error
        spec.write_host_files(place.path, hostname, options.network)
        made = spec.build_spec(
            process,
            options,
            rootfs=path,
            files=place.path,
            hostname=hostname,
            init=_init_program() if options.init else "",
            window=os.get_terminal_size(0) if options.terminal else None,
            rootless=self._rootless,
        )
        with suppress(FileNotFoundError):
            os.unlink(place.log)
        with open(place.spec, "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(made, file, ensure_ascii=False)

    def finish(self, place: Place) -> None:
        """End a container whose lock we hold: its processes, its mount, and itself if it is to be removed.

        Raises:
            OSError, UnionfsError: something is in the way. The lock is given back, and :meth:`sweep` tries again.
        """
        try:
            record = place.record()
            rw = self._rw_layer(record.name, place.mount_id)
            self._end(place, rw)
            if record.remove and rw is not None:
                self._store.release_rw_layer(rw, keep_parents=True)
            if (record.remove and rw is not None) or self._store.is_gone(place.mount_id):
                place.remove()
        finally:
            place.let_go()

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a container with all that is in it. The layers that it stands on stay.

        Args:
            name: of any read-write layer, ours or not.
            force: also if it is mounted or running; its processes are killed.

        Raises:
            MountDoesNotExistError: there is no container of this name.
            RunError: its record cannot be read, and ``force`` is off.
            ActiveMountError: see ``force``.
            DriverError: a tree could not be removed.
        """
        damaged = self._store.claims.find("mount", name)
        if (damaged is not None or name not in self._store.rw_layers()) and self._remove_damaged(name, damaged, force):
            return
        place = Place(self._directory, self._store.get_mount_id(name))
        rw = self._rw_layer(name, place.mount_id)
        if not force and place.is_running():
            raise RunError(f"container {name} is running; stop it (unionfs container stop {name}), or use --force")
        if force:
            with suppress(RunError):  # damaged: then nobody knows how
                _end_processes(place)
        if rw is not None:
            self._store.release_rw_layer(rw, force=force, keep_parents=True)
        # Whoever ran it until now still needs the directory, and removes it.
        if place.exists() and place.take():
            place.remove()
            place.let_go()

    def _remove_damaged(self, name: str, damaged: Unreadable | None, force: bool) -> bool:
        """Remove a container without a record that can be used; False if there is no sign of it."""
        trees = damaged.trees if damaged is not None else ()
        places = [place for place in self._places() if place.mount_id in trees or self._is_lost(place, name)]
        if damaged is None and not places:
            return False
        if not force:
            reason = damaged.reason if damaged is not None else f"{places[0].path}: its read-write layer is gone"
            raise RunError(f"container {name} cannot be read: {reason}; put that right, or remove it: --force")
        if damaged is not None and not self._store.remove_unreadable_rw_layer(name):
            _log.warning("container %s: nobody can tell which files were its; unionfs gc removes them", name)
        for place in places:
            if place.take():
                self._end(place, None)
                place.remove()
                place.let_go()
        return True

    def _is_lost(self, place: Place, name: str) -> bool:
        """Whether it is the place of a container of that name that the store knows nothing of any more."""
        if any(mount.record.mount_id == place.mount_id for mount in self._store.rw_layers().values()):
            return False
        with suppress(RunError):
            return place.record().name == name
        return False

    def check(self) -> list[Problem]:
        """What is wrong with what is known of containers beside their files; for ``unionfs fsck``."""
        found = []
        for name, mount in self._store.rw_layers().items():
            place = Place(self._directory, mount.record.mount_id)
            if place.exists():
                try:
                    place.record()
                except RunError as error:
                    what = str(error).partition("; ")[0]
                    advice = f"its files are there: unionfs container export {name}; then remove it"
                    found.append(Problem("container", name, what, advice))
        return found

    def claim_trees(self) -> None:
        """Say to the store which trees the containers here need, should its own records of them be lost."""
        for place in self._places():
            self._store.claims.add_user(
                f"container {place.mount_id[:_SHORT_DIGITS]}", (), (place.mount_id, place.mount_id + INIT_SUFFIX)
            )

    def sweep(self) -> None:
        """End and clean up the containers whose runner died, and forget those that were removed.

        What cannot be cleaned up is said in the log and left for the next time.
        """
        for place in list(self._places()):
            gone = self._store.is_gone(place.mount_id)
            if not (gone or place.is_marked_running()) or not place.take():
                continue
            try:
                if gone:
                    self._end(place, None)
                    place.remove()
                else:
                    self.finish(place)
            except (UnionfsError, OSError) as error:
                _log.warning("container %s cannot be cleaned up yet: %s", place.mount_id[:_SHORT_DIGITS], error)
            finally:
                place.let_go()

    def _places(self) -> Iterator[Place]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            yield Place(self._directory, name)

    def _rw_layer(self, name: str, mount_id: str) -> RWLayer | None:
        mount = self._store.rw_layers().get(name)
        if mount is None or mount.record.mount_id != mount_id:
            return None
        if mount_id not in self._handles:
            self._handles[mount_id] = self._store.get_rw_layer(name)
        return self._handles[mount_id]

    def _end(self, place: Place, rw: RWLayer | None) -> None:
        """End the processes and unmount."""
        with suppress(RunError):  # damaged: then nobody knows how
            _end_processes(place)
        if rw is not None and rw.is_mounted():
            rw.unmount()
        place.mark_ended()


def _check_limits(options: RunOptions, *, rootless: bool) -> None:
    wanted = {"memory": options.memory_bytes, "cpus": options.cpus, "pids-limit": options.pids_limit}
    if any(wanted.values()):
        for limit, why in limits_here(rootless=rootless).items():
            if wanted[limit] and why:
                raise RunError(f"--{limit}: {why}")


def short_id(place: Place) -> str:
    """The start of a container's id: its host name, unless it was given another."""
    return place.mount_id[:_SHORT_DIGITS]


def _end_processes(place: Place) -> None:
    running = place.running()
    if running is None or not os.path.isdir(place.state):
        return
    if running.boot == boot_id():
        Runtime(running.runtime, running.path, place.state, running.rootless).delete(place.mount_id)
    elif place.is_running():
        kill_runner(place)


def _init_program() -> str:
    for name in ("catatonit", "tini-static", "docker-init"):
        path = shutil.which(name) or shutil.which(name, path="/usr/libexec/podman")
        if path is not None:
            return path
    raise RunError("--init needs the program catatonit; install it: apt install catatonit")


@contextmanager
def open_when_free(root: str | None, driver: str, max_wait_s: float = _MAX_WAIT_S) -> Iterator[LayerStore]:
    """The store, as soon as nobody has it open: containers that start and end side by side take turns.

    Args:
        root, driver: see :func:`unionfs.layers.open_store`.
        max_wait_s: how long to wait.

    Raises:
        StoreLockedError: somebody still has it open.
    """
    deadline = time.monotonic() + max_wait_s
    while True:
        try:
            store = open_store(root, driver)
            break
        except StoreLockedError:
            if time.monotonic() > deadline:
                raise
        # Not in step with the others who wait.
        time.sleep(random.uniform(0.01, 0.05))
    with store:
        yield store
