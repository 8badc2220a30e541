"""Registries for tests of pulling and pushing: an open one, one with a login, and one with faults; a pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engines.registry import FaultyProxy, Registry, faulty_proxy, running_registry
from tests.e2e.engines.registry_tools import large, skopeo
from tests.engines.image_archives import Made, to_tar
from tests.layers.archives import files
from unionfs.engines.images import ImageStore
from unionfs.layers import open_store


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "open") as running:
        yield running


@pytest.fixture(scope="module")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that asks for a login."""
    with running_registry(tmp_path_factory.mktemp("registry") / "closed", login=True) as running:
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultyProxy]:
    with faulty_proxy(registry.address) as running:
        yield running


@pytest.fixture
def images(tmp_path: Path) -> Iterator[ImageStore]:
    with open_store(tmp_path / "root", "vfs") as layers:
        yield ImageStore(layers)


@pytest.fixture(scope="module")
def app(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An image of three layers in the registry, as ``app:v1``."""
    made = Made([large(), files(a="two"), files(b="three")])
    where = tmp_path_factory.mktemp("app") / "app.tar"
    where.write_bytes(to_tar(made.old_docker()))
    skopeo("copy", f"docker-archive:{where}", f"docker://{registry.address}/app:v1")
    return made
