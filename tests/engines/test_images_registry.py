"""Registries: what they say in headers, and pulling and pushing where one answers in a way of its own."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
import zstandard

from tests.e2e.engines.registry_tools import fetch, give, large, nothing_is_left
from tests.engines.fake_registry import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Answer,
    FakeRegistry,
    Request,
    describe,
    fake_registry,
)
from tests.engines.image_archives import Made, index_of, sha256, to_directory, to_json, to_tar
from tests.layers.archives import files
from unionfs.engines.images import Image, ImageStore, LayerCompression, Platform, import_images, parse_reference
from unionfs.engines.images.registry import Credentials, find_credentials, run
from unionfs.engines.images.registry.auth import Challenge, parse_challenges
from unionfs.engines.images.registry.client import RegistryClient
from unionfs.engines.images.registry.connection import Access, retry_after
from unionfs.errors import ImageFormatError, ImageNotFoundError, RegistryError
from unionfs.layers import open_store


@pytest.fixture
def images(tmp_path: Path) -> Iterator[ImageStore]:
    with open_store(tmp_path / "root", "vfs") as layers:
        yield ImageStore(layers)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Basic realm="a"'], [Challenge("basic", {"realm": "a"})]),
        (
            ['Bearer realm="https://t/x?a=b,c",service="s s",scope="repository:a/b:pull,push"'],
            [
                Challenge(
                    "bearer", {"realm": "https://t/x?a=b,c", "service": "s s", "scope": "repository:a/b:pull,push"}
                )
            ],
        ),
        (['BEARER Realm = "a" , error=x'], [Challenge("bearer", {"realm": "a", "error": "x"})]),
        (
            ['Basic realm="a", Bearer realm="b"'],
            [Challenge("basic", {"realm": "a"}), Challenge("bearer", {"realm": "b"})],
        ),
        (["Negotiate", 'Basic realm="a\\"b"'], [Challenge("negotiate"), Challenge("basic", {"realm": 'a"b'})]),
        (['realm="a"', "", ",", '"', "Bearer ="], [Challenge("bearer")]),
        ([], []),
    ],
)
def test_challenges(headers: list[str], expected: list[Challenge]) -> None:
    assert parse_challenges(headers) == expected


def test_retry_after() -> None:
    assert retry_after("7") == 7
    assert retry_after(None) == 0
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert 3000 < later <= 3600
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)) == 0
    for text in ("", "soon", "-1", "9" * 30, "Mon, 99 Foo"):
        assert retry_after(text) == 0


def test_who_is_spoken_to_without_tls() -> None:
    for registry in ("localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000"):
        assert Access().insecure(registry)
        assert not Access(plain_http=False).insecure(registry)
    for registry in ("docker.io", "localhost.example.com", "10.0.0.1:5000", "example.com:127"):
        assert not Access().insecure(registry)
        assert Access(plain_http=True).insecure(registry)


@pytest.mark.parametrize("config_type", ["application/octet-stream", "text/html", "application/json", ""])
def test_configurations_by_other_names(images: ImageStore, registry: FakeRegistry, config_type: str) -> None:
    """Old registries and builders did not know better; Docker and Podman take these too."""
    made = Made()
    registry.give(made, config_type=config_type)
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id
    images.remove(made.image_id)
    members = made.oci(config={"mediaType": config_type, "digest": made.image_id, "size": len(made.config_bytes)})
    assert import_images(images, io.BytesIO(to_tar(members)))[0].image_id == made.image_id


@pytest.mark.parametrize(
    "config_type",
    [
        "application/vnd.cncf.helm.config.v1+json",
        "application/vnd.oci.empty.v1+json",
        "application/vnd.docker.plugin.v1+json",
    ],
)
def test_artifacts(images: ImageStore, registry: FakeRegistry, config_type: str) -> None:
    registry.give(Made(), config_type=config_type)
    with pytest.raises(ImageFormatError, match=f"artifact of type '{config_type.replace('+', '.')}'"):
        fetch(images, f"{registry.address}/app:v1")
    assert nothing_is_left(images)


@pytest.mark.parametrize(
    "layer_type",
    [
        "",
        "application/octet-stream",
        "application/x-gzip",
        "application/tar+gzip",
        "application/vnd.oci.image.layer.v1.tar",  # though it is compressed
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.container.image.rootfs.diff+x-gtar",
    ],
)
def test_layers_by_other_names(images: ImageStore, registry: FakeRegistry, layer_type: str) -> None:
    """The image specification: a type that is not known is no error. The diff ids say what a layer must be."""
    made = Made()
    registry.give(made, layer_type=layer_type)
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.oci.image.layer.v1.tar+lz4",
        "application/vnd.dev.cosign.simplesigning.v1+json",
        "application/vnd.in-toto+json",
        "application/wasm",
    ],
)
def test_layers_that_are_none(images: ImageStore, registry: FakeRegistry, layer_type: str) -> None:
    registry.give(Made(), layer_type=layer_type)
    with pytest.raises(ImageFormatError, match="cannot be stored"):
        fetch(images, f"{registry.address}/app:v1")
    assert not registry.requests("GET", "/blobs/")
    assert nothing_is_left(images)


def give_index(registry: FakeRegistry, *entries: dict[str, object]) -> None:
    index = to_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    registry.tag("v1", index, OCI_INDEX)


MACHINE = "this machine"


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ("arm/v6 arm/v5", "linux/arm/v7", "arm/v6"),
        ("arm/v5 arm/v6", "linux/arm/v7", "arm/v6"),
        ("arm/v6 arm/v7", "linux/arm", "arm/v7"),
        ("arm/v6 arm/v7", "linux/arm/v6", "arm/v6"),
        ("arm/v6 arm/v7", "linux/arm/v8", "arm/v7"),
        ("arm arm/v6", "linux/arm/v7", "arm"),
        ("arm arm/v5", "linux/arm/v6", "arm/v5"),
        ("arm", "linux/arm/v6", "arm"),
        ("arm/v7 arm64/v8", "linux/arm64", "arm64/v8"),
        ("arm64/v9 arm64", "linux/arm64/v8", "arm64"),
        ("arm64/v8 arm64/v8.2 arm64/v9", "linux/arm64/v8.4", "arm64/v8.2"),
        ("amd64/v4 amd64/v3 amd64/v2", MACHINE, "amd64/v3"),
        ("amd64/v4 amd64/v2", MACHINE, "amd64/v2"),
        ("amd64/v4 amd64", MACHINE, "amd64"),
        ("amd64/v1 amd64", MACHINE, "amd64/v1"),
        ("amd64/v3 amd64/v2 amd64", "linux/amd64", "amd64"),
        ("amd64/v3 amd64/v2", "linux/amd64", "amd64/v2"),
        ("amd64/v3 amd64/v2", "linux/amd64/v2", "amd64/v2"),
        ("amd64 arm64/v8", "amd64", "amd64"),
        ("amd64 arm/v6", "arm/v7", "arm/v6"),
        ("amd64 arm/v7", "armhf", "arm/v7"),
        ("amd64 arm64/v8", "linux", "amd64"),
        ("riscv64/rva23u64 riscv64", "linux/riscv64/rva22u64", "riscv64"),
        ("arm64", MACHINE, "arm64"),
        ("arm/v7 arm/v6", "linux/arm/v5", None),
        ("amd64/v4 amd64/v3", "linux/amd64/v2", None),
        ("amd64/v4 arm64", MACHINE, None),
        ("riscv64/rva23u64 arm64", "linux/riscv64/rva22u64", None),
    ],
)
def test_which_platform_is_taken(
    images: ImageStore, monkeypatch: pytest.MonkeyPatch, there: str, wanted: str, expected: str | None
) -> None:
    """An older variant where it serves, never one that the processor cannot run."""
    v3 = Platform(os="linux", architecture="amd64", variant="v3")
    monkeypatch.setattr(Platform, "of_this_machine", lambda: v3)
    layout = to_tar(index_of(*((made.oci(), {"platform": where}) for made, where in map(for_platform, there.split()))))
    chosen = None if wanted is MACHINE else Platform.parse(wanted)
    if expected is None:
        with pytest.raises(ImageFormatError, match="has nothing for"):
            import_images(images, io.BytesIO(layout), platform=chosen)
        return
    (image,) = import_images(images, io.BytesIO(layout), platform=chosen)
    assert str(image.platform) == f"linux/{expected}"


def for_platform(name: str) -> tuple[Made, dict[str, str]]:
    """An image for a platform of Linux, and how an index says so."""
    architecture, _, variant = name.partition("/")
    where = {"architecture": architecture, **({"variant": variant} if variant else {})}
    return Made([files(a=name)], where), {"os": "linux", **where}


def test_platforms_in_a_registry(images: ImageStore, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []
    for name in ("amd64/v4", "amd64/v3", "arm/v6"):
        made, where = for_platform(name)
        entries.append(describe(registry.give(made, name), OCI_MANIFEST, platform=where))
    give_index(registry, *entries)
    v3 = Platform(os="linux", architecture="amd64", variant="v3")
    monkeypatch.setattr(Platform, "of_this_machine", lambda: v3)
    for wanted, expected in (("", "amd64/v3"), ("amd64/v4", "amd64/v4"), ("arm", "arm/v6")):
        assert str(fetch(images, f"{registry.address}/app:v1", wanted).platform) == f"linux/{expected}"
    with pytest.raises(ImageFormatError, match="has nothing for linux/arm/v5"):
        fetch(images, f"{registry.address}/app:v1", "linux/arm/v5")


def test_entries_that_are_no_images(images: ImageStore, registry: FakeRegistry) -> None:
    """The image specification: types of entries that are not known are passed over."""
    made, other = Made(), Made([files(x="attestation")])
    manifest, attestation = registry.give(made, "image"), registry.give(other, "other")
    give_index(
        registry,
        describe(attestation, "application/xml"),
        describe(attestation, OCI_MANIFEST, artifactType="application/vnd.example.sbom"),
        describe(attestation, OCI_MANIFEST, platform={"os": "unknown", "architecture": "unknown"}),
        describe(attestation, "application/vnd.oci.artifact.manifest.v1+json"),
        describe(manifest, OCI_MANIFEST, artifactType=OCI_CONFIG, platform={"os": "", "architecture": ""}),
    )
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


def stored(images: ImageStore, made: Made) -> Image:
    """An image in the store."""
    (image,) = import_images(images, io.BytesIO(to_tar(made.old_docker())))
    return image


BASIC = Credentials("me", "secret").basic()


def asking(registry: FakeRegistry, request: Request) -> Answer | None:
    """A refusal of who does not log in."""
    if request.headers.get("authorization") == BASIC:
        return None
    return Answer(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})


@pytest.fixture
def storage() -> Iterator[FakeRegistry]:
    """Where a registry sends us; it must not see our login."""
    with fake_registry() as running:
        yield running
        assert not [one for one in running.seen if "authorization" in one.headers]


@pytest.mark.parametrize(
    ("redirected", "in_pieces", "status"),
    [
        ("HEAD", False, 302),
        ("POST", False, 307),
        ("POST", True, 308),
        ("PATCH", True, 307),
        ("PUT", False, 308),
        ("PUT", True, 307),
        ("PUT", False, 301),
        ("all", True, 307),
        ("all", True, 308),
    ],
)
def test_a_push_that_is_redirected(
    images: ImageStore, registry: FakeRegistry, storage: FakeRegistry, status: int, redirected: str, in_pieces: bool
) -> None:
    """The method and the body stay, and where it goes on is relative to who answered in the end."""
    made = Made([large(size=10_000)])
    image = stored(images, made)
    storage.blobs, storage.manifests, storage._uploads = registry.blobs, registry.manifests, registry._uploads

    def redirect(request: Request) -> Answer | None:
        if redirected in (request.method, "all"):
            return Answer(status, b"", {"Location": f"http://{storage.address}{request.path}"})
        return asking(registry, request)

    registry.hook = redirect
    known = Credentials("me", "secret")
    upload_bytes = 4000 if in_pieces else 1 << 20
    digest = give(images, image, f"{registry.address}/app:v1", credentials=known, upload_bytes=upload_bytes)
    assert storage.requests("PUT" if redirected == "all" else redirected)
    assert registry.manifests["v1"] == registry.manifests[digest]
    images.remove(image.image_id)
    registry.hook = lambda request: None
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


@pytest.mark.parametrize(
    ("method", "status"), [("POST", 301), ("POST", 302), ("POST", 303), ("PUT", 302), ("PUT", 303), ("PATCH", 302)]
)
def test_a_push_that_would_become_a_question(
    images: ImageStore, registry: FakeRegistry, storage: FakeRegistry, status: int, method: str
) -> None:
    """With these statuses a client may ask with GET instead, and take the answer for that to what it wanted."""
    storage.hook = lambda request: Answer(200, b"", {"Location": "/x"})
    image = stored(images, Made())

    def redirect(request: Request) -> Answer | None:
        if request.method == method:
            return Answer(status, b"", {"Location": f"http://{storage.address}{request.path}"})
        return None

    registry.hook = redirect
    upload_bytes = 10 if method == "PATCH" else 1 << 20
    with pytest.raises(RegistryError, match=rf"\({status}\); it sends us to 'http://{storage.address}"):
        give(images, image, f"{registry.address}/app:v1", upload_bytes=upload_bytes)
    assert not registry.manifests


def test_a_challenge_of_somebody_else_is_not_answered(
    images: ImageStore, registry: FakeRegistry, storage: FakeRegistry
) -> None:
    """Not with the login, and not with a token of it: a registry may let others choose where it redirects to."""
    registry.give(Made())
    realm = f'Bearer realm="http://{storage.address}/token"'
    storage.hook = lambda request: Answer(401, b"", {"WWW-Authenticate": realm})
    registry.hook = lambda request: (
        asking(registry, request)
        or (Answer(307, b"", {"Location": f"http://{storage.address}/blob"}) if "/blobs/" in request.path else None)
    )
    with pytest.raises(RegistryError, match=r"refused app: Unauthorized \(401\)"):
        fetch(images, f"{registry.address}/app:v1", credentials=Credentials("me", "secret"))
    assert storage.seen


def test_a_secret_in_a_form_is_not_redirected(
    images: ImageStore, registry: FakeRegistry, storage: FakeRegistry
) -> None:
    def ask(request: Request) -> Answer:
        if request.path.startswith("/token"):
            return Answer(307, b"", {"Location": f"http://{storage.address}/token"})
        return Answer(401, b"{}", {"WWW-Authenticate": f'Bearer realm="http://{registry.address}/token"'})

    registry.hook = ask
    with pytest.raises(RegistryError, match=r"gave no token \(status 307\)"):
        fetch(images, f"{registry.address}/app:v1", credentials=Credentials(identity_token="secret"))
    assert not storage.seen
    with pytest.raises(RegistryError, match=r"gave no token \(status 404\)"):
        fetch(images, f"{registry.address}/app:v1", credentials=Credentials("me", "secret"))
    assert [one.path.partition("?")[0] for one in storage.seen] == ["/token"]


@pytest.mark.parametrize("status", [401, 307])
def test_a_flood_behind_a_challenge_or_a_redirect(images: ImageStore, registry: FakeRegistry, status: int) -> None:
    """What nobody wants to know is not kept, however much it is and however it is packed."""
    made = Made()
    registry.give(made)
    flood = Answer(status, bytes(1 << 26), {"Location": "/elsewhere", "WWW-Authenticate": 'Basic realm="x"'})
    flood = packed(flood)
    flood.body += gzip.compress(os.urandom(1 << 20), 1) * 20
    first = iter([flood])
    registry.hook = lambda request: next(first, None)
    tracemalloc.start()
    try:
        if status == 401:
            known = Credentials("me", "secret")
            assert fetch(images, f"{registry.address}/app:v1", credentials=known).image_id == made.image_id
        else:
            with pytest.raises(ImageNotFoundError, match="has no app:v1"):
                fetch(images, f"{registry.address}/app:v1")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/x", "ftp://127.0.0.1/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "token"])
def test_nothing_is_sent_without_tls(monkeypatch: pytest.MonkeyPatch, location: str, method: str) -> None:
    """A registry that is spoken to with TLS cannot send us away from it."""

    async def answer(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https"
        if method == "token":
            return httpx.Response(401, headers={"WWW-Authenticate": f'Bearer realm="{location}"'})
        return httpx.Response(307, headers={"Location": location})

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)

    async def ask() -> None:
        async with RegistryClient("quay.io", "app", Access()) as client:
            if method == "POST":
                await client.mount("sha256:" + "0" * 64, "other")
            else:
                await client.manifest("v1")

    with pytest.raises(RegistryError, match="which is not safe"):
        run(ask)


def test_redirects_that_do_not_end(images: ImageStore, registry: FakeRegistry) -> None:
    image = stored(images, Made())
    registry.hook = lambda request: Answer(307, b"", {"Location": request.path})
    with pytest.raises(RegistryError, match="from one place to the next"):
        give(images, image, f"{registry.address}/app:v1")
    assert len(registry.requests("HEAD")) < 20


@pytest.mark.parametrize("what", ["blobs", "manifests"])
def test_a_pull_that_is_redirected(
    images: ImageStore, registry: FakeRegistry, storage: FakeRegistry, what: str
) -> None:
    """From one path to the next, and on to somebody else; a part of a blob too."""
    made = Made([large(size=200_000)])
    registry.give(made)
    storage.blobs, storage.manifests = registry.blobs, registry.manifests
    cut = iter([100_000])

    def redirect(request: Request) -> Answer | None:
        if request.path.startswith("/moved"):
            location = f"http://{storage.address}{request.path.removeprefix('/moved')}"
            return asking(registry, request) or Answer(302, b"", {"Location": location})
        if f"/{what}/" in request.path:
            return Answer(301, b"", {"Location": f"/moved{request.path}"})
        return asking(registry, request)

    def cut_off(request: Request) -> Answer | None:
        answer = storage.answer(request)
        if len(answer.body) > 100_000:
            answer.cut_after = next(cut, None)
        return answer

    registry.hook, storage.hook = redirect, cut_off
    image = fetch(images, f"{registry.address}/app:v1", credentials=Credentials("me", "secret"))
    assert image.image_id == made.image_id
    if what == "blobs":
        assert [one.headers["range"] for one in storage.requests("GET", "/blobs/") if "range" in one.headers]


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "deflate": zlib.compress,
}


def packed(answer: Answer, how: str = "gzip") -> Answer:
    """As what stands before a registry changes it, though nobody asked for that."""
    body = ENCODINGS[how](answer.body)
    return replace(answer, body=body, headers={**answer.headers, "Content-Encoding": how})


@pytest.mark.parametrize("how", ENCODINGS)
def test_what_is_compressed_on_the_way(images: ImageStore, registry: FakeRegistry, how: str) -> None:
    made = Made([large(size=100_000), files(a="two")])
    registry.give(made)
    registry.hook = lambda request: packed(registry.answer(request), how)
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


def test_a_blob_that_is_said_to_be_compressed(images: ImageStore, registry: FakeRegistry) -> None:
    """Some storage calls gzip an encoding when a layer is a gzip file itself: its bytes are those of the digest."""
    made = Made([large(size=100_000), files(a="two")])
    registry.give(made)

    def mislabel(request: Request) -> Answer | None:
        answer = registry.answer(request)
        return (
            replace(answer, headers={**answer.headers, "Content-Encoding": "gzip"})
            if answer.body[:1] == b"\x1f"
            else None
        )

    registry.hook = mislabel
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


@pytest.mark.parametrize("parts", [True, False])
def test_what_is_compressed_on_the_way_and_cut_off(images: ImageStore, registry: FakeRegistry, parts: bool) -> None:
    """A part would be one of the compressed bytes, so all comes again."""
    made = Made([large(size=300_000)])
    registry.give(made)
    cuts = iter([200_000, 100_000])

    def pack(request: Request) -> Answer | None:
        if "/blobs/" not in request.path:
            return None
        if not parts:
            request.headers.pop("range", "")
        answer = packed(registry.answer(request))
        if len(answer.body) > 200_000:
            answer.cut_after = next(cuts, None)
        return answer

    registry.hook = pack
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id
    assert next(cuts, None) is None
    assert not [one for one in registry.seen if "range" in one.headers]


def test_the_size_of_a_blob_that_is_compressed_on_the_way(images: ImageStore, registry: FakeRegistry) -> None:
    """It is not the length that was told, and would make a wrong manifest."""
    made = Made([files(a="x" * 5000)])
    image = stored(images, made)
    give(images, image, f"{registry.address}/app:v1")
    before = registry.manifests["v1"]

    def pack(request: Request) -> Answer | None:
        if request.method != "HEAD":
            return None
        answer = registry.answer(request)
        return packed(replace(answer, body=answer.body + b"more"))

    registry.hook = pack
    give(images, image, f"{registry.address}/app:v2")
    assert registry.manifests["v2"] == before


def test_a_flood_of_compressed_zeros(images: ImageStore, registry: FakeRegistry) -> None:
    registry.give(Made())
    registry.hook = lambda request: packed(Answer(200, bytes(50 << 20)))
    with pytest.raises(RegistryError, match="too much"):
        fetch(images, f"{registry.address}/app:v1")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_token_that_is_compressed_on_the_way(images: ImageStore, registry: FakeRegistry, method: str) -> None:
    made = Made()
    registry.give(made)

    def ask(request: Request) -> Answer | None:
        if request.path.startswith("/token"):
            assert request.method == method
            return packed(Answer(200, to_json({"token": "t"})))
        if request.headers.get("authorization") == "Bearer t":
            return None
        return packed(Answer(401, b"{}", {"WWW-Authenticate": f'Bearer realm="http://{registry.address}/token"'}))

    registry.hook = ask
    known = Credentials("me", "secret") if method == "GET" else Credentials(identity_token="token")
    assert fetch(images, f"{registry.address}/app:v1", credentials=known).image_id == made.image_id


def test_reasons_that_are_compressed_on_the_way(images: ImageStore, registry: FakeRegistry) -> None:
    registry.hook = lambda request: packed(Answer(400, to_json({"errors": [{"message": "because"}]})))
    with pytest.raises(RegistryError, match="because"):
        fetch(images, f"{registry.address}/app:v1")


def docker_only(registry: FakeRegistry, status: int, request: Request) -> Answer | None:
    """A registry that takes no OCI manifest."""
    if request.method == "PUT" and "oci" in request.headers["content-type"]:
        return Answer(status, to_json({"errors": [{"code": "MANIFEST_INVALID", "message": "manifest invalid"}]}))
    return None


@pytest.mark.parametrize("status", [400, 404, 415, 422])
def test_a_registry_that_takes_only_dockers_manifests(images: ImageStore, registry: FakeRegistry, status: int) -> None:
    made = Made([files(a="one"), b""])
    image = stored(images, made)
    registry.hook = lambda request: docker_only(registry, status, request)
    digest = give(images, image, f"{registry.address}/app:v1")
    contents, media_type = registry.manifests["v1"]
    manifest = json.loads(contents)
    assert media_type == manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    assert [one["mediaType"] for one in manifest["layers"]] == ["application/vnd.docker.image.rootfs.diff.tar.gzip"] * 2
    assert digest == sha256(contents)
    images.remove(image.image_id)
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id


def test_a_registry_that_takes_no_manifest(images: ImageStore, registry: FakeRegistry) -> None:
    """The first reason is told. Docker's manifests have no layers in zstd, and who may not push may not at all."""
    image = stored(images, Made())
    registry.hook = lambda request: (
        docker_only(registry, 415, request)
        or (Answer(400, b"other") if request.method == "PUT" and "/manifests/" in request.path else None)
    )
    with pytest.raises(RegistryError, match=r"manifest invalid \(415\)"):
        give(images, image, f"{registry.address}/app:v1")
    assert len(registry.requests("PUT", "/manifests/")) == 2
    for status, compression in ((415, LayerCompression.ZSTD), (403, LayerCompression.GZIP)):
        registry.seen.clear()
        registry.hook = partial(docker_only, registry, status)
        with pytest.raises(RegistryError, match=str(status)):
            give(images, image, f"{registry.address}/app:v1", compression)
        assert len(registry.requests("PUT", "/manifests/")) == 1


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        OCI_LAYER,
    ],
)
def test_a_layer_that_is_elsewhere(images: ImageStore, registry: FakeRegistry, tmp_path: Path, layer_type: str) -> None:
    made = Made()
    manifest = json.loads(registry.give(made, layer_type=layer_type))
    manifest["layers"][1]["urls"] = ["http://127.0.0.1:9/layer\n"]
    registry.tag("v1", to_json(manifest))
    # Some registries have it all the same.
    where = f"{registry.address}/app:v1"
    assert fetch(images, where).image_id == made.image_id
    images.remove(where)
    del registry.blobs[manifest["layers"][1]["digest"]]
    message = r"layer sha256:\w+ is only elsewhere \(at http://127.0.0.1:9/layer \), where it is not fetched from"
    with pytest.raises(ImageFormatError, match=message):
        fetch(images, where)
    layout = to_directory(made.oci(layers=manifest["layers"]), tmp_path / "layout")
    (layout / f"blobs/{manifest['layers'][1]['digest'].replace(':', '/')}").unlink()
    with pytest.raises(ImageFormatError, match=message):
        import_images(images, layout)
    assert (images.all(), images.layers.map()) == ([], {})


