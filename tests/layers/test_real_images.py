"""Images of a real Docker in our store: a Debian that was worked in, and one with every awkward entry.

All layers of what ``docker save`` writes are registered; what our drivers mount then is, in everything that a program
can see of a tree, what the kernel shows of Docker's own directories; every layer is exported as it came.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pytest

from quickstart_steps import rootfs
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, default_directory
from tests.drivers.engine import pack, run_docker
from tests.e2e.engines import awkward_image
from tests.layers.conftest import DRIVERS
from tests.support.mounts import take_down
from tests.support.snapshot import Snapshot, assert_same, snapshot, without_root_time
from unionfs.layers import LayerStore, fsck, open_store

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]  # the Debian may have to be built first

_PIECE_BYTES = 1 << 20

# Each RUN is a layer. Packages go, files are edited, a directory is made anew, kinds change, and what Debian has none
# of is added: holes, devices, names of 255 bytes, and one that is not UTF-8.
DOCKERFILE = r"""
FROM debian:0
ENV DEBIAN_FRONTEND=noninteractive
RUN dpkg --purge --force-depends tzdata && useradd --create-home someone
RUN rm -r /usr/share/doc && mkdir /usr/share/doc && echo new > /usr/share/doc/readme
RUN echo more >> /etc/motd && ln /etc/motd /etc/motd.link && chmod 700 /etc/apt && chown -R 5:6 /var/lib/dpkg/info \
 && mv /usr/share/perl5 /usr/share/moved && rm /etc/issue && mkdir /etc/issue && touch /etc/issue/inside
RUN truncate -s 5M /hole && echo end >> /hole && mkfifo /fifo && mknod /null c 1 3 && chmod 4711 /usr/bin/passwd \
 && perl -e 'for ("n" x 255, "caf\xe9") { open F, ">", "/home/someone/$_" or die; print F "x" }' \
 && rm -r /etc/issue && ln -s os-release /etc/issue
RUN apt-get --version > /root/versions && rm /fifo && echo a file > /fifo && rm -r /home/someone
"""


@dataclass(frozen=True, slots=True)
class SavedImage:
    """What Docker has of an image, and what it saves.

    Attributes:
        archive: the output of ``docker save``.
        directories: where Docker has the layers' files, top first.
    """

    archive: Path
    directories: tuple[str, ...]

    def diff_ids(self, tar: tarfile.TarFile) -> list[str]:
        """The digests of the layers, base first, as the image's configuration has them."""
        found: list[str] = json.load(_member(tar, self._manifest(tar)["Config"]))["rootfs"]["diff_ids"]
        return found

    def layers(self, tar: tarfile.TarFile) -> Iterator[IO[bytes]]:
        """The layers' archives, base first."""
        for name in self._manifest(tar)["Layers"]:
            yield _member(tar, name)

    @staticmethod
    def _manifest(tar: tarfile.TarFile) -> dict[str, list[str]]:
        manifest: list[dict[str, list[str]]] = json.load(_member(tar, "manifest.json"))
        return manifest[0]

    def tree(self, point: Path) -> Snapshot:
        """The tree as the kernel's overlayfs shows it of Docker's directories."""
        point.mkdir()
        # Relative, since the names of many directories do not fit into a page.
        home = os.path.dirname(os.path.dirname(self.directories[0]))
        lowers = ":".join(os.path.relpath(path, home) for path in self.directories)
        subprocess.run(
            ["mount", "-t", "overlay", "-o", f"ro,lowerdir={lowers}", "overlay", point], cwd=home, check=True
        )
        try:
            return shown(point)
        finally:
            take_down(os.fspath(point))


def _member(tar: tarfile.TarFile, name: str | list[str]) -> IO[bytes]:
    assert isinstance(name, str)
    # Docker saves a layer that comes twice as a link to the first.
    file = tar.extractfile(name)
    assert file is not None
    return file


def shown(root: str | Path) -> Snapshot:
    """Everything about a tree, but for the root's time and the link counts; names that share a file are in it.

    An overlay shows the link count of the layer that has the file, also when names of it were removed above.
    """
    found = without_root_time(snapshot(os.fspath(root), check_ino=False))
    return {path: replace(entry, nlink=0) for path, entry in found.items()}


