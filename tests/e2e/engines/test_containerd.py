"""containerd on our snapshotter, and on its own overlayfs: the same story, the same results."""

from __future__ import annotations

import json
import os
import re
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
    config_version,
    containerd_engine,
    control_group,
    write_archive,
)
from tests.e2e.engines.cri import Kubelet
from tests.e2e.engines.private import private_cell
from tests.e2e.engines.scenario import Record, assert_linked, census, differences, play, without_times
from tests.engines.snapshotter_client import SnapshotterClient
from tests.engines.snapshotter_rig import ROOTED
from tests.support.mounts import wait_until
from tests.support.sandbox import needs_root
from unionfs.engines.snapshotter import Info, Kind
from unionfs.errors import SnapshotExistsError

pytestmark = [pytest.mark.engine]
needs_root()

MACHINE = {"architecture": "amd64", "os": "linux"}


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
    # As the guide says: containerd 2 cannot look at the container's root, and so not unmount it.
    tasks = engine.cell.root / "run/io.containerd.runtime.v2.task"
    engine.cell.run("umount", "--lazy", tasks / engine.namespace / key / "rootfs")
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


def test_two_namespaces_share_the_layers_of_an_image(image: AwkwardImage) -> None:
    with containerd_engine(OURS, options=("--share-layers",)) as engine:
        engine.load(image.archive)
        chain = {info.parent: info.name for info in in_namespace(engine, engine.namespace)}
        directories = sorted(os.listdir(engine.directories))
        client = SnapshotterClient(f"{engine.cell.root}/c.sock", f"{engine.namespace}-two")
        try:
            layer = ""
            while layer in chain:  # as containerd's unpacker asks
                parent, layer = layer, chain[layer]
                with pytest.raises(SnapshotExistsError):
                    client.prepare(f"extract-1-x {layer}", parent, {"containerd.io/snapshot.ref": layer, **ROOTED})
                assert (client.stat(layer).parent, client.stat(layer).kind) == (parent, Kind.COMMITTED)
            assert len(chain) == len(image.layers)
            assert sorted(os.listdir(engine.directories)) == directories
            # They stay as long as one namespace needs them.
            engine.remove_all()
            (mount,) = client.prepare("container", layer, ROOTED)
            assert "passwd" in engine.cell.shell('ls "$1/etc"', mount.source)
            client.remove("container")
            for layer in reversed(chain.values()):
                client.remove(layer)
        finally:
            client.close()
        engine("images", "rm", "--sync", "none")  # collects the garbage
        assert engine.leftovers() == []
        engine("namespaces", "rm", f"{engine.namespace}-two")


def in_namespace(engine: ContainerdEngine, namespace: str) -> list[Info]:
    """What containerd lists there, parents first."""
    client = SnapshotterClient(f"{engine.cell.root}/c.sock", namespace)
    found = {info.parent: info for info in client.walk()}
    client.close()
    ordered, name = [], ""
    while name in found:
        ordered.append(found[name])
        name = found[name].name
    return ordered


def many_layers(image: AwkwardImage, archive: Path, count: int) -> None:
    """An image of the given one's first layer and more: each adds a file, changes one and empties a directory."""
    layers = [image.layers[0].read_bytes()]
    for number in range(count):
        text = f"{number}\n"
        layer = LayerTar().dir("layers").file(f"layers/{number}", text).file("layers/last", text)
        layers.append(bytes(layer.dir("only").opaque("only").file(f"only/{number}", text)))
    write_archive(archive, "hundred:latest", layers, {"config": {}, **MACHINE})


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


# The directories that the guides name, as empty ones of the cell's own. /run is already.
OWN_DIRECTORIES = """
for directory in /etc /var/lib; do
    mkdir -p "$0/tmp/own$directory/upper" "$0/tmp/own$directory/work"
    mount -t overlay -o "lowerdir=$directory,upperdir=$0/tmp/own$directory/upper,workdir=$0/tmp/own$directory/work" \
        overlay "$directory"
done
rm -rf /etc/containerd /var/lib/unionfs /var/lib/containerd
mkdir /etc/containerd /var/lib/unionfs /var/lib/containerd
for directory in unionfs containerd; do mount -t tmpfs own "/var/lib/$directory"; done
"""