@pytest.mark.parametrize("what", ["config", "layer"])
def test_a_blob_that_is_missing(images: ImageStore, registry: FakeRegistry, what: str) -> None:
    made = Made()
    manifest = json.loads(registry.give(made))
    digest = manifest["config" if what == "config" else "layers"]
    digest = digest["digest"] if what == "config" else digest[1]["digest"]
    del registry.blobs[digest]
    with pytest.raises(RegistryError, match=rf"{registry.address} has no blob {digest} of app; .* push it again"):
        fetch(images, f"{registry.address}/app:v1")
    assert nothing_is_left(images)


def credential_helper(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, knows: str = "*") -> None:
    """A helper program that gives what it is asked for as the password, if it knows that."""
    directory.mkdir(exist_ok=True)
    helper = directory / f"docker-credential-{name}"
    answer = 'printf \'{"Username":"h","Secret":"%s"}\' "$url"'
    helper.write_text(
        f'#!/bin/sh\nread url\n[ "$1" = get ] || exit 1\ncase "$url" in {knows}) {answer};; *) exit 1;; esac\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_credentials_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    credential_helper(monkeypatch, tmp_path / "bin", "for-the-test")
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
    assert find("helped.io/a") == Credentials("h", "helped.io")
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers/auth.json").write_text(json.dumps({"auths": {"quay.io": {"auth": auth("first:x")}}}))
    assert find("quay.io/other/app") == Credentials("first", "x")
    environ["REGISTRY_AUTH_FILE"] = str(tmp_path / "none")
    with pytest.raises(RegistryError, match="there is no such file"):
        find("alpine")


@pytest.mark.parametrize("auths", [{}, {"auths": {}}, {"auths": None}, {"auths": {"other.io": {}}}])
def test_a_helper_for_all_registries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, auths: dict[str, object]
) -> None:
    """docker-credential-ecr-login and others need no more than their name."""
    config = tmp_path / "config.json"
    environ = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}

    def find(name: str) -> Credentials | None:
        return find_credentials(parse_reference(name), environ)

    credential_helper(
        monkeypatch, tmp_path / "bin", "some", knows="https://index.docker.io/v1/|localhost:5000|other.io"
    )
    config.write_text(json.dumps({"credsStore": "some", **auths}))
    assert find("alpine") == Credentials("h", "https://index.docker.io/v1/")
    assert find("localhost:5000/team/app") == Credentials("h", "localhost:5000")
    assert find("quay.io/app") is None
    assert find("other.io/app") == Credentials("h", "other.io")
    # Who copied the file without the program can still pull what is open to everybody.
    config.write_text(json.dumps({"credsStore": "missing", **auths}))
    assert find("alpine") is None
    assert "docker-credential-missing is not installed" in caplog.text
    if auths.get("auths"):
        with pytest.raises(RegistryError, match="docker-credential-missing is not installed"):
            find("other.io/app")


@pytest.mark.parametrize("key", ["a.io", "https://a.io", "http://a.io", "https://a.io/", "https://a.io/v1/", "a.io/v2"])
def test_the_keys_of_logins(tmp_path: Path, key: str) -> None:
    auth = base64.b64encode(b"me:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"b.io": {}, key: {"auth": auth}}}))
    environ = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    assert find_credentials(parse_reference("a.io/team/app"), environ) == Credentials("me", "secret")
    for other in ("b.io/app", "a.io:443/app", "x.a.io/app", "docker.io/a.io/app"):
        assert find_credentials(parse_reference(other), environ) is None
