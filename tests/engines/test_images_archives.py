"""Importing images from archives and directories, hostile ones too, and exporting them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import zstandard

from tests.engines.image_archives import Made, Members, index_of, sha256, to_directory, to_json, to_tar
from tests.layers.archives import files
from unionfs.cli.main import main
from unionfs.engines.images import (
    ExportOptions,
    Format,
    ImageStore,
    LayerCompression,
    Platform,
    export_stream,
    export_to,
    import_images,
    parse_reference,
)
from unionfs.errors import (
    ArchiveError,
    DigestMismatchError,
    ImageError,
    ImageFormatError,
    NotAnImageError,
    UnionfsError,
)
from unionfs.layers import LayerStore, collect, open_store


def archive_of(contents: bytes) -> BinaryIO:
    """A file with these contents and no name."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - gone with the last who knows it
    file.write(contents)
    file.seek(0)
    return file


@pytest.fixture
def images(tmp_path: Path) -> Iterator[ImageStore]:
    with open_store(tmp_path / "root", "vfs") as layers:
        yield ImageStore(layers)


def nothing_is_left(images: ImageStore) -> bool:
    """Neither images, nor layers, nor anything half done."""
    layers: LayerStore = images.layers
    return images.all() == [] and layers.map() == {} and collect(layers) == []


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_docker_archive(images: ImageStore, compression: str) -> None:
    made = Made()
    archive = archive_of(COMPRESSIONS[compression](to_tar(made.old_docker())))
    (image,) = import_images(images, archive)
    assert image.config_bytes == made.config_bytes
    assert image.names == ("app:v1",)
    assert images.is_complete(image)
    assert [layer.diff_id for layer in images.layers_of(image)] == made.diff_ids


def test_a_pipe(images: ImageStore) -> None:
    made = Made()
    read, write = os.pipe()
    with os.fdopen(write, "wb") as out:
        out.write(to_tar(made.old_docker()))  # less than a pipe holds
    with os.fdopen(read, "rb") as archive:
        assert import_images(images, archive)[0].image_id == made.image_id


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_layers_in_a_docker_archive(images: ImageStore, compression: str) -> None:
    made = Made()
    members = made.old_docker()
    for number, layer in enumerate(made.layers):
        members[f"{number}/layer.tar"] = COMPRESSIONS[compression](layer)
    (image,) = import_images(images, archive_of(to_tar(members)))
    assert list(image.diff_ids) == made.diff_ids


def test_an_archive_in_memory(images: ImageStore) -> None:
    made = Made()
    assert import_images(images, io.BytesIO(to_tar(made.old_docker())))[0].image_id == made.image_id


def test_a_layer_that_comes_twice_is_a_link(images: ImageStore) -> None:
    one = files(a="one")
    made = Made([one, files(b="two"), one])
    members = made.old_docker()
    assert members["2/layer.tar"] == "../0/layer.tar"
    (image,) = import_images(images, archive_of(to_tar(members)))
    assert list(image.diff_ids) == made.diff_ids


@pytest.mark.parametrize("where", ["directory", "tar", "compressed tar"])
@pytest.mark.parametrize("compress", [True, False])
def test_an_oci_layout(images: ImageStore, tmp_path: Path, where: str, compress: bool) -> None:
    made = Made()
    members = made.oci(compress=compress)
    if where == "directory":
        source = to_directory(members, tmp_path / "layout")
    else:
        source = tmp_path / "layout.tar"
        source.write_bytes(gzip.compress(to_tar(members)) if where == "compressed tar" else to_tar(members))
    (image,) = import_images(images, source)
    assert (image.image_id, image.names) == (made.image_id, ("app:v1",))
    assert images.is_complete(image)


def test_layers_are_shared(images: ImageStore) -> None:
    base = files(a="base")
    import_images(images, archive_of(to_tar(Made([base, files(b="1")]).old_docker("one"))))
    # The second archive's base is not even looked at.
    other = Made([base, files(b="2")])
    members = other.old_docker("two")
    members["0/layer.tar"] = b"nothing"
    stages: list[tuple[str, str]] = []
    import_images(
        images, archive_of(to_tar(members)), report=lambda layer, stage, done, total: stages.append((layer, stage))
    )
    assert len(images.layers.map()) == 3
    assert (other.diff_ids[0], "exists") in stages
    assert (other.diff_ids[1], "done") in stages


