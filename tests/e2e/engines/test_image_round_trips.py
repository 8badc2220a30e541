"""Images from and to a real registry and the tools people use: what comes back is what went."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.engines.awkward_image import AwkwardImage, build
from tests.e2e.engines.docker_engine import docker_engine
from tests.e2e.engines.podman import podman
from tests.e2e.engines.private import USER as USER_OF_CELL
from tests.e2e.engines.private import private_cell
from tests.e2e.engines.registry import FaultyProxy, Registry
from tests.e2e.engines.registry_tools import fetch, give, large, skopeo, unionfs
from tests.engines.image_archives import Made, to_tar
from tests.layers.archives import files
from unionfs.archive.compression import open_archive
from unionfs.engines.images import ImageStore

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytest_plugins = ["tests.e2e.engines.registry_fixtures"]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("awkward") / "image")


def test_an_awkward_image_goes_round(registry: Registry, awkward: AwkwardImage, tmp_path: Path) -> None:
    where = f"{registry.address}/round/awkward:v1"
    skopeo("copy", f"docker-archive:{awkward.archive}", f"docker://{where}")
    store = tmp_path / "store"
    assert unionfs(store, "image", "pull", where).strip() == awkward.image_id
    (facts,) = json.loads(unionfs(store, "image", "ls", "--json"))
    assert [layer["diff_id"] for layer in facts["layers"]] == list(awkward.diff_ids)
    unionfs(store, "layer", "verify")
    for kind, transport in (("docker-archive", "docker-archive"), ("oci-tar", "oci-archive"), ("oci-dir", "oci")):
        out = tmp_path / kind
        unionfs(store, "image", "export", where, "-f", kind, "-o", str(out))
        config = json.loads(skopeo("inspect", "--config", f"{transport}:{out}"))
        assert config["rootfs"]["diff_ids"] == list(awkward.diff_ids)
        # To read all of it, skopeo compares each layer with its digest.
        skopeo("copy", f"{transport}:{out}", f"dir:{tmp_path / 'dir'}-{kind}")
    with open(awkward.layers[0], "rb") as original:
        exported = (tmp_path / "oci-dir").glob("blobs/sha256/*")
        assert hashlib.file_digest(original, "sha256").hexdigest() in {_plain_digest(path) for path in exported}
    digest = unionfs(store, "image", "push", where, f"{registry.address}/other/awkward:v2").strip()
    skopeo("copy", f"docker://{registry.address}/other/awkward@{digest}", f"oci:{tmp_path / 'pulled'}:v2")
    config = json.loads(skopeo("inspect", "--config", f"oci:{tmp_path / 'pulled'}:v2"))
    assert config["rootfs"]["diff_ids"] == list(awkward.diff_ids)
    assert set(awkward.diff_ids) <= {f"sha256:{_plain_digest(p)}" for p in tmp_path.glob("pulled/blobs/sha256/*")}


def _plain_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(open_archive(file)[1].read()).hexdigest()


@pytest.mark.parametrize("compress", ["gzip", "zstd"])
def test_a_push_compresses_what_the_registry_lacks(registry: Registry, tmp_path: Path, compress: str) -> None:
    made = Made([large(7), files(a=compress)])
    (tmp_path / "app.tar").write_bytes(to_tar(made.old_docker()))
    store = tmp_path / "store"
    unionfs(store, "image", "import", str(tmp_path / "app.tar"))
    where = f"{registry.address}/compressed/{compress}:v1"
    digest = unionfs(store, "image", "push", "app:v1", where, "--compress", compress).strip()
    assert unionfs(store, "image", "push", "app:v1", where, "--compress", compress).strip() == digest
    skopeo("copy", f"docker://{where}", f"oci:{tmp_path / 'pulled'}:v1")
    assert set(made.diff_ids) <= {f"sha256:{_plain_digest(p)}" for p in tmp_path.glob("pulled/blobs/sha256/*")}
    # Another store compresses to the same bytes.
    unionfs(tmp_path / "second", "image", "import", str(tmp_path / "app.tar"))
    again = f"{registry.address}/compressed/{compress}-again:v1"
    assert unionfs(tmp_path / "second", "image", "push", "app:v1", again, "--compress", compress).strip() == digest


def test_umoci_unpacks_our_layout(awkward: AwkwardImage, tmp_path: Path) -> None:
    store = tmp_path / "store"
    unionfs(store, "image", "import", str(awkward.archive))
    unionfs(store, "image", "export", "awkward", "-f", "oci-dir", "-o", str(tmp_path / "layout"))
    subprocess.run(
        ["umoci", "raw", "unpack", "--image", f"{tmp_path / 'layout'}:latest", tmp_path / "tree"],
        check=True,
        timeout=120,
    )
    assert (tmp_path / "tree/bin/census").is_file()
    # And what umoci and skopeo write is read.
    skopeo("copy", f"docker-archive:{awkward.archive}", f"oci:{tmp_path / 'theirs'}:tag")
    subprocess.run(["umoci", "tag", "--image", f"{tmp_path / 'theirs'}:tag", "second"], check=True, timeout=60)
    ids = unionfs(tmp_path / "b", "image", "import", str(tmp_path / "theirs"), "--only", "second").split()
    assert len(ids) == 1


@pytest.mark.parametrize("which", ["podman", "docker"])
def test_engines_load_our_archives(awkward: AwkwardImage, tmp_path: Path, which: str) -> None:
    store = tmp_path / "store"
    unionfs(store, "image", "import", str(awkward.archive))
    with podman("stock", "root") if which == "podman" else docker_engine() as engine:
        for kind in ("docker-archive", "oci-tar") if which == "podman" else ("docker-archive",):
            archive = engine.cell.root / f"{kind}.tar"
            unionfs(store, "image", "export", "awkward", "-f", kind, "-o", str(archive))
            engine.load(archive)
            (found,) = json.loads(engine("image", "inspect", "awkward"))
            assert found["RootFS"]["Layers"] == list(awkward.diff_ids)
            # And back.
            saved = engine.cell.root / f"saved-{kind}.tar"
            engine.save("awkward", saved)
            assert unionfs(tmp_path / kind, "image", "import", str(saved)).strip() == awkward.image_id
            engine("rmi", "-f", "awkward")


def test_dockers_data_root(awkward: AwkwardImage) -> None:
    with docker_engine(storage_driver="overlay2") as engine:
        cell = engine.cell
        where = {"UNIONFS_ROOT": f"{cell.root}/root"}
        engine.load(awkward.archive)
        engine("tag", "awkward", "second:v2")
        engine.stop_all()
        # With Docker stopped, its images are ours, ...
        (facts,) = json.loads(cell.run("unionfs", "image", "ls", "--json", "--driver=overlay2", env=where).stdout)
        assert (facts["id"], facts["names"]) == (awkward.image_id, ["awkward:latest", "second:v2"])
        assert [layer["diff_id"] for layer in facts["layers"]] == list(awkward.diff_ids)
        # ... and what we do with them is Docker's when it starts.
        made = Made([files(a="ours"), files(b="too")])
        (cell.root / "ours.tar").write_bytes(to_tar(made.old_docker("ours:v1")))
        cell.run("unionfs", "image", "import", "--driver=overlay2", cell.root / "ours.tar", env=where)
        cell.run("unionfs", "image", "rm", "--driver=overlay2", "awkward", env=where)
        engine.start_all()
        assert sorted(engine("images", "--format", "{{.Repository}}:{{.Tag}}").split()) == ["ours:v1", "second:v2"]
        (found,) = json.loads(engine("image", "inspect", "ours:v1"))
        assert (found["Id"], found["RootFS"]["Layers"]) == (made.image_id, made.diff_ids)
        engine.save("ours:v1", cell.root / "saved.tar")
        engine("rmi", "ours:v1", "second:v2")


def test_an_ordinary_user() -> None:
    with private_cell() as cell:
        image = build(cell.root / "image", many_ids=False)  # no user can have all ids
        store = {"UNIONFS_ROOT": f"{cell.root}/home/store"}

        def ours(*words: str | Path) -> str:
            return cell.run("unionfs", "image", *words, user=USER_OF_CELL, env=store).stdout.decode().strip()

        assert ours("import", image.archive) == image.image_id
        (facts,) = json.loads(ours("ls", "--json"))
        assert [layer["diff_id"] for layer in facts["layers"]] == list(image.diff_ids)
        ours("export", "awkward", "-o", cell.root / "home/out.tar")
        config = json.loads(skopeo("inspect", "--config", f"docker-archive:{cell.root / 'home/out.tar'}"))
        assert config["rootfs"]["diff_ids"] == list(image.diff_ids)
        assert image.image_id in ours("rm", "awkward")
        cell.assert_quiet()


def test_blobs_are_taken_from_other_repositories(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    image = fetch(images, f"{proxy.address}/app:v1")
    assert image.names == (f"{proxy.address}/app:v1", image.names[1])
    assert f"{proxy.address}/app@sha256:" in image.names[1]
    give(images, image, f"{proxy.address}/mounted/app:v1")
    mounts = proxy.requests("POST", "mount=")
    assert len(mounts) == 3
    assert len(proxy.requests("POST", "uploads/")) == 3 + 1  # and the configuration
    assert fetch(images, f"{proxy.address}/mounted/app:v1").image_id == image.image_id


def test_what_is_here_is_not_fetched(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    fetch(images, f"{proxy.address}/app:v1")
    proxy.seen.clear()
    fetch(images, f"{proxy.address}/app:v1")
    assert len(proxy.requests("GET", "/blobs/")) == 1  # the configuration
