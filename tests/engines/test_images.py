"""Images on a layer store: configurations, names, and what keeps layers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.layers.archives import files
from unionfs.cli.main import main
from unionfs.engines.images import (
    ExportOptions,
    Format,
    Image,
    ImageStore,
    LayerCompression,
    Platform,
    Reference,
    export_stream,
    parse_image,
    parse_reference,
)
from unionfs.engines.images.model import digest_of
from unionfs.errors import (
    ImageError,
    ImageFormatError,
    ImageInUseError,
    ImageNotFoundError,
    LayerDoesNotExistError,
    LayerStoreError,
)
from unionfs.layers import DiffID, LayerStore, collect, open_store

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("alpine", "docker.io/library/alpine", "alpine"),
        ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
        ("library/alpine", "docker.io/library/alpine", "alpine"),
        ("docker.io/alpine", "docker.io/library/alpine", "alpine"),
        ("index.docker.io/a/b", "docker.io/a/b", "a/b"),
        ("localhost/app", "localhost/app", "localhost/app"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app"),
        ("ghcr.io/o/a__b/c-d.e", "ghcr.io/o/a__b/c-d.e", "ghcr.io/o/a__b/c-d.e"),
        (f"a/b:t@{DIGEST}", f"docker.io/a/b:t@{DIGEST}", f"a/b:t@{DIGEST}"),
        ("app:5000", "docker.io/library/app:5000", "app:5000"),
        ("Host/app", "Host/app", "Host/app"),
    ],
)
def test_names(text: str, full: str, familiar: str) -> None:
    reference = parse_reference(text)
    assert (str(reference), reference.familiar) == (full, familiar)
    assert parse_reference(familiar) == reference == parse_reference(full)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            "@",
            "/",
            "a/",
            "/a",
            "a//b",
            "Alpine",
            "a:",
            "a:b:c",
            "a:-x",
            "a b",
            "a\n",
            "../a",
            "a/../b",
            "a.",
            "é",
        ),
        *("a@sha256:12", "a@md5:" + "0" * 32, "a@" + DIGEST.upper(), "0" * 64, "a:" + "t" * 129, "a/" * 128 + "a"),
        *("host:port/a", "-h.x/a", "user@host/a"),
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ImageError, match="is no name of an image"):
        parse_reference(text)


def config(diff_ids: list[DiffID], **more: Any) -> bytes:
    """An image's configuration."""
    return json.dumps(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}, **more}
    ).encode()


def test_a_configuration() -> None:
    image = parse_image(
        config(
            [],
            variant="v8",
            created="2024-01-02T03:04:05Z",
            config={
                "Env": ["A=1"],
                "Entrypoint": "/bin/sh",
                "Cmd": None,
                "User": "1:2",
                "WorkingDir": "/w",
                "Labels": {"k": "v"},
                "ExposedPorts": {"80/tcp": {}},
                "Volumes": {"/data": {}},
                "StopSignal": "SIGQUIT",
                "Unknown": [1],
            },
            history=[{"created_by": "x", "empty_layer": True}],
        )
    )
    assert image.config.env == ("A=1",)
    assert image.config.entrypoint == ("/bin/sh",)
    assert image.config.cmd == ()
    assert (image.config.user, image.config.working_dir, image.config.stop_signal) == ("1:2", "/w", "SIGQUIT")
    assert image.config.labels == {"k": "v"}
    assert (image.config.exposed_ports, image.config.volumes) == (("80/tcp",), ("/data",))
    assert str(image.platform) == "linux/amd64/v8"
    assert image.history[0].empty_layer
    assert image.chain_id == ""


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b'{"schemaVersion": 2, "manifests": []}',
        b"[" * 200_000,
        b'{"rootfs": {"diff_ids": "sha256:"}}',
        b'{"rootfs": {"diff_ids": ["../../etc/passwd"]}}',
        b'{"rootfs": {"type": "layers+base", "diff_ids": []}}',
        config([DiffID(DIGEST)] * 126),
        config([], config={"Env": {"A": 1}}),
        config([], config=[]),
    ],
)
def test_what_is_no_configuration(contents: bytes) -> None:
    with pytest.raises(ImageFormatError) as caught:
        parse_image(contents)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_platforms() -> None:
    assert Platform.parse("linux/aarch64") == Platform(os="linux", architecture="arm64")
    assert Platform.parse("linux/arm64").runs(Platform(os="linux", architecture="arm64", variant="v8"))
    assert not Platform.parse("linux/arm/v6").runs(Platform(os="linux", architecture="arm", variant="v7"))
    assert not Platform.parse("linux/amd64").runs(Platform(os="windows", architecture="amd64"))
    assert Platform.of_this_machine().architecture
    for text in ("x", "windows", "a/b/c/d", "/amd64", ""):
        with pytest.raises(ImageFormatError, match="is no platform"):
            Platform.parse(text)


