"""Interchange with real tools: a home that Docker wrote, images that it saves and loads, umoci and tar."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drivers.engine import extract_member, make_rootfs, pack, run_docker, tree, unpack
from tests.drivers.rig import INITS, LAYERED
from tests.support.mounts import take_down
from tests.support.snapshot import Snapshot, assert_same
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import Driver
from unionfs.testing.rig import got

pytestmark = [pytest.mark.engine]

DOCKERFILE = r"""
FROM base
RUN mkdir -p /data/sub && echo one > /data/one && echo two > /data/sub/two && chmod 4750 /data/one && mkfifo /data/p
RUN rm -r /usr/share/doc && echo changed >> /etc/passwd && mv /data/sub /data/moved && chown 5:6 /data/one
RUN rm -r /data/moved && mkdir /data/moved && echo new > /data/moved/new && ln -s etc/passwd link && ln data/moved/new b
COPY file /copied/file
RUN chmod 700 /copied && rm /data/p && mkdir /data/p && touch /data/p/now-a-directory
"""
CONTAINER = (
    "echo mine > /data/mine; rm /data/one; rm -r /copied; echo x >> /etc/passwd; mkdir -p /data/moved/sub; "
    "mv /link /renamed; mkdir /usr/share/doc; echo again > /usr/share/doc/again"
)
# What Docker puts into every container, beneath what the image has.
OF_THE_ENGINE = ("dev", "proc", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", ".dockerenv")


@dataclass
class Engine:
    """What Docker left behind."""

    directory: Path
    chain: list[str]
    """The driver ids of the image's layers, base first."""
    mount_id: str

    @property
    def init_id(self) -> str:
        """The layer below the container's own."""
        return self.mount_id + "-init"

    def copy_of_home(self, to: Path) -> str:
        """The overlay2 home, to do with as one likes."""
        subprocess.run(["cp", "-a", self.directory / "root/overlay2", to], check=True)
        return os.fspath(to)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="docker-") as name:
        directory = Path(name)
        make_rootfs(directory / "rootfs")
        pack(directory / "rootfs", directory / "base.tar")
        (directory / "context").mkdir()
        (directory / "context/file").write_text("from the context\n")
        (directory / "context/Dockerfile").write_text(DOCKERFILE)
        try:
            run_docker(
                directory,
                f"""
                docker import base.tar base
                docker build -q --network none -t image context
                docker run --network none --name run image sh -c '{CONTAINER}'
                docker diff run > diff
                docker export run > run.tar
                docker save image > image.tar
                docker inspect -f '{{{{.Id}}}}' run > id
                """,
            )
            yield read_engine(directory)
        finally:
            for point in ("root/plugins", "root"):
                take_down(os.fspath(directory / point))


def read_engine(directory: Path) -> Engine:
    layerdb = directory / "root/image/overlay2/layerdb"
    mount = layerdb / "mounts" / (directory / "id").read_text().strip()
    chain = []
    at = (mount / "parent").read_text()
    while at:
        layer = layerdb / at.replace(":", "/")
        chain.append((layer / "cache-id").read_text())
        at = (layer / "parent").read_text() if (layer / "parent").exists() else ""
    return Engine(directory, chain[::-1], (mount / "mount-id").read_text())


def tree_of(driver: Driver, layer_id: str) -> Snapshot:
    with got(driver, layer_id) as root:
        return tree(root)


def without_engine(found: Snapshot) -> Snapshot:
    return {
        path: entry
        for path, entry in found.items()
        if not any(path == name or path.startswith(name + "/") for name in OF_THE_ENGINE) and path != "etc"
    }


def saved_layers(archive: Path) -> list[bytes]:
    """The layers in the output of ``docker save``, base first."""
    manifest = json.loads(extract_member(archive, "manifest.json"))
    return [extract_member(archive, name) for name in manifest[0]["Layers"]]


def build(driver: Driver, layers: list[bytes]) -> str:
    """Apply the layers over each other; the top one's id."""
    parent = ""
    for number, layer in enumerate(layers):
        driver.create(f"layer{number}", parent)
        driver.apply_diff(f"layer{number}", parent, io.BytesIO(layer))
        parent = f"layer{number}"
    return parent


def own_layers(driver: Driver, ids: list[str]) -> list[bytes]:
    """The difference of each layer to the one before."""
    streams = []
    for layer_id, parent in zip(ids, ["", *ids], strict=False):
        with driver.diff(layer_id, parent) as stream:
            streams.append(stream.read())
    return streams


@pytest.mark.parametrize("kind", LAYERED)
def test_home_written_by_docker(engine: Engine, kind: str, tmp_path: Path) -> None:
    unpack(engine.directory / "run.tar", tmp_path / "exported")
    driver = INITS[kind](engine.copy_of_home(tmp_path / "home"), [], IdMapping())
    try:
        assert {*engine.chain, engine.mount_id, engine.init_id} <= set(driver.layer_ids())  # type: ignore[attr-defined]
        # The tree is what the engine's own mount showed.
        assert_same(tree_of(driver, engine.mount_id), tree(tmp_path / "exported"), (kind, "docker export"))
        # So are the changes; the engine lists them in another order.
        changes = [str(change) for change in driver.changes(engine.mount_id, engine.init_id)]
        assert sorted(changes) == sorted((engine.directory / "diff").read_text().splitlines())
        # Every layer's archive makes the same tree as the one that Docker saves. The archives themselves may differ:
        # where Docker writes "opaque", ours names what is gone; it leaves out what was copied up and not changed.
        ours = own_layers(driver, engine.chain)
        theirs = saved_layers(engine.directory / "image.tar")
        assert len(ours) == len(theirs) == 6
        one, two = (INITS["vfs"](str(tmp_path / name), [], IdMapping()) for name in ("ours", "theirs"))
        build(one, ours)
        build(two, theirs)
        for number in range(6):
            assert_same(tree_of(one, f"layer{number}"), tree_of(two, f"layer{number}"), (kind, "docker save"))
        # It can be written to and built upon.
        driver.create_read_write("more", engine.chain[-1])
        with got(driver, "more") as root:
            Path(root, "written").write_text("1")
        assert [str(change) for change in driver.changes("more", engine.chain[-1])] == ["A /written"]
    finally:
        driver.cleanup()


