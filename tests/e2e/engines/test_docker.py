"""Docker on our drivers through the plugin, and on its own overlay2: the same story, the same results."""

from __future__ import annotations

import pytest

from tests.e2e.engines.awkward_image import AwkwardImage, build
from tests.e2e.engines.docker_engine import FAULTS, docker_engine
from tests.e2e.engines.scenario import Record, differences, play
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
needs_root()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def stock(image: AwkwardImage) -> Record:
    """What Docker shows on its own overlay2."""
    with docker_engine() as engine:
        return play(engine, image)


@pytest.mark.parametrize("driver", ["unionfs", "overlay2", "vfs"])
def test_story(driver: str, image: AwkwardImage, stock: Record) -> None:
    with docker_engine(plugin_driver=driver) as engine:
        record = play(engine, image)
        # Nothing failed on the way, and nothing needed an explanation.
        assert [line for line in engine.plugin_log() if ": serving " not in line and ": SIGTERM: " not in line] == []
    assert differences(record, stock, FAULTS) == []
