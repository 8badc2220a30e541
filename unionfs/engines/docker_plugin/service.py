"""The calls of the graph driver plugin protocol, answered by a driver. Synchronous; knows nothing of HTTP.

An engine says where its layers are when it starts (``Init``), and from then on everything is about that home: there
is one engine for each plugin. ``Init`` again means that the engine was restarted, or died: a driver made anew holds
the mounts that live, once each, which is what an engine expects that has forgotten how often it asked for them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

from unionfs import __version__
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Driver, InitFunc, capabilities_of
from unionfs.engines.docker_plugin.messages import (
    CapabilitiesMessage,
    CapabilitiesReply,
    ChangeMessage,
    ChangesReply,
    CreateRequest,
    DifferenceRequest,
    ExistsReply,
    GetReply,
    GetRequest,
    InitRequest,
    LayerRequest,
    MetadataReply,
    NothingRequest,
    Reply,
    SizeReply,
    StatusReply,
)
from unionfs.engines.docker_plugin.session import HeldLayers, HomeLock, SessionFile
from unionfs.errors import DriverError, UnionfsError

_log = logging.getLogger(__name__)

DONE = Reply()


class _Session(NamedTuple):
    driver: Driver
    lock: HomeLock
    held: HeldLayers


class GraphDriverService:
    """One engine's driver. :meth:`init` must not run beside other calls; those may run beside each other.

    Args:
        init_driver: makes the driver.
        session_file: where the engine's session is kept for the next process.
        options: ``key=value`` texts for the driver; the engine's own come after these, and the last of equal keys
            counts.
        home: the directory to use instead of the one that the engine names; empty for the engine's.
    """

    def __init__(
        self, init_driver: InitFunc, session_file: SessionFile, *, options: Sequence[str] = (), home: str = ""
    ) -> None:
        self._init_driver = init_driver
        self._file = session_file
        self._options = tuple(options)
        self._home = home
        self._session: _Session | None = None
        self._cleaned_up = False
        self._lock = threading.Lock()

    # The engine's start and end

    def init(self, request: InitRequest) -> Reply:
        """Open the driver anew.

        Raises:
            DriverError: another engine uses this plugin, another process its home, or the driver cannot work.
        """
        with self._lock:
            home = self._home_of(request)
            former = self._session
            if former is not None and former.lock.home != home and not self._cleaned_up:
                raise DriverError(
                    f"this plugin serves {former.lock.home} already; give each engine a plugin of its own "
                    "(unionfs serve docker-plugin --name), or restart this one"
                )
            self._session = self._opened(request, former, {})
            self._cleaned_up = False
        return DONE

    def cleanup(self, _: NothingRequest) -> Reply:
        """Unmount everything: the engine ends."""
        with self._lock:
            if self._session is not None:
                self._session.driver.cleanup()
            # A plugin that is started later waits for an engine, rather than make the home of one that is gone.
            self._file.forget()
            self._cleaned_up = True
        return DONE

    def close(self) -> None:
        """Let another process have the home. Mounts stay, for the containers that run in them."""
        with self._lock:
            if self._session is not None:
                self._session.lock.release()
                self._session = None

    def capabilities(self, _: NothingRequest) -> Reply:
        """What the driver promises."""
        exact = capabilities_of(self.driver).reproduces_exact_diffs
        return CapabilitiesReply(
            reproduces_exact_diffs=exact, capabilities=CapabilitiesMessage(reproduces_exact_diffs=exact)
        )

    def status(self, _: NothingRequest) -> Reply:
        """Facts for ``docker info``, with those first that tell who answers."""
        driver = self.driver
        return StatusReply(status=[("unionfs version", __version__), ("Driver", driver.name), *driver.status()])

    # Layers

    def create(self, request: CreateRequest) -> Reply:
        """See :meth:`ProtoDriver.create`."""
        self.driver.create(request.id, request.parent, request.options())
        return DONE

    def create_read_write(self, request: CreateRequest) -> Reply:
        """See :meth:`ProtoDriver.create_read_write`."""
        self.driver.create_read_write(request.id, request.parent, request.options())
        return DONE

    def remove(self, request: LayerRequest) -> Reply:
        """See :meth:`ProtoDriver.remove`."""
        session = self._open_session()
        session.driver.remove(request.id)
        session.held.forget(request.id)
        return DONE

    def get(self, request: GetRequest) -> Reply:
        """See :meth:`ProtoDriver.get`."""
        session = self._open_session()
        path = session.driver.get(request.id, request.mount_label)
        session.held.add(request.id, 1)
        return GetReply(dir=path)

    def put(self, request: LayerRequest) -> Reply:
        """See :meth:`ProtoDriver.put`."""
        session = self._open_session()
        session.driver.put(request.id)
        session.held.add(request.id, -1)
        return DONE

    def exists(self, request: LayerRequest) -> Reply:
        """See :meth:`ProtoDriver.exists`."""
        return ExistsReply(exists=self.driver.exists(request.id))

    def get_metadata(self, request: LayerRequest) -> Reply:
        """See :meth:`ProtoDriver.get_metadata`."""
        return MetadataReply(metadata=self.driver.get_metadata(request.id))

    # Differences

    def changes(self, request: DifferenceRequest) -> Reply:
        """See :meth:`DiffDriver.changes`."""
        found = self.driver.changes(request.id, request.parent)
        return ChangesReply(changes=[ChangeMessage(path=os.fsdecode(c.path), kind=c.kind.docker_number) for c in found])

    def diff_size(self, request: DifferenceRequest) -> Reply:
        """See :meth:`DiffDriver.diff_size`."""
        return SizeReply(size=self.driver.diff_size(request.id, request.parent))

    def diff(self, request: DifferenceRequest) -> BinaryIO:
        """See :meth:`DiffDriver.diff`."""
        return self.driver.diff(request.id, request.parent)

    def apply_diff(self, request: DifferenceRequest, stream: Readable) -> Reply:
        """See :meth:`DiffDriver.apply_diff`."""
        return SizeReply(size=self.driver.apply_diff(request.id, request.parent, stream))

    @property
    def driver(self) -> Driver:
        """The driver in use; opened again in a process that was started under a running engine.

        Raises:
            DriverError: no engine has initialised it, or it cannot be opened any more.
        """
        return self._open_session().driver

    def _open_session(self) -> _Session:
        with self._lock:
            if self._session is None:
                saved = self._file.load()
                if saved is None:
                    raise DriverError("no engine has called GraphDriver.Init yet; restart the engine")
                self._session = self._opened(saved.init, None, saved.held)
                for layer_id, count in saved.held.items():
                    _hold_again(self._session.driver, layer_id, count - 1)
            return self._session

    def _home_of(self, request: InitRequest) -> str:
        home = self._home or request.home
        if not os.path.isabs(home):
            raise DriverError(f"GraphDriver.Init: Home is {home!r}; it has to be an absolute path")
        return os.path.normpath(home)

    def _opened(self, request: InitRequest, former: _Session | None, held: Mapping[str, int]) -> _Session:
        home = self._home_of(request)
        mapping = request.id_mapping()
        lock = former.lock if former is not None and former.lock.home == home else HomeLock(home, mapping)
        try:
            driver = self._init_driver(home, [*self._options, *request.opts], mapping)
            layers = HeldLayers(self._file, request, held)
        except BaseException:
            if former is None or lock is not former.lock:
                lock.release()
            raise
        if former is not None and lock is not former.lock:
            former.lock.release()
        return _Session(driver, lock, layers)


def _hold_again(driver: Driver, layer_id: str, count: int) -> None:
    """Bring a driver's count of a mount that lives, which it takes for held once, to what the engine goes by."""
    try:
        for _ in range(count):
            driver.get(layer_id)
    except UnionfsError as error:
        _log.warning("%s", error)  # its Puts will do nothing
