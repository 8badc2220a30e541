"""Registries: what they say in headers, and pulling and pushing where one answers in a way of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.e2e.engines.registry_tools import fetch, nothing_is_left
from tests.engines.fake_registry import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, FakeRegistry, describe, fake_registry
from tests.engines.image_archives import Made, index_of, to_json, to_tar
from tests.layers.archives import files
from unionfs.engines.images import ImageStore, Platform, import_images
from unionfs.engines.images.registry.challenge import Challenge, parse_challenges
from unionfs.engines.images.registry.connection import Access
from unionfs.engines.images.registry.retry import retry_after
from unionfs.errors import ImageFormatError
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
    assert retry_after(None) is None
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert later is not None
    assert 3000 < later <= 3600
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)) == 0
    for text in ("", "soon", "-1", "9" * 30, "Mon, 99 Foo"):
        assert retry_after(text) is None


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


def entry_of(manifest: bytes, platform: str = "", media_type: str = OCI_MANIFEST, **more: object) -> dict[str, object]:
    """An index's entry of a manifest, for ``os/architecture/variant``."""
    os, architecture, variant = (*platform.split("/"), "", "")[:3]
    where = {"os": os, "architecture": architecture, **({"variant": variant} if variant else {})}
    return describe(manifest, media_type, **({"platform": where} if platform else {}), **more)


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
    images: ImageStore,
    registry: FakeRegistry,
    monkeypatch: pytest.MonkeyPatch,
    there: str,
    wanted: str,
    expected: str | None,
) -> None:
    """An older variant where it serves, never one that the processor cannot run."""
    v3 = Platform(os="linux", architecture="amd64", variant="v3")
    monkeypatch.setattr(Platform, "of_this_machine", lambda: v3)
    entries, made = [], {}
    for name in there.split():
        architecture, _, variant = name.partition("/")
        more = {"architecture": architecture, **({"variant": variant} if variant else {})}
        made[name] = Made([files(a=name)], more)
        entries.append(entry_of(registry.give(made[name], name), f"linux/{name}"))
    give_index(registry, *entries)
    layout = index_of(
        *((made[name].oci(), {"platform": entry["platform"]}) for name, entry in zip(made, entries, strict=True))
    )
    where, platform = f"{registry.address}/app:v1", "" if wanted is MACHINE else wanted
    chosen = Platform.parse(platform) if platform else None
    if expected is None:
        with pytest.raises(ImageFormatError, match="has nothing for"):
            fetch(images, where, platform)
        with pytest.raises(ImageFormatError, match="has nothing for"):
            import_images(images, io.BytesIO(to_tar(layout)), platform=chosen)
        return
    assert str(fetch(images, where, platform).platform) == f"linux/{expected}"
    images.remove(where)
    (image,) = import_images(images, io.BytesIO(to_tar(layout)), platform=chosen)
    assert str(image.platform) == f"linux/{expected}"


def test_entries_that_are_no_images(images: ImageStore, registry: FakeRegistry) -> None:
    """The image specification: types of entries that are not known are passed over."""
    made, other = Made(), Made([files(x="attestation")])
    manifest, attestation = registry.give(made, "image"), registry.give(other, "other")
    give_index(
        registry,
        entry_of(attestation, media_type="application/xml"),
        entry_of(attestation, artifactType="application/vnd.example.sbom"),
        entry_of(attestation, "unknown/unknown"),
        entry_of(attestation, media_type="application/vnd.oci.artifact.manifest.v1+json"),
        entry_of(manifest, artifactType=OCI_CONFIG),
    )
    assert fetch(images, f"{registry.address}/app:v1").image_id == made.image_id
