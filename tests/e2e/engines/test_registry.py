"""Images from and to a real registry: round trips with the tools people use, and what can go wrong between."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines.awkward_image import AwkwardImage, build
from tests.e2e.engines.docker_engine import docker_engine
from tests.e2e.engines.podman import podman
from tests.e2e.engines.private import USER as USER_OF_CELL
from tests.e2e.engines.private import private_cell
from tests.e2e.engines.registry import (
    PASSWORD,
    USER,
    Answer,
    FaultyProxy,
    Registry,
    Seen,
    faulty_proxy,
    running_registry,
)
from tests.e2e.engines.terminal import terminal
from tests.engines.image_archives import Made, sha256, to_json, to_tar
from tests.layers.archives import archive, files, member
from unionfs.archive.compression import open_archive
from unionfs.engines.images import Image, ImageStore, Platform, import_images, parse_reference
from unionfs.engines.images.registry import Access, Credentials, Patience, find_credentials, pull, push, run
from unionfs.errors import (
    ArchiveError,
    DigestMismatchError,
    ImageFormatError,
    ImageNotFoundError,
    RegistryError,
    UnionfsError,
)
from unionfs.layers import collect, open_store

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

REPOSITORY = Path(__file__).resolve().parents[3]
UNIONFS = REPOSITORY / ".venv/bin/unionfs"
SKOPEO = ("skopeo", "--insecure-policy")
IMPATIENT = Access(patience=Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.05))


def skopeo(*words: str | Path, login: bool = False) -> str:
    """Run skopeo without TLS."""
    extra: list[str] = []
    if words[0] == "copy":
        extra = ["-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
        if login:
            extra += ["--src-creds", f"{USER}:{PASSWORD}", "--dest-creds", f"{USER}:{PASSWORD}"]
    elif words[0] == "inspect":
        extra = ["--tls-verify=false"]
    command = [*SKOPEO, words[0], *extra, *words[1:]]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    ).stdout


def unionfs(root: Path, *words: str, status: int = 0, stdin: str = "", environ: dict[str, str] | None = None) -> str:
    """Run our command; its output, or what it says when it is to fail."""
    done = subprocess.run(
        [UNIONFS, *words, f"--root={root}"],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        env={**os.environ, **(environ or {})},
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "open") as running:
        yield running


@pytest.fixture(scope="module")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that asks for a login."""
    with running_registry(tmp_path_factory.mktemp("registry") / "closed", login=True) as running:
        yield running


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> AwkwardImage:
    return build(tmp_path_factory.mktemp("awkward") / "image")


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultyProxy]:
    with faulty_proxy(registry.address) as running:
        yield running


@pytest.fixture
def images(tmp_path: Path) -> Iterator[ImageStore]:
    with open_store(tmp_path / "root", "vfs") as layers:
        yield ImageStore(layers)


def large(seed: int = 1, size: int = 400_000) -> bytes:
    """A layer that cannot be compressed."""
    return archive([member("data", random.Random(seed).randbytes(size))])


