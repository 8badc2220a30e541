"""Docker on our storage in other ways: BuildKit, remapped users, sizes, as fuse-overlayfs, sudden deaths."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.engines.awkward_image import EXPECTED, TAG, AwkwardImage, build
from tests.e2e.engines.docker_engine import docker_engine
from tests.e2e.engines.private import SUB_IDS, USER, CommandFailedError
from tests.e2e.engines.scenario import (
    BUILT_FROM_IMAGE,
    BUILT_FROM_SCRATCH,
    CHANGE,
    FROM_IMAGE,
    FROM_SCRATCH,
    assert_holds,
    build_context,
    census,
    without_times,
)
from tests.support.mounts import mount_program
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
needs_root()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("image"))


def test_buildkit(image: AwkwardImage) -> None:
    """It makes layers with Create, writes to them through Get, and asks for several differences at once."""
    with docker_engine(plugin_driver="unionfs") as engine:
        engine.environment = {"DOCKER_BUILDKIT": "1"}
        engine.load(image.archive)
        context = build_context(engine.cell.root / "tmp")
        for name, text, facts in (
            ("built-from-scratch", FROM_SCRATCH, BUILT_FROM_SCRATCH),
            ("built-from-image", FROM_IMAGE, BUILT_FROM_IMAGE),
        ):
            (context / "Dockerfile").write_text(text)
            engine.build(context, name)
            assert_holds(census(engine.run(name, "/bin/census")), facts)
            again = engine("build", *engine.build_options, context).strip()
            assert again == engine("inspect", "-f", "{{.Id}}", name).strip()  # all of it was in the cache
        assert len(engine.leftovers()) > 20  # the layers of both
        engine.remove_all()
        assert engine.leftovers() == []


def test_remapped_users(tmp_path: Path) -> None:
    """Containers run with the user's subordinate ids, and layers belong to them."""
    image = build(tmp_path / "image", many_ids=False)
    with docker_engine(plugin_driver="unionfs", daemon_options=("--userns-remap", USER)) as engine:
        engine.load(image.archive)
        fresh = census(engine.run(TAG, "/bin/census"))
        assert_holds(fresh, EXPECTED)
        assert fresh["modes/owned"]["owner"] == "1000:1001"
        engine.start(TAG, "one")
        engine.execute("one", "/bin/sh", "-c", CHANGE)
        changed = census(engine.execute("one", "/bin/census"))
        (upper,) = engine.home.glob("*/diff/made")
        assert (upper.stat().st_uid, upper.stat().st_gid) == (SUB_IDS[0], SUB_IDS[0])
        engine.commit("one", "committed")
        committed = census(engine.run("committed", "/bin/census"))
        assert without_times(committed, links=False) == without_times(changed, links=False)
        engine.remove_all()
        assert engine.leftovers() == []


def test_size_of_a_container(image: AwkwardImage) -> None:
    with docker_engine(plugin_driver="unionfs") as engine:
        engine.load(image.archive)
        engine.run_options += ("--storage-opt", "size=8M")
        engine.run(TAG, "/bin/dd", "if=/dev/zero", "of=/file", "bs=1M", "count=4")
        with pytest.raises(CommandFailedError, match=r"No space left on device|Disk quota exceeded"):
            engine.run(TAG, "/bin/dd", "if=/dev/zero", "of=/file", "bs=1M", "count=16")
        engine.remove_all()
        assert engine.leftovers() == []


def test_our_program_as_fuse_overlayfs(image: AwkwardImage, tmp_path: Path) -> None:
    """dockerd's own driver of that name runs the first program of that name in its PATH."""
    (tmp_path / "fuse-overlayfs").symlink_to(mount_program())
    with docker_engine(storage_driver="fuse-overlayfs", path=(tmp_path,)) as engine:
        engine.load(image.archive)
        fresh = census(engine.run(TAG, "/bin/census"))
        assert_holds(fresh, EXPECTED)
        engine.start(TAG, "one")
        engine.execute("one", "/bin/sh", "-c", CHANGE)
        changed = census(engine.execute("one", "/bin/census"))
        assert changed["links/far/c"]["links"] == "links/a"  # which is ours: nobody else keeps them together
        engine.commit("one", "committed")
        committed = census(engine.run("committed", "/bin/census"))
        assert without_times(committed, links=False) == without_times(changed, links=False)
        engine.restart()
        assert without_times(census(engine.execute("one", "/bin/census"))) == without_times(changed)
        engine.remove_all()
        assert engine.leftovers() == []


def test_everything_dies(image: AwkwardImage) -> None:
    """The plugin, its file system servers, dockerd: what was written is there when they come back."""
    with docker_engine(plugin_driver="unionfs") as engine:
        engine.load(image.archive)
        engine.start(TAG, "one")
        engine.start(TAG, "two")
        engine.execute("one", "/bin/sh", "-c", "echo kept >/kept; sync /kept")
        home = f"{engine.home}/"
        servers = [line.split()[0] for line in engine.cell.processes() if "unionfs" in line and home in line]
        assert len(servers) >= 2
        engine.stop_plugin(signal.SIGKILL)
        engine.cell.shell('kill -9 "$@"', *servers)
        engine.kill_engine()
        engine.start_plugin()
        engine.start_engine()
        for name in ("one", "two"):
            engine("kill", name)
        engine("start", "one")
        assert engine.execute("one", "/bin/cat", "/kept") == "kept\n"
        engine.remove_all()
        assert engine.leftovers() == []
