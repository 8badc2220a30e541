"""The calls of a graph driver on a deep layer: mounting it, and finding and packing what was changed in it.

The kernel's overlayfs and our file system are driven by the same code over the same home, so what differs is the file
system: how it is mounted, and what it leaves in a layer.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from bench_parts.rig import Rig
from bench_parts.samples import Group, Row, Sample
from unionfs import __version__
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import overlay2, union
from unionfs.drivers.contract import Driver, InitFunc

OURS: Final = "unionfs driver"
OVERLAY2: Final = "overlay2 driver"

GET = Row("driver-get", "get: mount the layer", group=Group.DRIVERS)
CHANGES = Row("driver-changes", "list what was changed", group=Group.DRIVERS)
DIFF = Row("driver-diff", "pack what was changed", group=Group.DRIVERS)
DIFF_SIZE = Row("driver-diff-size", "its size", group=Group.DRIVERS)
PUT = Row("driver-put", "put: unmount the layer", group=Group.DRIVERS)
ROWS: Final = (GET, CHANGES, DIFF, DIFF_SIZE, PUT)

_CHANGED_FILES: Final = 100
_CHANGED_BYTES: Final = 4096
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class DriverPeer:
    """A driver to measure."""

    name: str
    version: str
    init: InitFunc


def driver_peers() -> list[DriverPeer]:
    """Both that have layers to mount."""
    return [
        DriverPeer(OVERLAY2, f"overlayfs of Linux {os.uname().release}", overlay2.init),
        DriverPeer(OURS, f"unionfs {__version__}", union.init),
    ]


class DriverCalls:
    """Calls each driver on a layer above many others, in which some files of them were changed.

    Args:
        home: where the drivers' home is made when it is first needed.
    """

    def __init__(self, home: str) -> None:
        self._home = home

    @property
    def rows(self) -> tuple[Row, ...]:
        return ROWS

    @property
    def once(self) -> bool:
        return False

    def measure(self, rig: Rig, peer: DriverPeer) -> Mapping[str, Sample]:
        """Do each call once, on a fresh layer."""
        layers, files = rig.scale.driver_layers, rig.scale.driver_files
        if not os.path.exists(self._home):
            _make_layers(peer.init(self._home, [], IdMapping()), layers, files // layers)
        driver = peer.init(self._home, [], IdMapping())
        top = f"layer{layers - 1}"
        driver.create_read_write("run", top)
        try:
            _change(driver.get("run"), layers, files // layers)
            driver.put("run")
            rig.settle()
            calls: list[tuple[Row, Callable[[], object]]] = [
                (GET, lambda: os.listdir(driver.get("run"))),
                (CHANGES, lambda: list(driver.changes("run", top))),
                (DIFF, lambda: _read(driver, "run", top)),
                (DIFF_SIZE, lambda: driver.diff_size("run", top)),
                (PUT, lambda: driver.put("run")),
            ]
            return {row.name: Sample(_milliseconds(call)) for row, call in calls}
        finally:
            driver.cleanup()
            driver.remove("run")


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


def _make_layers(driver: Driver, layers: int, files: int) -> None:
    """Layers of one directory each; written where a mount would write, which is much faster."""
    parent = ""
    for layer in range(layers):
        name = f"layer{layer}"
        driver.create(name, parent)
        directory = os.path.join(driver.get(name) if not parent else driver.get_metadata(name)["UpperDir"], name)
        if not parent:
            driver.put(name)
        os.mkdir(directory)
        for number in range(files):
            with open(f"{directory}/file{number}", "wb") as file:
                file.write(b"%d %d" % (layer, number))
        parent = name


def _change(root: str, layers: int, files: int) -> None:
    """Change files all over the layers, remove and rename some, and add a directory."""
    os.mkdir(f"{root}/new")
    for number in range(min(_CHANGED_FILES, layers * files // 4)):
        path = f"{root}/layer{number % layers}/file{number // layers}"
        match number % 4:
            case 0 | 1:
                with open(path, "r+b") as file:
                    file.write(bytes(_CHANGED_BYTES))
            case 2:
                os.unlink(path)
            case 3:
                os.rename(path, f"{root}/new/file{number}")


def _read(driver: Driver, layer: str, parent: str) -> int:
    with driver.diff(layer, parent) as stream:
        return sum(map(len, iter(functools.partial(stream.read, _PIECE), b"")))