def test_an_image_without_layers(images: ImageStore, tmp_path: Path) -> None:
    made = Made([])
    (image,) = import_images(images, archive_of(to_tar(made.old_docker())))
    assert images.is_complete(image)
    export_to(images, image, str(tmp_path / "out.tar"), ExportOptions())
    images.remove(image.image_id)
    assert import_images(images, tmp_path / "out.tar")[0].image_id == made.image_id


def test_a_layer_of_no_bytes(images: ImageStore, tmp_path: Path) -> None:
    made = Made([files(a="1"), b"", files(a="2"), b""])
    (image,) = import_images(images, archive_of(to_tar(made.old_docker())))
    for kind in Format:
        for compression in LayerCompression:
            out = tmp_path / f"{kind.value}-{compression.value}"
            export_to(images, image, str(out), ExportOptions(kind, [parse_reference("app:v1")], compression))
    images.remove("app:v1")
    for out in sorted(tmp_path.glob("*-*")):
        (image,) = import_images(images, out)
        assert list(image.diff_ids) == made.diff_ids
        images.remove("app:v1")
    assert nothing_is_left(images)


def several() -> tuple[Made, Made, Members]:
    """Two images in one Docker archive."""
    one, two = Made([files(a="1")]), Made([files(a="2")])
    members = two.old_docker("two:v1")
    members = {name.replace("0/", "1/"): data for name, data in members.items()}
    second = json.loads(members["manifest.json"])
    second[0]["Layers"] = ["1/layer.tar"]
    first = one.old_docker("one:v1")
    merged = {**members, **first}
    merged["manifest.json"] = to_json([*json.loads(first["manifest.json"]), *second])
    return one, two, merged


def test_several_images(images: ImageStore) -> None:
    one, two, members = several()
    archive = to_tar(members)
    with pytest.raises(ImageError, match="say which one is meant"):
        import_images(images, archive_of(archive), names=[parse_reference("new:v1")])
    with pytest.raises(ImageFormatError, match="no image 'three'"):
        import_images(images, archive_of(archive), only="three")
    (image,) = import_images(images, archive_of(archive), only="two:v1", names=[parse_reference("new:v1")])
    assert (image.image_id, image.names) == (two.image_id, ("new:v1",))
    assert [image.image_id for image in import_images(images, archive_of(archive))] == [one.image_id, two.image_id]


