"""Docker with containerd's image store: on our snapshotter it shows what it shows on containerd's own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.e2e.engines.awkward_image import AwkwardImage, build
from tests.e2e.engines.containerd_engine import FAULTS, MERGED, OURS, STOCK, ContainerdEngine
from tests.e2e.engines.docker_engine import DockerEngine
from tests.e2e.engines.private import private_cell
from tests.e2e.engines.scenario import Fault, Record, differences, play
from tests.support.sandbox import needs_root


def _major_version() -> int:
    said = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)", said)
    assert found is not None, said
    return int(found[1])


pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        _major_version() < 28,
        reason="Docker before 28 is used with the plugin; tests/e2e/systems runs this with a later one",
    ),
]
needs_root()


class Store(ContainerdEngine):
    """The containerd of dockerd."""

    @property
    def namespace(self) -> str:
        """What dockerd calls its own."""
        return "moby"


@dataclass
class DockerOnContainerd(DockerEngine):
    """dockerd that leaves images and the trees of containers to a containerd."""

    store: Store | None = None

    def restart(self) -> None:
        """dockerd dies and comes back; then our snapshotter, beneath it and containerd."""
        super().restart()
        assert self.store is not None
        if self.store.snapshotter == OURS:
            running = self("ps", "-q").split()
            self.store.restart()
            assert self("ps", "-q").split() == running

    def leftovers(self) -> list[str]:
        """Snapshots on disk and in containerd's list, and contents."""
        assert self.store is not None
        return self.store.leftovers()


@contextmanager
def docker_on(snapshotter: str, faults: tuple[Fault, ...], *options: str) -> Iterator[DockerOnContainerd]:
    """dockerd and containerd, running; at the end they are stopped, and nothing may be left of them."""
    with private_cell() as cell:
        store = Store(f"containerd on {snapshotter}", cell, snapshotter, "moby", snapshotter_options=options)
        config = cell.root / "tmp/daemon.json"
        config.write_text(json.dumps({"features": {"containerd-snapshotter": True}}))
        engine = DockerOnContainerd(
            name=f"docker on {snapshotter}",
            cell=cell,
            program=("/usr/bin/docker", "-H", f"unix://{cell.root}/docker.sock"),
            environment={"DOCKER_BUILDKIT": "0"},
            storage_driver=snapshotter,
            daemon_options=("--config-file", str(config), "--containerd", f"{cell.root}/c.sock"),
            faults=faults,
            store=store,
        )
        try:
            store.start_all()
            engine.start_all()
            yield engine
        except BaseException as error:
            error.add_note(engine.logs() + store.logs())
            raise
        engine.stop_all()
        store.stop_all()
        cell.shell('! mountpoint -q "$1" || umount "$1"', cell.root / "root")
        cell.assert_quiet()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def stock(image: AwkwardImage) -> Record:
    """What Docker shows on containerd's own storage."""
    with docker_on(STOCK, FAULTS) as engine:
        return play(engine, image)


@pytest.mark.parametrize("options", [(), ("--no-overlay-unpack",)], ids=["overlay-unpack", "no-overlay-unpack"])
def test_story(options: tuple[str, ...], image: AwkwardImage, stock: Record) -> None:
    with docker_on(OURS, () if options else MERGED, *options) as engine:
        assert "io.containerd.snapshotter.v1" in engine("info", "-f", "{{.DriverStatus}}")
        record = play(engine, image)
    assert differences(record, stock, FAULTS) == []