@pytest.fixture(scope="module")
def saved() -> Iterator[dict[str, SavedImage]]:
    """Both images, by name."""
    with Sandbox() as sandbox:
        debian = rootfs.debian("bookworm", Storage(default_directory()), sandbox, refresh=False)
    with tempfile.TemporaryDirectory(prefix="images-") as name:
        directory = Path(name)
        pack(Path(debian.path), directory / "imported.tar")
        (directory / "context").mkdir()
        (directory / "context/Dockerfile").write_text(DOCKERFILE)
        awkward = awkward_image.build(directory / "awkward")
        try:
            run_docker(
                directory,
                f"""
                docker import imported.tar debian:0
                docker build -q --network none -t debian:1 context
                docker load -q -i {awkward.archive}
                for image in debian:1 {awkward_image.TAG}; do
                    docker save -o ${{image%:*}}.tar $image
                    docker inspect -f '{{{{json .GraphDriver.Data}}}}' $image > ${{image%:*}}.json
                done
                """,
            )
            os.unlink(directory / "imported.tar")
            yield {name: _read(directory, name) for name in ("debian", awkward_image.NAME)}
        finally:
            for point in ("root/plugins", "root"):
                take_down(os.fspath(directory / point))


def _read(directory: Path, name: str) -> SavedImage:
    data = json.loads((directory / f"{name}.json").read_text())
    return SavedImage(directory / f"{name}.tar", (data["UpperDir"], *data["LowerDir"].split(":")))


@contextmanager
def registered(root: Path, driver: str, image: SavedImage) -> Iterator[tuple[LayerStore, list[str]]]:
    """A store with the image's layers, and their chain ids, base first."""
    with open_store(root, driver) as store, tarfile.open(image.archive) as tar:
        chain = [""]
        for diff_id, layer in zip(image.diff_ids(tar), image.layers(tar), strict=True):
            chain.append(store.register(layer, chain[-1], expected_diff_id=diff_id).chain_id)
        try:
            yield store, chain[1:]
        finally:
            store.cleanup()


def assert_exported_as_it_came(store: LayerStore, chain: list[str], image: SavedImage) -> None:
    """Every layer's stream, byte for byte."""
    layers = {str(chain_id): layer for chain_id, layer in store.map().items()}
    with tarfile.open(image.archive) as tar:
        for chain_id, theirs in zip(chain, image.layers(tar), strict=True):
            with layers[chain_id].tar_stream() as ours:
                assert _digest(ours) == _digest(theirs) == layers[chain_id].diff_id


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver != "vfs"])
def test_debian(saved: dict[str, SavedImage], driver: str, tmp_path: Path) -> None:
    """Issue 4, point 2. Not with vfs, which copies the whole Debian for each layer."""
    image = saved["debian"]
    with registered(tmp_path / "root", driver, image) as (store, chain):
        assert len(chain) == 6
        with store.create_rw_layer("box", chain[-1]).mounted() as path:
            ours = shown(path)
        theirs = image.tree(tmp_path / "theirs")
        assert len(theirs) > 5000
        assert_same(ours, theirs, (driver, "docker"))
        assert ours["null"].kind == "char"
        assert ours["usr/bin/passwd"].mode == 0o4711
        assert ours["etc/motd.link"].links == ("etc/motd",)
        assert ours["hole"].size == (5 << 20) + 4
        assert_exported_as_it_came(store, chain, image)
        assert fsck(store) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_awkward_entries(saved: dict[str, SavedImage], driver: str, tmp_path: Path) -> None:
    """Issue 4, point 2."""
    image = saved[awkward_image.NAME]
    with registered(tmp_path / "root", driver, image) as (store, chain):
        assert len(chain) == 6
        with store.create_rw_layer("box", chain[-1]).mounted() as path:
            ours = shown(path)
            for name, text in awkward_image.EXPECTED.items():
                assert (Path(path, name).read_text() if text is not None else None) == text
                assert os.path.lexists(Path(path, name)) == (text is not None), name
        for names in awkward_image.EXPECTED_LINKS:
            for name in names:
                assert {name, *ours[name].links} == names
        theirs = image.tree(tmp_path / "theirs")
        # Docker 20.10 merges a directory with the one below that the same layer hides with a whiteout.
        assert theirs.pop("whiteout/dir/old").kind == "file"
        # It drops what has no value.
        without = tuple(item for item in ours["modes/xattr"].xattrs if item[0] != "user.none")
        assert theirs["modes/xattr"].xattrs == without != ours["modes/xattr"].xattrs
        theirs["modes/xattr"] = replace(theirs["modes/xattr"], xattrs=ours["modes/xattr"].xattrs)
        assert_same(ours, theirs, (driver, "docker"))
        assert_exported_as_it_came(store, chain, image)
        assert fsck(store, deep=True) == []