def test_platforms(images: ImageStore) -> None:
    arm = Made([files(a="arm")], {"architecture": "arm64"})
    amd = Made([files(a="amd")])
    layout = index_of(
        (arm.oci(), {"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}),
        (amd.oci(), {"platform": {"os": "linux", "architecture": "amd64"}}),
        (amd.oci(), {"platform": {"os": "unknown", "architecture": "unknown"}}),
    )
    # The same as one entry that is an index.
    inner = layout["index.json"]
    assert isinstance(inner, bytes)
    nested = dict(layout)
    nested[f"blobs/sha256/{sha256(inner)[7:]}"] = inner
    entry = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": sha256(inner), "size": len(inner)}
    nested["index.json"] = to_json({"schemaVersion": 2, "manifests": [entry]})
    for members in (layout, nested):
        for text, made in (("linux/amd64", amd), ("linux/arm64", arm), ("linux/aarch64", arm)):
            (image,) = import_images(images, archive_of(to_tar(members)), platform=Platform.parse(text))
            assert image.image_id == made.image_id
        with pytest.raises(ImageFormatError, match=r"nothing for linux/s390x.*linux/amd64, linux/arm64/v8"):
            import_images(images, archive_of(to_tar(members)), platform=Platform.parse("linux/s390x"))
    with pytest.raises(ImageFormatError, match="is for linux/arm64, not for linux/amd64"):
        import_images(images, archive_of(to_tar(arm.old_docker())), platform=Platform.parse("linux/amd64"))


def cosign_layout(image: Made) -> Members:
    """What cosign save writes: an image, and its signature as if it were a second one."""
    text = b'{"critical": {}}'
    kind = "application/vnd.dev.cosign.simplesigning.v1+json"
    signature = Made([text]).oci(layers=[{"mediaType": kind, "digest": sha256(text), "size": len(text)}])
    key = "dev.cosignproject.cosign"
    name = {f"{key}/imageRef": "ghcr.io/owner/app:v1"}
    return index_of(
        (image.oci(), {"annotations": {"kind": f"{key}/image", **name}}),
        (signature, {"annotations": {"kind": f"{key}/sigs", **name}}),
    )


def test_a_signature_beside_an_image(images: ImageStore, tmp_path: Path) -> None:
    made = Made()
    members = cosign_layout(made)
    (image,) = import_images(images, to_directory(members, tmp_path / "layout"))
    assert (image.image_id, image.names) == (made.image_id, ("ghcr.io/owner/app:v1",))
    images.remove(image.image_id)
    (image,) = import_images(images, archive_of(to_tar(members)), only="ghcr.io/owner/app:v1")
    assert image.image_id == made.image_id
    images.remove(image.image_id)
    index = json.loads(members["index.json"])
    del index["manifests"][0]
    with pytest.raises(NotAnImageError, match="simplesigning"):
        import_images(images, archive_of(to_tar({**members, "index.json": to_json(index)})))
    assert nothing_is_left(images)


def test_platforms_of_several_images(images: ImageStore) -> None:
    """One of each name, in whatever order they come."""
    made = {
        (tag, machine): Made([files(a=tag + machine)], {"architecture": machine})
        for tag in "xy"
        for machine in ("arm64", "amd64")
    }
    layout = index_of(
        *(
            (one.oci(f"{tag}:v1"), {"platform": {"os": "linux", "architecture": machine}})
            for (tag, machine), one in made.items()
        )
    )
    archive: Members = {}
    entries = []
    for number, ((tag, _), one) in enumerate(made.items()):
        members = one.old_docker(f"{tag}:v1")
        archive |= {f"{number}.json": one.config_bytes, f"{number}.tar": members["0/layer.tar"]}
        entries.append({"Config": f"{number}.json", "RepoTags": [f"{tag}:v1"], "Layers": [f"{number}.tar"]})
    archive["manifest.json"] = to_json(entries)
    for members in (layout, archive):
        for machine in ("amd64", "arm64"):
            found = import_images(images, archive_of(to_tar(members)), platform=Platform.parse(machine))
            assert [one.image_id for one in found] == [made[tag, machine].image_id for tag in "xy"]
        with pytest.raises(ImageFormatError, match="linux/s390x"):
            import_images(images, archive_of(to_tar(members)), platform=Platform.parse("s390x"))


def test_a_docker_archive_with_more_in_its_index(images: ImageStore) -> None:
    """docker save of an image for several machines: manifest.json has only the best for the machine that wrote it."""
    amd, arm = Made([files(a="amd")]), Made([files(a="arm")], {"architecture": "arm64"})
    members = index_of(
        (arm.oci(), {"platform": {"os": "linux", "architecture": "arm64"}}),
        (amd.oci(compress=False), {"platform": {"os": "linux", "architecture": "amd64"}}),
    )
    layer, config = (f"blobs/sha256/{digest[7:]}" for digest in (amd.diff_ids[0], amd.image_id))
    members["manifest.json"] = to_json([{"Config": config, "RepoTags": ["app:v1"], "Layers": [layer]}])
    for machine, one in (("arm64", arm), ("amd64", amd)):
        (image,) = import_images(images, archive_of(to_tar(members)), platform=Platform.parse(machine))
        assert (image.image_id, image.names) == (one.image_id, ("app:v1",))
    with pytest.raises(ImageFormatError, match="nothing for linux/s390x"):
        import_images(images, archive_of(to_tar(members)), platform=Platform.parse("s390x"))


def test_a_tag_in_a_layout(images: ImageStore) -> None:
    members = Made().oci("latest")
    assert import_images(images, archive_of(to_tar(members)))[0].names == ()
    assert import_images(images, archive_of(to_tar(members)), only="latest", names=[parse_reference("a:b")])
    with pytest.raises(ImageFormatError, match=r"no image 'v2' in it; it has: latest"):
        import_images(images, archive_of(to_tar(members)), only="v2")


def changed(members: Members, **files_changed: bytes | str | None) -> Members:
    """Some files replaced, or taken away."""
    result = dict(members)
    for name, contents in files_changed.items():
        if contents is None:
            del result[name]
        else:
            result[name] = contents
    return result


def docker(**more: Any) -> Members:
    return Made().old_docker(**more)


def with_layer(contents: bytes | str | None) -> Members:
    return changed(docker(), **{"1/layer.tar": contents})


def oci_with(name_of: Callable[[Made], str], contents: bytes | str | None) -> Members:
    made = Made()
    return changed(made.oci(), **{f"blobs/sha256/{name_of(made)[7:]}": contents})


def layer_blob(made: Made) -> str:
    return sha256(gzip.compress(made.layers[1], mtime=0))


def wrong_blob() -> Members:
    """A second layer whose blob is another one of the same size, with the right contents."""
    blob = bytearray(gzip.compress(Made().layers[1], mtime=0))
    blob[4] ^= 1  # the time in gzip's header
    return oci_with(layer_blob, bytes(blob))


def loop() -> Members:
    """Indexes in indexes, deeper than anybody means."""
    members = Made().oci()
    for _ in range(10):
        inner = members["index.json"]
        assert isinstance(inner, bytes)
        members[f"blobs/sha256/{sha256(inner)[7:]}"] = inner
        entry = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": sha256(inner), "size": len(inner)}
        members["index.json"] = to_json({"schemaVersion": 2, "manifests": [entry]})
    return members


def manifest_entry(**more: Any) -> Members:
    made = Made()
    index = json.loads(made.oci()["index.json"])
    index["manifests"][0].update(more)
    return changed(made.oci(), **{"index.json": to_json(index)})


HOSTILE: dict[str, tuple[Callable[[], Members], str]] = {
    "empty": (dict, "no manifest.json and no index.json"),
    "other files": (lambda: {"etc/passwd": b"root"}, "no manifest.json and no index.json"),
    "no json": (lambda: changed(docker(), **{"manifest.json": b"{"}), "not what docker save writes"),
    "deep json": (lambda: changed(docker(), **{"manifest.json": b"[" * 500_000}), "not what docker save writes"),
    "huge json": (lambda: changed(docker(), **{"manifest.json": b" " * (5 << 20)}), "are the most"),
    "huge config": (lambda: docker(Config="big") | {"big": b" " * (9 << 20)}, "are the most"),
    "config outside": (lambda: docker(Config="../../../etc/passwd"), "no file"),
    "config by a link outside": (lambda: docker(Config="x") | {"x": "/etc/passwd"}, "no file"),
    "config is a directory": (lambda: docker(Config="0"), "no file"),
    "config changed": (
        lambda: changed(docker(), **{f"{Made().image_id[7:]}.json": Made().config_bytes + b" "}),
        "is not what its name says",
    ),
    "config of something else": (lambda: docker(Config="0/VERSION"), "not an image's configuration"),
    "layers outside": (lambda: docker(Layers=["0/layer.tar", "/etc/passwd"]), "no file"),
    "a layer too few": (lambda: docker(Layers=["0/layer.tar"]), "names 2 layers, but there are 1"),
    "a layer too many": (lambda: docker(Layers=["0/layer.tar"] * 3), "names 2 layers, but there are 3"),
    "far too many layers": (lambda: docker(Layers=["0/layer.tar"] * 126), "125 are the most"),
    "many images": (
        lambda: changed(docker(), **{"manifest.json": to_json([{"Config": "x", "Layers": []}] * 1001)}),
        "1000 are the most",
    ),
    "bad name": (lambda: docker(RepoTags=["../x"]), "is no name of an image"),
    "layers in the wrong order": (lambda: docker(Layers=["1/layer.tar", "0/layer.tar"]), "was expected"),
    "layer missing": (lambda: with_layer(None), "no file"),
    "layer changed": (lambda: with_layer(files(a="three")), "was expected"),
    "layer cut off": (lambda: with_layer(gzip.compress(Made().layers[1])[:-20]), ""),
    "layer no archive": (lambda: with_layer(b"x" * 10240), ""),
    "layer a link in a circle": (lambda: with_layer("layer.tar"), "no file"),
    "layers links in a circle": (lambda: with_layer("../0/layer.tar") | {"0/layer.tar": "../1/layer.tar"}, "no file"),
    "oci: no index": (lambda: changed(Made().oci(), **{"index.json": b"[]"}), "not a manifest"),
    "oci: config missing": (lambda: oci_with(lambda made: made.image_id, None), ""),
    "oci: config changed": (lambda: oci_with(lambda m: m.image_id, m_size(Made().config_bytes)), "not what its name"),
    "oci: layer missing": (lambda: oci_with(layer_blob, None), ""),
    "oci: layer of another size": (lambda: oci_with(layer_blob, b"short"), "were promised"),
    "oci: layer of another digest": (wrong_blob, "blob is sha256:.* was expected"),
    "oci: layer a link outside": (lambda: oci_with(layer_blob, "/etc/passwd"), ""),
    "oci: digest with a path": (lambda: manifest_entry(digest="sha256:../../../../etc/passwd"), "cannot be used"),
    "oci: other algorithm": (lambda: manifest_entry(digest="md5:" + "0" * 32), "cannot be used"),
    "oci: manifest missing": (lambda: manifest_entry(digest="sha256:" + "0" * 64), ""),
    "oci: manifest of another size": (lambda: manifest_entry(size=5), "were promised"),
    "oci: negative size": (lambda: manifest_entry(size=-1), "not a manifest"),
    "oci: said to be an index": (
        lambda: manifest_entry(mediaType="application/vnd.oci.image.index.v1+json"),
        "which it is not",
    ),
    "oci: both": (lambda: Made().oci(manifests=[]), "at the same time"),
    "oci: schema 1": (lambda: Made().oci(schemaVersion=1), "schema 1"),
    "oci: an artifact": (
        lambda: Made().oci(
            config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": Made().image_id, "size": 1}
        ),
        "artifact",
    ),
    "oci: a layer too few": (lambda: Made().oci(layers=[]), "names 2 layers, but there are 0"),
    "oci: encrypted layer": (
        lambda: Made().oci(
            layers=[
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
                    "digest": Made().image_id,
                    "size": 1,
                }
            ]
        ),
        "cannot be stored",
    ),
    "oci: indexes in indexes": (loop, "more than 4 deep"),
}


def m_size(contents: bytes) -> bytes:
    """Other contents of the same size."""
    return contents.replace(b"linux", b"Linux")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives(images: ImageStore, tmp_path: Path, what: str) -> None:
    make, message = HOSTILE[what]
    members = make()
    with pytest.raises(UnionfsError, match=message or None) as caught:
        import_images(images, archive_of(to_tar(members)))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImageError | ArchiveError | DigestMismatchError)
    assert nothing_is_left(images)
    if "index.json" in members:
        with pytest.raises(UnionfsError, match=message or None):
            import_images(images, to_directory(members, tmp_path / "layout"))
        assert nothing_is_left(images)


