"""containerd on our snapshotter, and on its own overlayfs: the same story, the same results."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engines.awkward_image import TAG, AwkwardImage, LayerTar, build
from tests.e2e.engines.containerd_engine import (
    FAULTS,
    MERGED,
    OURS,
    STOCK,
    ContainerdEngine,
    containerd_engine,
    write_archive,
)
from tests.e2e.engines.scenario import Record, assert_linked, census, differences, play, without_times
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
needs_root()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def stock(image: AwkwardImage) -> Record:
    """What containerd shows on its own overlayfs."""
    with containerd_engine(STOCK, faults=FAULTS) as engine:
        return play(engine, image)


@pytest.mark.parametrize("options", [(), ("--no-overlay-unpack",)], ids=["overlay-unpack", "no-overlay-unpack"])
def test_story(options: tuple[str, ...], image: AwkwardImage, stock: Record) -> None:
    with containerd_engine(OURS, options=options, faults=() if options else MERGED) as engine:
        record = play(engine, image)
    assert_linked(record.trees["changed"], [{"links/a", "links/far/c"}])
    assert differences(record, stock, FAULTS) == []


@pytest.fixture(scope="module")
def engine(image: AwkwardImage) -> Iterator[ContainerdEngine]:
    """containerd on ours with the image loaded, for tests that leave it as it was."""
    with containerd_engine(OURS) as made:
        made.load(image.archive)
        yield made
        made.remove_all()
        assert made.leftovers() == []


def servers(engine: ContainerdEngine, key: str) -> list[int]:
    """The processes, in the cell's numbers, that serve a snapshot's mount."""
    source = json.loads(engine("snapshots", "--snapshotter", OURS, "info", key))["Name"]
    assert source == key
    words = engine("snapshots", "--snapshotter", OURS, "mounts", "/mnt", key).split()
    return [int(line.split()[0]) for line in engine.cell.processes() if words[-2] in line.split()]


def test_a_container_whose_server_was_killed_starts_again(engine: ContainerdEngine) -> None:
    key = engine.start(TAG, "killed")
    engine.execute("killed", "/bin/sh", "-c", "echo kept >/kept; rm -r /d2; sync")
    pids = servers(engine, key)
    assert pids
    engine.cell.run("kill", f"-{signal.SIGKILL}", *map(str, pids))
    engine("tasks", "rm", "-f", key)
    engine("tasks", "start", "-d", key)
    said = engine.execute("killed", "/bin/sh", "-c", "cat /kept; ls -d /d2 2>/dev/null || echo gone")
    assert said == "kept\ngone\n"
    assert servers(engine, key) != pids
    engine("tasks", "rm", "-f", key)
    engine("containers", "rm", key)


def test_snapshots_by_hand(engine: ContainerdEngine) -> None:
    def ctr(*words: str | Path) -> str:
        return engine("snapshots", "--snapshotter", OURS, *words)

    committed = [line.split() for line in ctr("ls").splitlines() if line.split()[-1] == "Committed"]
    (top,) = {words[0] for words in committed} - {words[1] for words in committed if len(words) > 2}
    base = engine.cell.root / "tmp/mnt"
    base.mkdir()
    ctr("prepare", "by hand/with a space", top)
    assert "by hand/with a space" in engine.snapshots()
    mounts = ctr("mounts", base, "by hand/with a space").strip()
    assert mounts.startswith("mount -t bind ")
    engine.cell.shell(f"{mounts}\necho new >{base}/newer; rm {base}/etc/passwd; umount {base}")
    ctr("label", "by hand/with a space", "a.b/c=d")
    assert json.loads(ctr("info", "by hand/with a space"))["Labels"]["a.b/c"] == "d"
    ctr("commit", "by-hand", "by hand/with a space")
    info = json.loads(ctr("info", "by-hand"))
    assert (info["Kind"], info["Parent"]) == ("Committed", top)
    assert "by-hand" in ctr("usage", "by-hand")
    ctr("view", "look", "by-hand")
    script = f"cat {base}/newer; ls {base}/etc; touch {base}/x 2>&1 || true; umount {base}"
    said = engine.cell.shell(f"{ctr('mounts', base, 'look').strip()}\n{script}")
    assert said.startswith("new\n")
    assert "passwd" not in said
    assert "Read-only file system" in said
    failed = engine.cell.run(
        "ctr", "-a", f"{engine.cell.root}/c.sock", "-n", engine.namespace, "snapshots", "--snapshotter", OURS,
        "rm", "by-hand", check=False,
    )  # fmt: skip
    assert failed.returncode != 0
    ctr("rm", "look")
    ctr("rm", "by-hand")


def test_ids_are_shifted_without_a_copy(engine: ContainerdEngine) -> None:
    plain = census(engine.run(TAG, "/bin/census"))
    maps = ("--uidmap", "0:200000:65536", "--gidmap", "0:300000:65536", "--remap-labels")
    said = engine.run(
        TAG, "/bin/sh", "-c", "cat /proc/self/uid_map; echo mine >/mine; stat -c %u:%g /mine /etc", options=maps
    )
    assert said.split() == ["0", "200000", "65536", "0:0", "0:0"]
    shifted = census(engine.run(TAG, "/bin/census", options=maps))
    # An owner that the namespace has not is nobody in it.
    known = {path for path, entry in plain.items() if all(int(one) < 65536 for one in entry["owner"].split(":"))}
    assert len(known) > len(plain) - 5
    assert {path: without_times(shifted)[path] for path in known} == {
        path: without_times(plain)[path] for path in known
    }


def test_a_hundred_layers(engine: ContainerdEngine, image: AwkwardImage) -> None:
    archive = engine.cell.root / "tmp/hundred.tar"
    many_layers(image, archive, 100)
    engine.load(archive)
    script = "cat /layers/last; ls /layers | wc -l; ls /only"
    assert engine.run("hundred:latest", "/bin/sh", "-c", script) == "99\n101\n99\n"
    engine("images", "rm", "--sync", engine.ref("hundred:latest"))


def many_layers(image: AwkwardImage, archive: Path, count: int) -> None:
    """An image of the given one's first layer and more: each adds a file, changes one and empties a directory."""
    layers = [image.layers[0].read_bytes()]
    for number in range(count):
        text = f"{number}\n"
        layer = LayerTar().dir("layers").file(f"layers/{number}", text).file("layers/last", text)
        layers.append(bytes(layer.dir("only").opaque("only").file(f"only/{number}", text)))
    write_archive(archive, "hundred:latest", layers, {"architecture": "amd64", "os": "linux", "config": {}})