HASWELL = "sse2 ssse3 cx16 sse4_1 sse4_2 movbe popcnt xsave avx f16c abm bmi1 avx2 bmi2 fma lahf_lm avx512f avx512cd"


def test_the_level_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level needs all of those below it. Source of the names: x86-64 psABI."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    flags = set(HASWELL.split())
    for found, expected in (
        (flags | {"avx512bw", "avx512dq", "avx512vl"}, "v4"),
        (flags, "v3"),
        (flags - {"movbe"}, "v2"),
        (flags - {"popcnt"}, "v1"),
        (set(), "v1"),
    ):
        monkeypatch.setattr("unionfs.engines.images.model._cpu_flags", lambda found=found: frozenset(found))
        assert str(Platform.of_this_machine()) == f"linux/amd64/{expected}"
    for machine, name in (("armv7l", "arm/v7"), ("armv6l", "arm/v6"), ("aarch64", "arm64/v8"), ("riscv64", "riscv64")):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert str(Platform.of_this_machine()) == f"linux/{name}"


class Shelf:
    """A layer store with images, which can be closed and opened again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers: LayerStore = open_store(root, "vfs")
        self.images = ImageStore(self.layers)

    def reopen(self) -> ImageStore:
        """As a new process finds it."""
        self.layers.close()
        self.layers = open_store(self.root, "vfs")
        self.images = ImageStore(self.layers)
        return self.images

    def add(self, contents: bytes, names: list[Reference]) -> Image:
        """To the images as they are now open."""
        return self.images.add(contents, names)

    def chain(self, *contents: str) -> list[DiffID]:
        """Layers of a file each, on top of each other; nobody holds them."""
        diff_ids: list[DiffID] = []
        parent = ""
        for text in contents:
            layer = self.layers.register(io.BytesIO(files(file=text)), parent)
            parent = layer.chain_id
            diff_ids.append(layer.diff_id)
        self.reopen()
        return diff_ids


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    made = Shelf(tmp_path / "root")
    yield made
    made.layers.close()


def test_an_image_is_found_by_name_and_id(shelf: Shelf) -> None:
    contents = config(shelf.chain("one", "two"))
    shelf.images.add(contents, [parse_reference("app"), parse_reference(f"app@{DIGEST}")])
    for again in (False, True):
        images = shelf.reopen() if again else shelf.images
        image = images.get("app")
        assert image.config_bytes == contents
        assert image.names == ("app:latest", f"app@{DIGEST}")
        digits = image.image_id[7:]
        for text in ("app:latest", "docker.io/library/app", f"app:other@{DIGEST}", image.image_id, digits, digits[:6]):
            assert images.get(text) == image
        assert images.all() == [image]
        assert images.is_complete(image)
        for text in ("", "ap", "app:v1", "sha256:", f"other@{DIGEST}", "0" * 64, "../x"):
            with pytest.raises(ImageNotFoundError, match="no such image"):
                images.get(text)


def test_the_files_are_dockers(shelf: Shelf) -> None:
    contents = config([])
    image = shelf.images.add(contents, [parse_reference("b/app:v1"), parse_reference("localhost:5000/x")])
    base = shelf.root / "image" / "vfs"
    assert (base / "imagedb/content/sha256" / image.image_id[7:]).read_bytes() == contents
    assert json.loads((base / "repositories.json").read_bytes()) == {
        "Repositories": {
            "b/app": {"b/app:v1": image.image_id},
            "localhost:5000/x": {"localhost:5000/x:latest": image.image_id},
        }
    }


def test_an_image_keeps_its_layers(shelf: Shelf) -> None:
    image = shelf.add(config(shelf.chain("one", "two")), [parse_reference("app")])
    assert collect(shelf.layers, layers=True) == []
    shelf.reopen()
    assert collect(shelf.layers, layers=True) == []
    removed = shelf.images.remove("app")
    assert (removed.untagged, removed.image_id) == (("app:latest",), image.image_id)
    assert removed.layers[0].chain_id == image.chain_id
    assert len(removed.layers) == 2
    assert shelf.layers.map() == {}
    assert shelf.reopen().all() == []


def test_no_command_takes_an_images_layers(shelf: Shelf) -> None:
    image = shelf.add(config(shelf.chain("one", "two")), [parse_reference("app")])
    shelf.layers.close()
    root = f"--root={shelf.root}"
    assert main(["gc", "--layers", root]) == 0
    assert main(["fsck", "--deep", "--repair", root]) == 0
    assert main(["layer", "rm", image.chain_id, root]) == 1
    assert shelf.reopen().is_complete(image)


def test_two_images_share_a_layer(shelf: Shelf) -> None:
    base = shelf.chain("one")
    shelf.images.add(config(base), [parse_reference("base")])
    top = shelf.layers.register(io.BytesIO(files(file="two")), base[0])
    shelf.images.add(config([*base, top.diff_id]), [parse_reference("app")])
    images = shelf.reopen()
    assert [one.diff_id for one in images.remove("app").layers] == [top.diff_id]
    assert images.remove("base").layers[0].diff_id == base[0]


def test_names_come_and_go(shelf: Shelf) -> None:
    image = shelf.images.add(config([]), [parse_reference("app"), parse_reference(f"app@{DIGEST}")])
    shelf.images.tag("app", parse_reference("app:v2"))
    with pytest.raises(ImageError, match="comes from a registry"):
        shelf.images.tag("app", parse_reference(f"x@{DIGEST}"))
    with pytest.raises(ImageInUseError, match="several names"):
        shelf.images.remove(image.image_id[7:19])
    assert shelf.images.remove("app").untagged == ("app:latest",)
    assert shelf.reopen().get("app:v2").names == ("app:v2", f"app@{DIGEST}")
    removed = shelf.images.remove("app:v2")
    assert removed.image_id == image.image_id
    assert len(removed.untagged) == 2

    first = shelf.images.add(config([], author="a"), [parse_reference("app")])
    second = shelf.images.add(config([], author="b"), [parse_reference("app")])
    assert shelf.images.get("app") == second
    assert shelf.images.get(first.image_id).names == ()
    assert shelf.images.all() == [second, shelf.images.get(first.image_id)]
    shelf.images.untag(parse_reference("app"))
    with pytest.raises(ImageNotFoundError):
        shelf.images.untag(parse_reference("app"))
    assert shelf.images.remove(second.image_id[:20]).image_id == second.image_id


def test_an_image_in_use_stays(shelf: Shelf) -> None:
    image = shelf.add(config(shelf.chain("one")), [parse_reference("app")])
    shelf.layers.create_rw_layer("box", image.chain_id)
    images = shelf.reopen()
    with pytest.raises(ImageInUseError, match="container box"):
        images.remove("app")
    removed = images.remove("app", force=True)
    assert removed.image_id == image.image_id
    assert removed.layers == ()
    assert image.chain_id in shelf.layers.map()


def test_an_image_without_its_layers_is_refused(shelf: Shelf) -> None:
    with pytest.raises(LayerDoesNotExistError):
        shelf.images.add(config([DiffID(DIGEST)]), [parse_reference("app")])
    assert shelf.reopen().all() == []


def test_a_damaged_image_makes_way(shelf: Shelf) -> None:
    contents = config(shelf.chain("one"))
    image = shelf.images.add(contents, [parse_reference("app")])
    path = shelf.root / "image/vfs/imagedb/content/sha256" / image.image_id[7:]
    path.write_bytes(contents + b" ")
    images = shelf.reopen()
    assert images.all() == []
    assert "is not what it was" in images.unreadable[image.image_id]
    with pytest.raises(ImageNotFoundError, match="is not what it was"):
        images.get("app")
    assert images.add(contents).names == ("app:latest",)
    assert shelf.reopen().unreadable == {}


def test_a_failed_write_leaves_nothing(shelf: Shelf) -> None:
    contents = config(shelf.chain("one"))
    (shelf.root / "image/vfs/repositories.json").mkdir()
    with pytest.raises(OSError):
        shelf.images.add(contents, [parse_reference("app")])
    assert shelf.images.all() == []
    (shelf.root / "image/vfs/repositories.json").rmdir()
    assert shelf.reopen().all() == []
    assert shelf.images.add(contents, [parse_reference("app")]).names == ("app:latest",)


def fsck(shelf: Shelf, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of fsck, and what it found."""
    shelf.layers.close()
    status = main(["fsck", "--json", *words, f"--root={shelf.root}"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    shelf.reopen()
    return status, found


@pytest.mark.parametrize("damage", ["cut", "changed", "garbage", "empty"])
def test_a_damaged_configuration_is_found(shelf: Shelf, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    contents = config(shelf.chain("one"))
    image = shelf.images.add(contents, [parse_reference("app"), parse_reference("app:v2")])
    good = shelf.images.add(config(shelf.chain("one"), author="x"), [parse_reference("good")])
    assert fsck(shelf, capsys, "--deep") == (0, [])
    path = shelf.root / "image/vfs/imagedb/content/sha256" / image.image_id[7:]
    changes = {
        "cut": contents[:-5],
        "changed": contents.replace(b"amd64", b"arm64"),
        "garbage": b"\0" * 100,
        "empty": b"",
    }
    path.write_bytes(changes[damage])
    status, (problem,) = fsck(shelf, capsys, "--deep")
    assert (status, problem["kind"], problem["name"], problem["repaired"]) == (1, "image", image.image_id, False)
    assert problem["what"] == f"{path}: is not what it was (it was app:latest, app:v2)"
    remove = f"image rm {image.image_id[7:19]}"
    assert problem["advice"] == f"pull or import it again, or remove it: unionfs {remove}"
    # Nobody knows which layers it needs.
    status, (problem,) = fsck(shelf, capsys, "--repair")
    assert (status, problem["repaired"]) == (1, False)
    shelf.layers.close()
    assert main([*remove.split(), f"--root={shelf.root}"]) == 0
    capsys.readouterr()
    assert fsck(shelf, capsys, "--deep") == (0, [])
    assert [one.image_id for one in shelf.images.all()] == [good.image_id]
    with pytest.raises(ImageNotFoundError, match="no such image"):
        shelf.images.get("app")
    assert shelf.add(contents, [parse_reference("app")]).image_id == image.image_id


def test_what_cannot_be_read_is_not_removed(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be well: another program's image, or a disk that comes back."""
    image = shelf.images.add(config(shelf.chain("one")), [parse_reference("app")])
    content = shelf.root / "image/vfs/imagedb/content/sha256"
    other = config([], rootfs={"type": "layers+base", "diff_ids": []})
    (content / digest_of(other)[7:]).write_bytes(other)
    file = content / image.image_id[7:]
    file.rename(content / "aside")
    file.mkdir()
    status, found = fsck(shelf, capsys, "--deep", "--repair")
    assert status == 1
    assert {one["name"] for one in found} == {image.image_id, digest_of(other)}
    assert not any(one["repaired"] for one in found)
    file.rmdir()
    (content / "aside").rename(file)
    assert shelf.reopen().get("app").image_id == image.image_id


def test_images_without_layers_and_names_without_images(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    image = shelf.add(config(shelf.chain("one")), [parse_reference("app")])
    gone = shelf.add(config([], author="gone"), [parse_reference("gone")])
    shelf.layers.close()
    records = shelf.root / "image/vfs"
    (records / "layerdb/sha256" / image.chain_id[7:]).rename(records / "aside")
    (records / "imagedb/content/sha256" / gone.image_id[7:]).unlink()
    shelf.reopen()
    status, found = fsck(shelf, capsys)
    assert status == 1
    images = {one["name"]: one for one in found if one["kind"] == "image"}
    assert images[image.image_id]["what"] == "layers of it are missing"
    assert images[gone.image_id]["what"] == "its configuration is gone (it was gone:latest)"
    (records / "aside").rename(records / "layerdb/sha256" / image.chain_id[7:])
    status, (problem,) = fsck(shelf, capsys, "--repair")
    assert (status, problem["name"], problem["repaired"]) == (1, gone.image_id, False)
    shelf.images.remove("gone")
    assert fsck(shelf, capsys) == (0, [])
    assert shelf.images.is_complete(shelf.images.get("app"))


def test_images_are_looked_at(shelf: Shelf) -> None:
    """Beside the process that has the store open, whose half-written files stay."""
    contents = config(shelf.chain("one", "two"))
    shelf.images.add(contents, [parse_reference("app")])
    shelf.images.add(config([]), [parse_reference("other")])
    begun = shelf.root / "image/vfs/imagedb/content/sha256/.tmp-begun"
    begun.touch()
    with open_store(shelf.root, read_only=True) as look:
        images = ImageStore(look)
        assert [one.names for one in images.all()] == [("app:latest",), ("other:latest",)]
        assert images.is_complete(images.get("app"))
        out = io.BytesIO()
        export_stream(images, images.get("app"), out, ExportOptions(Format.OCI_TAR, [], LayerCompression.GZIP))
        assert out.getvalue()
        for change in (
            lambda: images.add(config([], author="x")),
            lambda: images.tag("app", parse_reference("new")),
            lambda: images.untag(parse_reference("app")),
            lambda: images.remove("app"),
        ):
            with pytest.raises(LayerStoreError, match="opened to be read only"):
                change()
    assert begun.exists()


def test_there_is_nothing_of_images_to_look_at(tmp_path: Path) -> None:
    with open_store(tmp_path / "root", "vfs"), open_store(tmp_path / "root", read_only=True) as look:
        assert ImageStore(look).all() == []
    assert not (tmp_path / "root/image/vfs/imagedb").exists()
