"""One driver in a directory of its own, for the tests that every driver has to pass.

A test that takes the fixture ``rig`` runs once for each of the drivers in ``DRIVERS``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from tests.drivers.plugin_server import plugin_server
from tests.support.mounts import is_running, servers_of, wait_until
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import overlay2, plugin, union, vfs
from unionfs.drivers.contract import Driver, InitFunc
from unionfs.drivers.plugin import find_plugin
from unionfs.testing.rig import DriverRig

DRIVERS = ("unionfs", "overlay2", "vfs", "plugin")
LAYERED = ("unionfs", "overlay2")
INITS: dict[str, InitFunc] = {"unionfs": union.init, "overlay2": overlay2.init, "vfs": vfs.init}


class Rig(DriverRig):
    """A root directory with one driver of ours.

    Attributes:
        kind: which one, of ``DRIVERS``.
    """

    def __init__(self, kind: str, root: str) -> None:
        super().__init__(root, self._open_plugin if kind == "plugin" else INITS[kind], kind)
        self.kind = kind
        self._stack = ExitStack()
        if kind == "plugin":
            self._stack.enter_context(plugin_server(os.path.join(root, "plugin.sock"), vfs.init))

    @property
    def layered(self) -> bool:
        """Whether the driver mounts, and knows exactly what was changed."""
        return self.kind in LAYERED

    def _open_plugin(self, home: str, options: Sequence[str], id_mapping: IdMapping) -> Driver:
        return plugin.connect("plugin", home, options, id_mapping, find_plugin("plugin", self.root, ()))

    def close(self) -> list[str]:
        """Take everything down; what was left that should not be."""
        servers = [pid for point in self.mounts() for pid in servers_of(point)]
        faults = super().close()
        if not wait_until(lambda: not any(is_running(pid) for pid in servers), 10):
            faults.append("a server still runs")
        self._stack.close()
        return faults


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