@pytest.mark.parametrize("kind", INITS)
def test_image_saved_by_docker(engine: Engine, kind: str, tmp_path: Path) -> None:
    reference = INITS["overlay2"](engine.copy_of_home(tmp_path / "home"), [], IdMapping())
    driver = INITS[kind](str(tmp_path / kind), [], IdMapping())
    try:
        top = build(driver, saved_layers(engine.directory / "image.tar"))
        assert_same(tree_of(driver, top), tree_of(reference, engine.chain[-1]), (kind, "docker"))
        unpack(engine.directory / "run.tar", tmp_path / "exported")
        driver.create_read_write("run", top)
        with got(driver, "run") as root:
            in_chroot(root, CONTAINER)
            names = set(without_engine(tree(root)))
        assert names == set(without_engine(tree(tmp_path / "exported")))
    finally:
        driver.cleanup()
        reference.cleanup()


@pytest.mark.parametrize("kind", INITS)
def test_our_layers_unpacked_by_umoci_and_tar(engine: Engine, kind: str, tmp_path: Path) -> None:
    driver = INITS[kind](str(tmp_path / kind), [], IdMapping())
    try:
        layers = own_image(driver, engine)
        for number, layer in enumerate(layers):
            (tmp_path / f"{number}.tar").write_bytes(layer)
        unpack(tmp_path / "0.tar", tmp_path / "base")
        assert_same(tree(tmp_path / "base"), tree_of(driver, "base"), ("tar", kind))

        layout = f"{tmp_path}/oci"
        umoci("init", "--layout", layout)
        umoci("new", "--image", f"{layout}:x")
        for number in range(len(layers)):
            umoci("raw", "add-layer", "--image", f"{layout}:x", str(tmp_path / f"{number}.tar"))
        umoci("unpack", "--image", f"{layout}:x", str(tmp_path / "bundle"))
        assert_same(tree(tmp_path / "bundle/rootfs"), tree_of(driver, "run"), ("umoci", kind))
    finally:
        driver.cleanup()


def umoci(*arguments: str) -> None:
    done = subprocess.run(["umoci", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def in_chroot(root: str, script: str) -> None:
    command = ["/usr/sbin/chroot", root, "/bin/sh", "-c", script]
    subprocess.run(command, check=True, env={"PATH": "/bin"})


def own_image(driver: Driver, engine: Engine) -> list[bytes]:
    """An image made with our driver alone: a base, and a layer written through its mount."""
    driver.create("base")
    with open(engine.directory / "base.tar", "rb") as archive:
        driver.apply_diff("base", "", archive)
    driver.create_read_write("middle", "base")
    with got(driver, "middle") as root:
        script = (
            "mkdir -p data/moved copied; echo 1 > data/one; echo 2 > copied/file; ln -s /etc/passwd link; ln data/one b"
        )
        in_chroot(root, script)
        if driver.name != "overlay2":
            os.rename(f"{root}/usr/share", f"{root}/usr/renamed")
            os.mkdir(f"{root}/usr/share")
            os.rename(f"{root}/usr/renamed/doc", f"{root}/usr/share/doc")
    driver.create_read_write("run", "middle")
    with got(driver, "run") as root:
        in_chroot(root, "rm -r /usr/share/doc; " + CONTAINER)
    return own_layers(driver, ["base", "middle", "run"])


def test_our_layers_loaded_by_docker(engine: Engine, tmp_path: Path) -> None:
    """What we export goes into Docker as an image and comes out of it as the same tree."""
    driver = INITS["unionfs"](str(tmp_path / "home"), [], IdMapping())
    try:
        layers = own_image(driver, engine)
        expected = tree_of(driver, "run")
    finally:
        driver.cleanup()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]},
    }
    names = [f"layer{number}.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": ["ours:latest"], "Layers": names}]
    with tempfile.TemporaryDirectory(prefix="docker-") as name:
        directory = Path(name)
        with tarfile.open(directory / "ours.tar", "w") as tar:
            files = [("config.json", json.dumps(config).encode()), ("manifest.json", json.dumps(manifest).encode())]
            for member, content in [*files, *zip(names, layers, strict=True)]:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        run_docker(
            directory,
            """
            docker load -i ours.tar
            docker create --network none --name ours ours
            docker export ours > out.tar
            docker rm ours
            docker rmi ours
            """,
        )
        unpack(directory / "out.tar", tmp_path / "exported")
    assert_same(without_engine(tree(tmp_path / "exported")), without_engine(expected), ("docker", "unionfs"))