@pytest.mark.parametrize(
    "links",
    [
        {"1/layer.tar": "/x.tar"},
        {"1/layer.tar": "../../../../x.tar"},  # the archive's top is where they stop
        {"1/layer.tar": "other.tar", "1/other.tar": "/d/y.tar", "d": "./e", "e/y.tar": "../x.tar"},
        {"1": "/sub/dir", "sub/dir/layer.tar": "/x.tar"},
    ],
)
def test_links_in_an_archive(images: ImageStore, links: dict[str, str]) -> None:
    made = Made()
    members = {name: data for name, data in made.old_docker().items() if not name.startswith("1/")}
    members |= {"./x.tar": made.layers[1], **links}
    assert import_images(images, archive_of(to_tar(members)))[0].image_id == made.image_id


def test_absolute_names_in_an_archive(images: ImageStore) -> None:
    made = Made()
    members = {f"/{name}": data for name, data in made.old_docker().items()}
    assert import_images(images, archive_of(to_tar(members)))[0].image_id == made.image_id


@pytest.mark.parametrize("what", ["blob", "directory", "index"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_in_a_layout(images: ImageStore, tmp_path: Path, what: str, inside: bool, absolute: bool) -> None:
    """Followed in the layout, never out of it: who wrote the layout may not be who reads it."""
    made = Made()
    layout = to_directory(made.oci(), tmp_path / "layout")
    moved = {
        "blob": layout / f"blobs/sha256/{layer_blob(made)[7:]}",
        "directory": layout / "blobs",
        "index": layout / "index.json",
    }
    place = moved[what]
    target = (layout if inside else tmp_path) / "real"
    place.rename(target)
    place.symlink_to(target if absolute else os.path.relpath(target, place.parent))
    if inside and not absolute:
        assert import_images(images, layout)[0].image_id == made.image_id
        return
    with pytest.raises(ImageFormatError, match="is a symlink that is absolute or leads out of the layout; copy"):
        import_images(images, layout)
    assert nothing_is_left(images)


def test_a_pipe_in_a_layout_is_not_waited_for(images: ImageStore, tmp_path: Path) -> None:
    layout = to_directory(Made().oci(), tmp_path / "layout")
    blob = layout / "blobs/sha256" / layer_blob(Made())[7:]
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(ImageFormatError, match="is no regular file"):
        import_images(images, layout)


def test_many_members(images: ImageStore) -> None:
    with pytest.raises(ImageFormatError, match="more than 10000 entries"):
        import_images(images, archive_of(to_tar({f"f{number}": b"" for number in range(10_001)})))


def test_a_cut_off_archive(images: ImageStore) -> None:
    archive = to_tar(Made().old_docker())
    for size in range(1, len(archive) - 10240, 5000):
        with pytest.raises(ImageError):
            import_images(images, archive_of(archive[:size]))
    assert nothing_is_left(images)


def test_a_failure_leaves_what_was_there(images: ImageStore) -> None:
    base = files(a="base")
    handle = images.layers.register(io.BytesIO(base))
    assert handle.chain_id in images.layers.map()
    broken = Made([base, files(b="1"), files(c="2")])
    members = broken.old_docker()
    members["2/layer.tar"] = b"nothing"
    with pytest.raises(UnionfsError):
        import_images(images, archive_of(to_tar(members)))
    assert list(images.layers.map()) == [handle.chain_id]
    # As from the command line, where nobody holds the base.
    images.layers.close()
    with open_store(images.layers.records.root.removesuffix("/image/vfs/layerdb"), "vfs") as layers:  # type: ignore[attr-defined]
        with pytest.raises(UnionfsError):
            import_images(ImageStore(layers), archive_of(to_tar(members)))
        assert list(layers.map()) == [handle.chain_id]


@pytest.mark.parametrize("compression", list(LayerCompression))
@pytest.mark.parametrize("kind", list(Format))
def test_an_export_comes_back(images: ImageStore, tmp_path: Path, kind: Format, compression: LayerCompression) -> None:
    one = files(a="one")
    made = Made([one, files(b="two"), one], {"variant": "v2", "created": "2024-01-01T00:00:00Z"})
    (image,) = import_images(images, archive_of(to_tar(made.old_docker())))
    out = tmp_path / "out"
    export_to(images, image, str(out), ExportOptions(kind, [parse_reference("app:v1")], compression))
    images.remove("app:v1")
    assert nothing_is_left(images)
    (again,) = import_images(images, out)
    assert again == image


def test_an_export_is_the_same_each_time(images: ImageStore, tmp_path: Path) -> None:
    (image,) = import_images(images, archive_of(to_tar(Made().old_docker())))
    for kind in (Format.DOCKER, Format.OCI_TAR):
        path = tmp_path / "out.tar"
        export_to(images, image, str(path), ExportOptions(kind))
        stream = io.BytesIO()
        export_stream(images, image, stream, ExportOptions(kind))
        assert stream.getvalue() == path.read_bytes()
        with tarfile.open(path) as tar:
            assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}


def test_an_export_appears_when_it_is_complete(images: ImageStore, tmp_path: Path) -> None:
    (image,) = import_images(images, archive_of(to_tar(Made().old_docker())))
    (Path(_tree_of(images, image.chain_id)) / "a").write_text("bad")
    for kind in Format:
        with pytest.raises(UnionfsError):
            export_to(images, image, str(tmp_path / "out"), ExportOptions(kind))
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["root"]


def _tree_of(images: ImageStore, chain_id: str) -> str:
    layer = images.layers.map()[chain_id]  # type: ignore[index]
    root = images.layers.records.root.removesuffix("/image/vfs/layerdb")  # type: ignore[attr-defined]
    return os.path.join(root, "vfs", "dir", layer.cache_id)


def test_an_export_replaces_nothing_but_a_file(images: ImageStore, tmp_path: Path) -> None:
    (image,) = import_images(images, archive_of(to_tar(Made().old_docker())))
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").write_text("mine")
    for kind in Format:
        with pytest.raises(ImageError, match=r"is there already|is a directory"):
            export_to(images, image, str(tmp_path / "dir"), ExportOptions(kind))
    (tmp_path / "file").write_text("old")
    export_to(images, image, str(tmp_path / "file"), ExportOptions())
    assert tarfile.is_tarfile(tmp_path / "file")
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Made(config={"config": {"Cmd": ["/bin/sh"], "Labels": {"x": "a\nb"}}, "history": [{"created_by": "step"}]})
    archive = tmp_path / "app.tar"
    archive.write_bytes(to_tar(made.old_docker()))
    root = f"--root={tmp_path / 'store'}"

    def run(*words: str, status: int = 0) -> str:
        assert main(["image", *words, root]) == status
        out, err = capfd.readouterr()
        return err if status else out

    run("ls", "--driver=vfs")
    assert run("import", str(archive)).strip() == made.image_id
    assert "app:v1" in run("ls")
    (listed,) = json.loads(run("ls", "--json"))
    assert (listed["id"], listed["names"], listed["complete"]) == (made.image_id, ["app:v1"], True)
    assert [layer["diff_id"] for layer in listed["layers"]] == made.diff_ids
    text = run("inspect", "app:v1")
    assert "x=a\\nb" in text
    assert made.diff_ids[1] in text
    (details,) = json.loads(run("inspect", made.image_id[7:19], "--json"))
    assert details["config"]["cmd"] == ["/bin/sh"]
    run("tag", "app:v1", "localhost/other")
    assert "has several names" in run("rm", made.image_id, status=1)
    assert run("rm", "app:v1") == "untagged app:v1\n"
    run("export", "localhost/other", "-o", str(tmp_path / "out.tar"))
    with tarfile.open(tmp_path / "out.tar") as tar:
        member = tar.extractfile("manifest.json")
        assert member is not None
        assert json.load(member)[0]["RepoTags"] == ["localhost/other:latest"]
    assert f"removed {made.image_id}" in run("rm", "localhost/other")
    assert run("ls") == "There are no images.\n"
    for words in (
        ("import", "/nowhere"),
        ("import", str(tmp_path)),
        ("import", "--platform=x", str(archive)),
        ("import", "--name=UPPER", str(archive)),
        ("export", "nothing", "-o", str(tmp_path / "x")),
        ("inspect", "nothing"),
        ("rm", "nothing"),
        ("tag", "nothing", "x"),
        ("push", "nothing"),
        ("pull", "UPPER"),
    ):
        message = run(*words, status=1)
        assert message.startswith("unionfs: ")
        assert message.count("\n") == 1
    for words in (
        ("export", "x", "-f", "oci-dir"),
        ("pull", "x", "--username", "me"),
        ("pull", "x", "--password-stdin"),
    ):
        assert "see unionfs image" in run(*words, status=2)