@pytest.fixture(scope="module")
def app(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An image of three layers in the registry, as ``app:v1``."""
    made = Made([large(), files(a="two"), files(b="three")])
    where = tmp_path_factory.mktemp("app") / "app.tar"
    where.write_bytes(to_tar(made.old_docker()))
    skopeo("copy", f"docker-archive:{where}", f"docker://{registry.address}/app:v1")
    return made


def fetch(images: ImageStore, name: str, platform: str = "", **access: Any) -> Image:
    chosen = Platform.parse(platform) if platform else None
    return run(lambda: pull(images, parse_reference(name), platform=chosen, access=replace(IMPATIENT, **access)))


def give(images: ImageStore, image: Image, name: str, **access: Any) -> str:
    return run(lambda: push(images, image, parse_reference(name), access=replace(IMPATIENT, **access)))


def nothing_is_left(images: ImageStore) -> bool:
    files_left = [path for path in Path(images.root).rglob("*") if path.is_file() and path.name != "lock"]
    return images.all() == [] and images.layers.map() == {} and collect(images.layers) == [] and files_left == []


# Round trips


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


# What goes wrong


def test_a_cut_off_download_goes_on(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    cuts = iter([100_000, 0, 70_000, 5])

    def cut(request: Seen, answer: Answer) -> Answer:
        if len(answer.body) > 5000 and (after := next(cuts, None)) is not None:
            answer.cut_after = after
        return answer

    proxy.fault = cut
    image = fetch(images, f"{proxy.address}/app:v1", parallel=1)
    assert list(image.diff_ids) == app.diff_ids
    ranges = [one.headers["Range"] for one in proxy.requests("GET", "/blobs/") if "Range" in one.headers]
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in ranges]
    assert starts == sorted(starts)
    assert starts[0] <= 100_000
    assert starts[-1] > 100_000


def test_a_registry_that_knows_no_parts(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    whole: list[bytes] = []
    seen = threading.Event()

    def cut(request: Seen, answer: Answer) -> Answer:
        if answer.status == 200 and len(answer.body) > 5000:
            whole.append(answer.body)
            if not seen.is_set():
                seen.set()
                answer.cut_after = 200_000
        elif answer.status == 206:
            return Answer(200, {}, whole[0])
        return answer

    proxy.fault = cut
    assert list(fetch(images, f"{proxy.address}/app:v1").diff_ids) == app.diff_ids
    assert seen.is_set()


@pytest.mark.parametrize("content_range", ["", "bytes 0-5/400", "bytes x-y/z"])
def test_another_part_than_asked_for(proxy: FaultyProxy, app: Made, images: ImageStore, content_range: str) -> None:
    cut_once = iter([True])
    lied: list[int] = []

    def lie(request: Seen, answer: Answer) -> Answer:
        if answer.status == 200 and len(answer.body) > 5000 and next(cut_once, False):
            answer.cut_after = 200_000
        elif answer.status == 206 and not lied:
            lied.append(1)
            answer.headers = {"Content-Range": content_range}
        return answer

    proxy.fault = lie
    assert list(fetch(images, f"{proxy.address}/app:v1").diff_ids) == app.diff_ids
    assert lied


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, None])
def test_trouble_that_passes(proxy: FaultyProxy, app: Made, images: ImageStore, status: int | None) -> None:
    failed: dict[str, int] = {}

    def fail(request: Seen, answer: Answer) -> Answer | None:
        key = request.method + request.path.partition("?")[0]
        failed[key] = failed.get(key, 0) + 1
        if failed[key] > 2:
            return answer
        return None if status is None else Answer(status, {"Retry-After": "0"}, b"busy")

    proxy.fault = fail
    image = fetch(images, f"{proxy.address}/app:v1")
    assert list(image.diff_ids) == app.diff_ids
    assert min(failed.values()) == 3


@pytest.mark.parametrize("what", ["/manifests/", "/blobs/"])
def test_trouble_that_does_not_pass(proxy: FaultyProxy, app: Made, images: ImageStore, what: str) -> None:
    proxy.fault = lambda request, answer: Answer(503, {}, b"") if what in request.path else answer
    with pytest.raises(RegistryError, match=r"503.*try again later"):
        fetch(images, f"{proxy.address}/app:v1")
    assert len({one.path for one in proxy.seen if what in one.path}) * 4 == len(proxy.requests("GET", what))
    assert nothing_is_left(images)


def changed_byte(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def test_a_wrong_blob(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    def change(request: Seen, answer: Answer) -> Answer:
        if "/blobs/" in request.path and len(answer.body) > 5000:
            answer.body = changed_byte(answer.body)
        return answer

    proxy.fault = change
    with pytest.raises(DigestMismatchError, match="was expected"):
        fetch(images, f"{proxy.address}/app:v1")
    assert nothing_is_left(images)


def test_a_blob_that_is_wrong_once(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    once = iter([True])

    def change(request: Seen, answer: Answer) -> Answer:
        if len(answer.body) > 5000 and next(once, False):
            answer.body = changed_byte(answer.body)
        return answer

    proxy.fault = change
    assert list(fetch(images, f"{proxy.address}/app:v1").diff_ids) == app.diff_ids
    assert next(once, None) is None


def test_too_much(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    def more(request: Seen, answer: Answer) -> Answer:
        if len(answer.body) > 5000:
            return Answer(answer.status, {}, answer.body + b"x")
        return answer

    proxy.fault = more
    with pytest.raises(RegistryError, match=r"more than the .* bytes that it promised"):
        fetch(images, f"{proxy.address}/app:v1")
    proxy.fault = lambda request, answer: Answer(200, {}, b" " * (5 << 20))
    with pytest.raises(RegistryError, match="too much"):
        fetch(images, f"{proxy.address}/app:v1")
    assert nothing_is_left(images)


def test_a_pinned_digest(registry: Registry, proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    digest = json.loads(skopeo("inspect", f"docker://{registry.address}/app:v1"))["Digest"]
    assert fetch(images, f"{proxy.address}/app:v9@{digest}").image_id == app.image_id
    images.remove(app.image_id)
    proxy.fault = lambda request, answer: Answer(200, answer.headers | {"Content-Length": "1"}, b" ")
    with pytest.raises(DigestMismatchError, match="the manifest"):
        fetch(images, f"{proxy.address}/app@{digest}")
    with pytest.raises(ImageNotFoundError, match="has no nothing:latest"):
        proxy.fault = lambda request, answer: answer
        fetch(images, f"{proxy.address}/nothing")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"[]", "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (to_json({"schemaVersion": 1, "fsLayers": []}), "schema 1"),
        (to_json({"schemaVersion": 2, "manifests": [], "layers": []}), "at the same time"),
        (to_json({"schemaVersion": 2, "manifests": []}), "nothing for"),
        (
            to_json(
                {
                    "schemaVersion": 2,
                    "manifests": [
                        {"digest": "sha256:" + "1" * 64, "size": 1, "platform": {"os": "a", "architecture": "b"}}
                    ]
                    * 2,
                }
            ),
            "a/b",
        ),
    ],
)
def test_hostile_manifests(proxy: FaultyProxy, app: Made, images: ImageStore, manifest: bytes, message: str) -> None:
    proxy.fault = lambda request, answer: Answer(200, {}, manifest)
    with pytest.raises(ImageFormatError, match=message):
        fetch(images, f"{proxy.address}/app:v1")
    assert nothing_is_left(images)


@pytest.mark.parametrize("change", ["fewer layers", "swapped layers", "missing blob", "another layer"])
def test_manifests_that_do_not_fit(proxy: FaultyProxy, app: Made, images: ImageStore, change: str) -> None:
    def lie(request: Seen, answer: Answer) -> Answer:
        if "/manifests/" not in request.path:
            return answer
        manifest = json.loads(answer.body)
        layers = manifest["layers"]
        if change == "fewer layers":
            layers.pop()
        elif change == "swapped layers":
            layers.reverse()
        elif change == "missing blob":
            layers[1]["digest"] = "sha256:" + "0" * 64
        else:
            layers[1] = layers[2]
        return Answer(200, {"Content-Type": answer.headers["Content-Type"]}, to_json(manifest))

    proxy.fault = lie
    with pytest.raises((ImageFormatError, DigestMismatchError, RegistryError, ArchiveError)):
        fetch(images, f"{proxy.address}/app:v1")
    assert nothing_is_left(images)


def test_layers_come_side_by_side(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    together = threading.Barrier(3)

    def wait(request: Seen) -> None:
        if "/blobs/" in request.path and app.image_id not in request.path:
            together.wait(60)  # breaks if they came one after the other

    proxy.before = wait
    assert list(fetch(images, f"{proxy.address}/app:v1", parallel=3).diff_ids) == app.diff_ids
    assert not together.broken


def test_platforms(registry: Registry, images: ImageStore) -> None:
    entries = []
    made = {}
    for architecture in ("amd64", "arm64"):
        made[architecture] = Made([files(a=architecture)], {"architecture": architecture})
        (image,) = import_images(images, io.BytesIO(to_tar(made[architecture].old_docker())))
        digest = give(images, image, f"{registry.address}/multi:{architecture}")
        manifest = _get(f"http://{registry.address}/v2/multi/manifests/{digest}")
        entries.append(
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": digest,
                "size": len(manifest),
                "platform": {"os": "linux", "architecture": architecture},
            }
        )
        images.remove(image.image_id)
    kind = "application/vnd.oci.image.index.v1+json"
    index = to_json({"schemaVersion": 2, "mediaType": kind, "manifests": entries})
    request = urllib.request.Request(
        f"http://{registry.address}/v2/multi/manifests/all", index, {"Content-Type": kind}, method="PUT"
    )
    urllib.request.urlopen(request, timeout=60).close()
    for architecture in ("amd64", "arm64"):
        image = fetch(images, f"{registry.address}/multi:all", platform=f"linux/{architecture}")
        assert image.image_id == made[architecture].image_id
        assert f"{registry.address}/multi@{sha256(index)}" in image.names
    with pytest.raises(ImageFormatError, match="choose with --platform among: linux/amd64, linux/arm64"):
        fetch(images, f"{registry.address}/multi:all", platform="linux/riscv64")
    with pytest.raises(ImageFormatError, match="is for linux/amd64, not for linux/arm64"):
        fetch(images, f"{registry.address}/multi:amd64", platform="linux/arm64")


def _get(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        contents: bytes = response.read()
    return contents


# Uploads


@pytest.mark.parametrize("fault", ["lost request", "lost answer", "forgotten"])
def test_an_upload_in_pieces_goes_on(proxy: FaultyProxy, images: ImageStore, fault: str) -> None:
    made = Made([large(len(fault))])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    patches = iter(range(1000))

    def lose(request: Seen) -> Answer | None:
        lost = request.method == "PATCH" and next(patches) in (1, 4)
        return Answer(503 if fault == "lost request" else 404, {}, b"") if lost else None

    def lose_answer(request: Seen, answer: Answer) -> Answer | None:
        return None if request.method == "PATCH" and next(patches) in (1, 4) else answer

    if fault == "lost answer":
        proxy.fault = lose_answer
    else:
        proxy.before = lose
    give(images, image, f"{proxy.address}/pieces:{fault.replace(' ', '-')}", upload_bytes=50_000)
    sent = [one.headers["Content-Range"] for one in proxy.requests("PATCH")]
    assert len(sent) > len(set(sent))
    if fault == "lost request":
        # The registry was asked how much it has, and got only what it lacked.
        assert len(proxy.requests("GET", "/blobs/uploads/")) == 2
        assert len(sent) == len(set(sent)) + 2
    proxy.before, proxy.fault = lambda request: None, lambda request, answer: answer
    images.remove(image.image_id)
    assert fetch(images, f"{proxy.address}/pieces:{fault.replace(' ', '-')}").image_id == made.image_id


def test_trouble_in_an_upload_passes(proxy: FaultyProxy, images: ImageStore) -> None:
    made = Made([large(99, 150_000), files(a="b")])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    failed: dict[str, int] = {}

    def fail(request: Seen) -> Answer | None:
        key = request.method + request.path.partition("/uploads/")[0]
        failed[key] = failed.get(key, 0) + 1
        return Answer(502, {}, b"") if failed[key] <= 1 else None

    proxy.before = fail
    give(images, image, f"{proxy.address}/trouble/app:v1")
    images.remove(image.image_id)
    assert fetch(images, f"{proxy.address}/trouble/app:v1").image_id == made.image_id


def test_a_damaged_layer_is_not_pushed(registry: Registry, images: ImageStore) -> None:
    made = Made([files(a="good")])
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    tree = Path(images.root).parents[1] / "vfs/dir" / images.layers_of(image)[0].cache_id
    (tree / "a").write_text("evil")
    with pytest.raises(UnionfsError):
        give(images, image, f"{registry.address}/damaged:v1")
    with pytest.raises(ImageNotFoundError):
        fetch(images, f"{registry.address}/damaged:v1")


# Logins


def test_basic_login(closed_registry: Registry, tmp_path: Path) -> None:
    made = Made()
    (tmp_path / "app.tar").write_bytes(to_tar(made.old_docker()))
    store, where = tmp_path / "store", f"{closed_registry.address}/app:v1"
    unionfs(store, "image", "import", str(tmp_path / "app.tar"))
    nobody = {"HOME": str(tmp_path / "nobody"), "XDG_RUNTIME_DIR": str(tmp_path / "nobody")}
    by_hand = ("--username", USER, "--password-stdin")
    assert "asks who you are" in unionfs(store, "image", "push", "app:v1", where, status=1, environ=nobody)
    message = unionfs(store, "image", "push", "app:v1", where, *by_hand, stdin="wrong", status=1, environ=nobody)
    assert f"refused the login of {USER}" in message
    assert "wrong" not in message
    unionfs(store, "image", "push", "app:v1", where, *by_hand, stdin=PASSWORD + "\n", environ=nobody)
    # Where skopeo, Podman and Buildah leave their login.
    auth = tmp_path / "auth.json"
    subprocess.run(
        ["skopeo", "login", "--tls-verify=false", "-u", USER, "--password-stdin", closed_registry.address],
        input=PASSWORD,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "REGISTRY_AUTH_FILE": str(auth)},
    )
    assert (
        unionfs(tmp_path / "b", "image", "pull", where, environ={"REGISTRY_AUTH_FILE": str(auth)}).strip()
        == made.image_id
    )
    # And where Docker does.
    (tmp_path / "home/.docker").mkdir(parents=True)
    auth.rename(tmp_path / "home/.docker/config.json")
    home = {"HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "nobody")}
    assert unionfs(tmp_path / "c", "image", "pull", where, environ=home).strip() == made.image_id


class TokenServer:
    """Makes a proxy ask for Bearer tokens, and gives them."""

    def __init__(self, proxy: FaultyProxy, *, lifetime: int = 1000) -> None:
        self.proxy = proxy
        self.lifetime = lifetime
        self.scopes: list[str] = []
        self.token = ""
        self.uses = 0
        proxy.before = self.answer

    def answer(self, request: Seen) -> Answer | None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        given = headers.get("authorization", "")
        if request.path.startswith("/token"):
            self.scopes.append(urllib.parse.unquote_plus(request.path))
            if given != Credentials(USER, PASSWORD).basic():
                return Answer(401, {}, b"{}")
            self.token, self.uses = f"t{len(self.scopes)}", 0
            return Answer(200, {}, to_json({"token": self.token}))
        self.uses += 1
        if self.token and given == f"Bearer {self.token}" and self.uses <= self.lifetime:
            return None
        realm = f'Bearer realm="http://{self.proxy.address}/token",service="s",scope="repository:app:pull"'
        return Answer(401, {"WWW-Authenticate": realm}, b"{}")


def test_bearer_tokens(proxy: FaultyProxy, app: Made, images: ImageStore) -> None:
    server = TokenServer(proxy)
    with pytest.raises(RegistryError, match="does not let everybody in"):
        fetch(images, f"{proxy.address}/app:v1")
    with pytest.raises(RegistryError, match="refused the login"):
        fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, "x"))
    assert nothing_is_left(images)
    server.scopes.clear()
    image = fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, PASSWORD))
    assert len(server.scopes) == 1  # one token for all
    assert "service=s" in server.scopes[0]
    assert "scope=repository:app:pull" in server.scopes[0]
    give(images, image, f"{proxy.address}/token/app:v1", credentials=Credentials(USER, PASSWORD))
    assert "repository:token/app:pull,push repository:app:pull" in server.scopes[-1]
    # Tokens that end after a few requests are replaced.
    images.remove(image.image_id)
    server.lifetime, server.token = 2, ""
    before = len(server.scopes)
    fetch(images, f"{proxy.address}/app:v1", credentials=Credentials(USER, PASSWORD), parallel=1)
    assert len(server.scopes) >= before + 2


def test_a_login_is_for_the_registry_only(closed_registry: Registry, images: ImageStore) -> None:
    made = Made()
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    known: dict[str, Any] = {"credentials": Credentials(USER, PASSWORD)}
    give(images, image, f"{closed_registry.address}/redirected:v1", **known)
    images.remove(image.image_id)
    with ExitStack() as stack:
        front = stack.enter_context(faulty_proxy(closed_registry.address))
        storage = stack.enter_context(faulty_proxy(closed_registry.address))
        # The storage knows who asks by the address, as that of clouds does.
        secret = Credentials(USER, PASSWORD).basic()
        opener = urllib.request.build_opener()
        opener.addheaders = [("Authorization", secret)]

        def from_storage(request: Seen) -> Answer:
            with opener.open(f"http://{closed_registry.address}{request.path.partition('?')[0]}", timeout=60) as found:
                return Answer(200, {}, found.read())

        storage.before = from_storage
        front.fault = lambda request, answer: (
            Answer(307, {"Location": f"http://{storage.address}{request.path}?signed"}, b"")
            if "/blobs/" in request.path and answer.status == 200
            else answer
        )
        assert fetch(images, f"{front.address}/redirected:v1", **known).image_id == made.image_id
        assert len(storage.requests("GET", "/blobs/")) == 3
        assert [one for one in front.seen if "Authorization" in {name.title() for name in one.headers}]
        assert not [one for one in storage.seen if "Authorization" in {name.title() for name in one.headers}]
        front.fault = lambda request, answer: Answer(307, {"Location": request.path}, b"")
        with pytest.raises(RegistryError, match="from one place to the next"):
            fetch(images, f"{front.address}/redirected:v1", **known)


def test_tls(tmp_path: Path, images: ImageStore) -> None:
    certificates = tmp_path / "certs"
    certificates.mkdir()
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out ca.crt -days 2 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1",
        shell=True,
        check=True,
        cwd=certificates,
        capture_output=True,
        timeout=60,
    )
    made = Made()
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    with running_registry(tmp_path / "registry", certificates=certificates) as registry:
        with pytest.raises(RegistryError, match="its certificate is not trusted"):
            give(images, image, f"{registry.address}/app:v1", plain_http=False)
        give(images, image, f"{registry.address}/app:v1", plain_http=False, cert_dir=str(certificates))
        images.remove(image.image_id)
        fetch(images, f"{registry.address}/app:v1", plain_http=False, cert_dir=str(certificates))


# People


def test_a_terminal_shows_bars(proxy: FaultyProxy, app: Made, tmp_path: Path) -> None:
    shown = threading.Event()

    def half(request: Seen, answer: Answer) -> Answer:
        if len(answer.body) > 5000 and not shown.is_set():
            answer.cut_after = 200_000
        return answer

    def wait(request: Seen) -> None:
        if "Range" in request.headers:
            shown.wait(60)

    proxy.fault, proxy.before = half, wait
    command = [str(UNIONFS), "image", "pull", f"{proxy.address}/app:v1", f"--root={tmp_path / 'root'}"]
    with terminal(command) as screen:
        screen.wait_for(f"{app.diff_ids[0][7:19]} downloading")
        screen.wait_for(" KiB of 391 KiB")
        shown.set()
        screen.wait_for(app.image_id)
        assert screen.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["downloading", "unpacking"])
def test_an_interrupt_leaves_nothing(
    proxy: FaultyProxy, app: Made, tmp_path: Path, when: str, number: signal.Signals
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def stall(request: Seen) -> None:
        blob = "/blobs/" in request.path and app.image_id not in request.path
        # The first layer is large: while the others wait, it is downloading, or it is there.
        if blob and (when == "downloading" or len(proxy.requests("GET", "/blobs/")) > 2):
            reached.set()
            go_on.wait(60)

    proxy.before = stall
    command = [str(UNIONFS), "image", "pull", "--parallel=1", f"{proxy.address}/app:v1", f"--root={tmp_path / 'root'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert reached.wait(60)
            process.send_signal(number)
            assert process.wait(60) == 128 + number
        finally:
            go_on.set()
            process.kill()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    with open_store(tmp_path / "root") as layers:
        images = ImageStore(layers)
        assert nothing_is_left(images)


def test_who_cannot_be_reached(images: ImageStore) -> None:
    with pytest.raises(RegistryError, match=r"127.0.0.1:1: .*try again later"):
        fetch(images, "127.0.0.1:1/app")
    with pytest.raises(RegistryError):
        fetch(images, "no-such-host.invalid/app")


def test_credentials_files(tmp_path: Path) -> None:
    def auth(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text(
        json.dumps(
            {
                "auths": {
                    "https://index.docker.io/v1/": {"auth": auth("hub:a:b")},
                    "quay.io": {"auth": auth("general:x")},
                    "quay.io/team": {"auth": auth("team:x")},
                    "ghcr.io": {"identitytoken": "token"},
                    "bad.io": {"auth": "???"},
                },
                "credHelpers": {"helped.io": "for-the-test", "missing.io": "not-there"},
            }
        )
    )
    helper = tmp_path / "bin/docker-credential-for-the-test"
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\nread url\n[ "$1" = get ] && echo "{\\"Username\\":\\"h\\",\\"Secret\\":\\"$url\\"}"\n'
    )
    helper.chmod(0o755)
    environ = {"DOCKER_CONFIG": str(tmp_path / "docker"), "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}

    def find(name: str) -> Credentials | None:
        return find_credentials(parse_reference(name), environ)

    assert find("alpine") == Credentials("hub", "a:b")
    assert find("quay.io/other/app") == Credentials("general", "x")
    assert find("quay.io/team/app") == Credentials("team", "x")
    assert find("ghcr.io/a/b") == Credentials(identity_token="token")
    assert find("bad.io/a") is None
    assert find("unknown.io/a") is None
    with pytest.raises(RegistryError, match="docker-credential-not-there is not installed"):
        find("missing.io/a")
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{helper.parent}:{before}"
    try:
        assert find("helped.io/a") == Credentials("h", "helped.io")
    finally:
        os.environ["PATH"] = before
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers/auth.json").write_text(json.dumps({"auths": {"quay.io": {"auth": auth("first:x")}}}))
    assert find("quay.io/other/app") == Credentials("first", "x")
    environ["REGISTRY_AUTH_FILE"] = str(tmp_path / "none")
    with pytest.raises(RegistryError, match="there is no such file"):
        find("alpine")