def test_the_guide_as_written(image: AwkwardImage, repository: Path) -> None:
    document = repository / "docs/containerd.md"
    (config,) = blocks(document, "toml")
    servers, use = blocks(document, "sh")
    with control_group() as group, private_cell() as cell:
        archive = cell.root / "tmp/image.tar"
        write_archive(archive, "image:latest", [path.read_bytes() for path in image.layers], {"config": {}, **MACHINE})
        script = [
            OWN_DIRECTORIES,
            f"cat >/etc/containerd/config.toml <<'END'\n{config}END",
            "cd $0/tmp",
            servers.replace("&", ">>log 2>&1 &"),
            # Until both answer; then each line of the guide has to work.
            "for try in $(seq 600); do ctr snapshots --snapshotter unionfs ls >>log 2>&1 && break; sleep 0.1; done",
            "set -x",
            use.replace("ctr run ", f"ctr run --cgroup {group} "),
            "set +x; tar -tzf changes.tar.gz >/dev/null",
            'for try in $(seq 600); do [ -z "$(ls /var/lib/unionfs/snapshotter/snapshots)" ] && break; sleep 0.1; done',
            "ls /var/lib/unionfs/snapshotter/snapshots",
            "kill %2; wait %2 || true; kill %1; wait %1",
        ]
        done = cell.run("unshare", "-m", "bash", "-euc", "\n".join(script), cell.root, check=False, timeout_s=240)
        said = done.stdout.decode()
        assert done.returncode == 0, done.stderr.decode()[-3000:] + (cell.root / "tmp/log").read_text()[-2000:]
        assert "unionfs" in said.splitlines()[0]
        assert "it works\n" in said
        assert said.endswith("\n")
        cell.assert_quiet()


HERE = {
    2: """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/library/pause:1"
  restrict_oom_score_adj = true
""",
    3: """
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "docker.io/library/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
""",
}


def test_a_pod(image: AwkwardImage, repository: Path) -> None:
    """The guide's configuration for containerd's CRI plugin, with a pod on it."""
    toml = blocks(repository / "docs/kubernetes.md", "toml")[config_version() - 2]
    ours = toml[toml.index("[plugins") : toml.index("\n[[" if "[[" in toml else "\n[proxy")]  # the rest the engine has
    # What this machine's lack of a network and of privileges asks for, and an image that sleeps for the sandbox.
    config = HERE[config_version()] + ours
    with containerd_engine(OURS, config=config, cri=True) as engine:
        layers = [path.read_bytes() for path in image.layers]
        pause = engine.cell.root / "tmp/pause.tar"
        write_archive(pause, "pause:1", layers[:1], {"config": {"Entrypoint": ["/bin/sleep", "100000"]}, **MACHINE})
        engine.load(pause)
        engine.load(image.archive)
        kubelet = Kubelet(engine.cell.root / "c.sock", engine.unique)
        try:
            assert engine.ref(TAG) in kubelet.images()
            pod = kubelet.run_pod("pod")
            one, two = (kubelet.run_container(pod, name, TAG, "/bin/sleep", "100000") for name in ("one", "two"))
            kubelet.execute(one, "/bin/sh", "-c", "rm -r /d2; dd if=/dev/zero of=/written bs=1024 count=2048; sync")
            assert kubelet.execute(two, "/bin/sh", "-c", "ls -d /d2 /written 2>/dev/null || true") == "/d2\n"
            assert {one, two} <= {*engine.snapshots()}
            engine.restart()
            assert kubelet.execute(one, "/bin/sh", "-c", "stat -c %s /written") == "2097152\n"
            # The statistics are gathered every ten seconds.
            assert wait_until(lambda: kubelet.writable_layer_bytes(one) >= 2 << 20, 60)
            assert kubelet.writable_layer_bytes(two) < 1 << 20
            kubelet.remove_container(one)
            kubelet.remove_pod(pod)
        finally:
            kubelet.close()
        engine.remove_all()
        assert engine.leftovers() == []
