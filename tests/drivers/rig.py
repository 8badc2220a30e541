"""One driver in a directory of its own, for the tests that every driver has to pass.

A test that takes the fixture ``rig`` runs once for each of the drivers in ``DRIVERS``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from tests.drivers.plugin_server import plugin_server
from tests.support.mounts import is_running, servers_of, wait_until
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import overlay2, plugin, union, vfs
from unionfs.drivers.contract import Driver, InitFunc
from unionfs.drivers.plugin import find_plugin
from unionfs.host.mount_holders import mounts_inside

DRIVERS = ("unionfs", "overlay2", "vfs", "plugin")
LAYERED = ("unionfs", "overlay2")
INITS: dict[str, InitFunc] = {"unionfs": union.init, "overlay2": overlay2.init, "vfs": vfs.init}


class Rig:
    """A root directory with one driver.

    Attributes:
        kind: which one, of ``DRIVERS``.
        root: the root directory.
        driver: the driver, opened without options.
    """

    def __init__(self, kind: str, root: str) -> None:
        self.kind = kind
        self.root = root
        self.home = os.path.join(root, kind)
        self._stack = ExitStack()
        if kind == "plugin":
            self._stack.enter_context(plugin_server(os.path.join(root, "plugin.sock"), vfs.init))
        self._driver: Driver | None = None

    @property
    def driver(self) -> Driver:
        if self._driver is None:
            self._driver = self.open()
        return self._driver

    @property
    def layered(self) -> bool:
        """Whether the driver mounts, and knows exactly what was changed."""
        return self.kind in LAYERED

    def open(self, options: Sequence[str] = (), id_mapping: IdMapping | None = None) -> Driver:
        """Another instance over the same home, as a new process would have it."""
        mapping = id_mapping or IdMapping()
        if self.kind == "plugin":
            address = find_plugin("plugin", self.root, ())
            return plugin.connect("plugin", self.home, options, mapping, address)
        return INITS[self.kind](self.home, options, mapping)

    def restart(self) -> Driver:
        """Go on with a new instance, without telling the earlier one."""
        self._driver = self.open()
        return self._driver

    def got(self, layer_id: str) -> AbstractContextManager[str]:
        """The mounted layer."""
        return got(self.driver, layer_id)

    def mounts(self) -> list[str]:
        """What is mounted below the root."""
        return mounts_inside(os.path.realpath(self.root))

    def close(self) -> list[str]:
        """Take everything down; what was left that should not be."""
        points = self.mounts()
        servers = [pid for point in points for pid in servers_of(point)]
        if self._driver is not None:
            self._driver.cleanup()
        faults = [f"still mounted: {point}" for point in self.mounts()]
        if not wait_until(lambda: not any(is_running(pid) for pid in servers), 10):
            faults.append("a server still runs")
        self._stack.close()
        return faults


@contextmanager
def got(driver: Driver, layer_id: str) -> Iterator[str]:
    """A mounted layer of any driver."""
    path = driver.get(layer_id)
    try:
        yield path
    finally:
        driver.put(layer_id)


@contextmanager
def make_rig(kind: str, base: str | None = None) -> Iterator[Rig]:
    """A rig in a new directory, removed with everything in it."""
    root = tempfile.mkdtemp(prefix=f"{kind}-", dir=base)
    rig = Rig(kind, root)
    try:
        yield rig
    finally:
        faults = rig.close()
        if not faults:
            shutil.rmtree(root)
    assert not faults, "; ".join(faults)


@pytest.fixture(params=DRIVERS)
def rig(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Iterator[Rig]:
    """Every driver in turn."""
    with make_rig(request.param, os.fspath(tmp_path)) as made:
        yield made


@pytest.fixture(params=LAYERED)
def layered_rig(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Iterator[Rig]:
    """The drivers that mount, in turn."""
    with make_rig(request.param, os.fspath(tmp_path)) as made:
        yield made
