"""Which drivers there are, and which of them a root directory is used with.

The rules are moby's, except that several earlier drivers are found before one of them is
started, and that all their names are told in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import Driver, InitFunc, LookFunc
from unionfs.errors import DriverError, NotSupportedError

_log = logging.getLogger(__name__)

PRIORITY = ("unionfs", "overlay2", "vfs")
"""Which driver is taken first where none was used before."""

ENTRY_POINT_GROUP = "unionfs.drivers"
"""Packages add drivers with an entry point of this group: its name is the driver's, its value an ``InitFunc``."""

# Modules of ours are imported when their driver is asked for.
_BUILT_IN = {"unionfs": "union", "overlay2": "overlay2", "vfs": "vfs"}

# Its directory comes into being by itself where nothing better works, so it says nothing about what was chosen.
_NEVER_PRIOR = frozenset({"vfs"})

_GONE = frozenset({"aufs", "devicemapper", "overlay"})


class Registry:
    """A set of drivers by name."""

    def __init__(self) -> None:
        self._drivers: dict[str, InitFunc] = {}
        self._looks: dict[str, LookFunc] = {}

    def register(self, name: str, init: InitFunc, look: LookFunc | None = None) -> None:
        """Add a driver; without ``look``, only one process at a time can use a home, also to read.

        Raises:
            DriverError: the name is taken, or cannot be a directory's.
        """
        if not name or "/" in name or name in (".", ".."):
            raise DriverError(f"driver name {name!r} is not a name for a directory; choose another")
        if name in self._drivers:
            raise DriverError(f"name already registered: {name}; choose another name for the driver")
        self._drivers[name] = init
        if look is not None:
            self._looks[name] = look

    def is_registered(self, name: str) -> bool:
        """Whether there is a driver of this name."""
        return name in self._drivers

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._drivers)

    def init_of(self, name: str) -> InitFunc:
        """What makes the registered driver ``name``, for who has a home of another name; never a plugin.

        Raises:
            NotSupportedError: none is registered by that name.
        """
        init = self._drivers.get(name)
        if init is None:
            raise NotSupportedError(f"there is no driver {name}; use one of {', '.join(self.names())}")
        return init

    def get_driver(
        self, name: str, root: str, options: Sequence[str] = (), id_mapping: IdMapping | None = None
    ) -> Driver:
        """The driver ``name``, with its home at ``root/name``; a plugin where none is registered by that name.

        Args:
            name: which one.
            root: the directory above the drivers' homes.
            options: ``key=value`` texts for the driver.
            id_mapping: the owners' mapping; None for none.

        Raises:
            NotSupportedError: there is no such driver, or it cannot work here.
        """
        mapping = id_mapping or IdMapping()
        init = self._drivers.get(name)
        if init is not None:
            return init(os.path.join(root, name), options, mapping)
        if name in _GONE:
            raise NotSupportedError(f"the {name} storage driver has been removed everywhere; use unionfs or overlay2")
        from unionfs.drivers.plugin import connect

        return connect(name, os.path.join(root, name), options, mapping)

    def look_at(self, name: str, root: str, options: Sequence[str] = (), id_mapping: IdMapping | None = None) -> Driver:
        """The driver ``name`` for reading what is at ``root/name``, whoever uses it (:data:`LookFunc`).

        Args:
            name, root, options, id_mapping: see :meth:`get_driver`.

        Raises:
            NotSupportedError: the driver cannot do that.
            DriverError: it has no home there.
        """
        look = self._looks.get(name)
        if look is None:
            raise NotSupportedError(f"driver {name} cannot only be looked at; use the store when nobody else does")
        home = os.path.join(root, name)
        if not os.path.isdir(home):
            raise DriverError(f"{home}: the {name} driver has no directory there; see that its file system is mounted")
        return look(home, options, id_mapping or IdMapping())

    def new(
        self,
        root: str,
        name: str = "",
        options: Sequence[str] = (),
        id_mapping: IdMapping | None = None,
        priority: Iterable[str] = PRIORITY,
    ) -> Driver:
        """The driver for ``root``: the one named, else the one that was used there, else the first that works.

        Args:
            root: the directory above the drivers' homes.
            name: the driver to use; empty to choose.
            options: ``key=value`` texts for the driver.
            id_mapping: the owners' mapping; None for none.
            priority: names in the order in which they are tried; the others follow in the order of their names.

        Raises:
            DriverError: several drivers were used at ``root``, or the one that was cannot be started: another one would
                not show what it holds.
            NotSupportedError: none works here, or the one named does not.
        """
        if name:
            return self.get_driver(name, root, options, id_mapping)
        prior = self.prior_drivers(root)
        if len(prior) > 1:
            raise DriverError(
                f"{root} contains several valid graphdrivers: {', '.join(prior)}; "
                "cleanup or explicitly choose a storage driver by its name"
            )
        if prior:
            _log.info("%s: using the driver %s, which was used before", root, prior[0])
            return self.get_driver(prior[0], root, options, id_mapping)
        refusals = []
        for candidate in self._in_order(priority):
            try:
                return self.get_driver(candidate, root, options, id_mapping)
            except NotSupportedError as error:
                _log.info("driver %s: %s", candidate, error)
                refusals.append(f"{candidate}: {error}")
        raise NotSupportedError(
            f"no supported storage driver found ({'; '.join(refusals) or 'none is registered'}); name one to use"
        )

    def prior_drivers(self, root: str) -> list[str]:
        """The drivers that have something in ``root``, sorted. ``vfs`` never counts, nor does an empty directory."""
        return [
            name
            for name in self.names()
            if name not in _NEVER_PRIOR and os.path.lexists(path := os.path.join(root, name)) and not _is_empty(path)
        ]

    def _in_order(self, priority: Iterable[str]) -> list[str]:
        first = [name for name in priority if name in self._drivers]
        return [*first, *(name for name in self.names() if name not in first)]


def _is_empty(path: str) -> bool:
    """Whether a directory has no entry. One that cannot be read may hold layers, so it counts as not empty."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def default_registry() -> Registry:
    """Our own drivers and those of installed packages; a package cannot take the name of one of ours."""
    registry = Registry()
    for name, module in _BUILT_IN.items():
        registry.register(name, _imported_later(module, "init"), _imported_later(module, "look"))
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        try:
            registry.register(point.name, _loaded_later(point))
        except DriverError as error:
            _log.warning("entry point %s = %s is ignored: %s", point.name, point.value, error)
    return registry


def _imported_later(module: str, function: str) -> InitFunc:
    def make(root: str, options: Sequence[str], id_mapping: IdMapping) -> Driver:
        made: Driver = getattr(import_module(f"unionfs.drivers.{module}"), function)(root, options, id_mapping)
        return made

    return make


def _loaded_later(point: EntryPoint) -> InitFunc:
    def init(root: str, options: Sequence[str], id_mapping: IdMapping) -> Driver:
        try:
            load: InitFunc = point.load()
        except Exception as error:  # whatever somebody else's package raises when it is imported
            raise NotSupportedError(
                f"driver {point.name} ({point.value}) cannot be loaded: {type(error).__name__}: {error}; "
                "repair or remove the package"
            ) from error
        return load(root, options, id_mapping)

    return init
