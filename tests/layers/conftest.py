"""A layer store in a directory of the test's own, on each driver."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs.layers.layer import Layer, LayerHandle
from unionfs.layers.opening import open_store
from unionfs.layers.store import LayerStore

DRIVERS = ("vfs", "unionfs", "overlay2")


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver's name in turn."""
    name: str = request.param
    return name


class Workshop:
    """A store that can be closed and opened again, and what the tests make with it."""

    def __init__(self, root: Path, driver: str) -> None:
        self.root = root
        self.driver = driver
        self.store: LayerStore = open_store(root, driver)

    @property
    def layerdb(self) -> Path:
        return self.root / "image" / self.driver / "layerdb"

    def record(self, layer: Layer) -> Path:
        """The directory of a layer's records."""
        return self.layerdb / "sha256" / layer.chain_id[7:]

    def reopen(self, *, recover: bool = True) -> LayerStore:
        """As a new process finds it."""
        self.store.close()
        self.store = open_store(self.root, self.driver, recover=recover)
        return self.store

    def layer(self, parent: str, fill: Callable[[str], None]) -> LayerHandle:
        """moby's createLayer: what ``fill`` does in a container on ``parent``, as a layer."""
        rw = self.store.create_rw_layer("some-mount_" + os.urandom(8).hex(), parent)
        with rw.mounted() as path:
            fill(path)
        with rw.tar_stream() as stream:
            layer = self.store.register(stream, parent)
        assert rw.release() == []
        return layer

    def trees(self) -> set[str]:
        """The driver's trees on disk."""
        if self.driver == "vfs":
            return set(os.listdir(self.root / "vfs" / "dir"))
        return {name for name in os.listdir(self.root / self.driver) if len(name) >= 64}

    def own_files(self, tree: str) -> Path:
        """Where the files lie that a tree itself holds."""
        home = self.root / self.driver
        return home / "dir" / tree if self.driver == "vfs" else home / tree / "diff"

    def assert_nothing_leaked(self) -> None:
        """Every tree on disk belongs to something, and nothing is half done."""
        assert self.trees() == self.store.driver_ids()
        assert self.store.incomplete() == []
        tmp = self.layerdb / "tmp"
        assert not tmp.exists() or sorted(os.listdir(tmp)) == []


@pytest.fixture
def shop(tmp_path: Path, driver: str) -> Iterator[Workshop]:
    """A store on each driver, checked for leaks at the end."""
    workshop = Workshop(tmp_path / "root", driver)
    yield workshop
    workshop.assert_nothing_leaked()
    workshop.store.cleanup()
    workshop.store.close()


@pytest.fixture
def vfs_shop(tmp_path: Path) -> Iterator[Workshop]:
    """A store on the driver that does least, for what does not depend on it."""
    workshop = Workshop(tmp_path / "root", "vfs")
    yield workshop
    workshop.store.cleanup()
    workshop.store.close()


def write(path: str, contents: str, mode: int = 0o644) -> Callable[[str], None]:
    """Something to do in a container: write a file."""

    def fill(root: str) -> None:
        full = os.path.join(root, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "w", encoding="utf-8") as file:
            file.write(contents)
        os.chmod(full, mode)

    return fill
