"""Pulling from a real registry: what can go wrong, and what a person sees of it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.engines.registry import Answer, FaultyProxy, Registry, Seen
from tests.e2e.engines.registry_tools import UNIONFS, fetch, give, nothing_is_left, skopeo, unionfs
from tests.e2e.engines.terminal import terminal
from tests.engines.image_archives import Made, sha256, to_json, to_tar
from tests.layers.archives import files
from unionfs.engines.images import ImageStore, import_images
from unionfs.errors import ArchiveError, DigestMismatchError, ImageFormatError, ImageNotFoundError, RegistryError
from unionfs.layers import open_store

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
pytest_plugins = ["tests.e2e.engines.registry_fixtures"]


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


def test_when_run_pulls(proxy: FaultyProxy, app: Made, tmp_path: Path) -> None:
    """What is missing is fetched, unless told otherwise; the command, which the image lacks, is looked for then."""
    root, name = tmp_path / "store", f"{proxy.address}/app:v1"

    own = {"UNIONFS_ROOT": f"{root}"}  # what stands behind the image is for the container

    def run(when: str, status: int) -> tuple[str, int]:
        """(what it says, how often the registry was asked)."""
        before = len(proxy.requests("GET", "/"))
        words = ["--rm", *(["--pull", when] if when else []), "--driver=vfs", name, "x"]
        said = unionfs(root, "run", *words, status=status, environ=own)
        return said, len(proxy.requests("GET", "/")) - before

    said, asked = run("never", 125)
    assert said.startswith(f"unionfs: no such image: {name}")
    assert asked == 0
    said, asked = run("", 127)
    assert said.startswith("unionfs: command not found: x")
    assert asked > 1
    assert run("missing", 127)[1] == 0
    assert run("always", 127)[1] > 0
    said = unionfs(root, "run", "--driver=vfs", f"{proxy.address}/nothere", "x", status=125, environ=own)
    assert "nothere" in said
    assert said.count("\n") == 1, "one line says why"


def test_a_containers_image_is_pushed(registry: Registry, app: Made, tmp_path: Path) -> None:
    root, name = tmp_path / "store", f"{registry.address}/app:v1"
    unionfs(root, "image", "pull", "--driver=vfs", name)
    with open_store(root) as store:
        image = ImageStore(store).get(name)
        with store.create_rw_layer("box", image.chain_id).mounted() as path:
            Path(path, "new").write_text("made in a container")
    target = f"{registry.address}/made:v1"
    image_id = unionfs(root, "container", "commit", "--image", target, "-m", "a file more", "box").strip()
    unionfs(root, "image", "push", target)
    config = json.loads(skopeo("inspect", "--config", f"docker://{target}"))
    assert config["history"][-1]["comment"] == "a file more"
    assert len(config["rootfs"]["diff_ids"]) == len(app.diff_ids) + 1
    assert unionfs(tmp_path / "other", "image", "pull", "--driver=vfs", target).strip() == image_id
