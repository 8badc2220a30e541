"""One driver in a directory of its own, and what the classes of tests have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import Driver, InitFunc
from unionfs.host.mounts import mounts_inside
from unionfs.testing.trees import fill_base


class DriverRig:
    """A root directory with one driver.

    Args:
        root: an empty directory; the driver's home is below it.
        init: opens the driver over its home.
        name: of the home.

    Attributes:
        root, home: the directories.
    """

    def __init__(self, root: str, init: InitFunc, name: str = "driver") -> None:
        self.root = root
        self.home = os.path.join(root, name)
        self._init = init
        self._driver: Driver | None = None

    @property
    def driver(self) -> Driver:
        """The driver, opened without options."""
        if self._driver is None:
            self._driver = self.open()
        return self._driver

    def open(self, options: Sequence[str] = (), id_mapping: IdMapping | None = None) -> Driver:
        """Another instance over the same home, as a new process would have it."""
        return self._init(self.home, options, id_mapping or IdMapping())

    def restart(self) -> Driver:
        """Go on with a new instance, without telling the earlier one."""
        self._driver = self.open()
        return self._driver

    def got(self, layer_id: str) -> AbstractContextManager[str]:
        """The mounted layer."""
        return got(self.driver, layer_id)

    def make_base(self, layer_id: str = "base") -> None:
        """Make a layer of a few files, links and directories (:func:`unionfs.testing.trees.fill_base`)."""
        self.driver.create(layer_id)
        with self.got(layer_id) as root:
            fill_base(root)

    def lines(self, layer_id: str, parent: str) -> list[str]:
        """The changes as ``docker diff`` prints them."""
        return [str(change) for change in self.driver.changes(layer_id, parent)]

    def names(self) -> list[str]:
        """The paths of everything below the root."""
        return sorted(os.path.join(at, name) for at, dirs, files in os.walk(self.root) for name in dirs + files)

    def mounts(self) -> list[str]:
        """What is mounted below the root."""
        return mounts_inside(os.path.realpath(self.root))

    def close(self) -> list[str]:
        """Take everything down; what was left that should not be."""
        if self._driver is not None:
            self._driver.cleanup()
        return [f"still mounted: {point}" for point in self.mounts()]


@contextmanager
def got(driver: Driver, layer_id: str) -> Iterator[str]:
    """A mounted layer of any driver."""
    path = driver.get(layer_id)
    try:
        yield path
    finally:
        driver.put(layer_id)


class DriverTests:
    """What a class of tests has to know about its driver: say it in a subclass.

    Attributes:
        reserved_ids: ids that the driver's layout uses itself, beyond those that no driver takes.
        renames_directories: whether a directory of a parent can be renamed; if not, that is EXDEV, as in Docker's
            overlay2.
    """

    reserved_ids: ClassVar[Sequence[str]] = ()
    renames_directories: ClassVar[bool] = True

    def open_driver(self, home: str, options: Sequence[str], id_mapping: IdMapping) -> Driver:
        """Open the driver over ``home``, as an :data:`unionfs.drivers.InitFunc` does; called anew for each test."""
        raise NotImplementedError("a class of tests has to say how its driver is opened: def open_driver(...)")

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[DriverRig]:
        """The driver in an empty directory."""
        rig = DriverRig(os.fspath(tmp_path), self.open_driver)
        try:
            yield rig
        finally:
            left = rig.close()
        assert left == []
