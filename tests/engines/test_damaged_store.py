"""Each record of a store damaged in each way: nothing that a container or an image may still need is removed.

What was damaged is put back after all commands that remove things have run: everything must be as it was.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.layers.archives import files
from unionfs.cli.main import main
from unionfs.engines.images import ImageStore, parse_reference
from unionfs.engines.images.model import ImageConfig
from unionfs.engines.run.containers import Containers
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.records import Place, Record
from unionfs.layers import open_store

COMMANDS = (
    ("gc",),
    ("gc", "--layers"),
    ("fsck", "--repair"),
    ("gc", "--layers"),
    ("fsck", "--repair"),
    ("gc", "--layers"),
    ("layer", "ls"),
    ("container", "ls"),
    ("image", "ls"),
)


class Sample(NamedTuple):
    """A store with an image of two layers, and a container on it with an init layer and a file of its own."""

    root: Path
    driver: str
    base: str
    top: str
    mount_id: str


def make_sample(root: Path, driver: str) -> Sample:
    with open_store(root, driver) as store:
        images = ImageStore(store)
        base = store.register(io.BytesIO(files(base="of the base")))
        top = store.register(io.BytesIO(files(top="of the top")), base.chain_id)
        diff_ids = [base.diff_id, top.diff_id]
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        images.add(json.dumps(config).encode(), [parse_reference("app")])
        box = store.create_rw_layer("box", top.chain_id, init=lambda path: Path(path, "init").touch())
        (own_files(root, driver, box.mount_id) / "precious").write_text("of the container")
        record = Record(
            name="box", image="app", config=ImageConfig.model_validate({}), options=RunOptions(command=("true",))
        )
        Place(str(root / "image" / driver / "containers"), box.mount_id).make(record)
        return Sample(root, driver, base.cache_id, top.cache_id, box.mount_id)


def own_files(root: Path, driver: str, tree: str) -> Path:
    return root / "vfs" / "dir" / tree if driver == "vfs" else root / driver / tree / "diff"


def check_sample(sample: Sample) -> None:
    """Nothing is lost: the image is whole, the container has its files, and can be started again."""
    with open_store(sample.root) as store:
        assert store.unreadable == []
        images = ImageStore(store)
        assert images.unreadable == {}
        (image,) = images.all()
        assert [image.names, images.is_complete(image)] == [("app:latest",), True]
        base, top = images.layers_of(image)
        assert [base.cache_id, top.cache_id] == [sample.base, sample.top]
        assert base.verify() > 0
        assert top.verify() > 0
        box = store.get_rw_layer("box")
        assert box.mount_id == sample.mount_id
        assert box.parent is not None
        assert box.parent.chain_id == top.chain_id
        assert [str(one) for one in box.changes()] == ["A /precious"]
        assert (own_files(sample.root, sample.driver, box.mount_id) / "precious").read_text() == "of the container"
        assert store.driver.exists(box.mount_id + "-init")
        assert Containers(store).find("box").record().name == "box"


@pytest.fixture(scope="module", params=["vfs", "unionfs"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("sample") / "root", request.param)


def records_of(sample: Sample) -> Iterator[Path]:
    """Every file and directory that says what something is, relative to the root."""
    image = sample.root / "image" / sample.driver
    for top in ("layerdb/sha256", "layerdb/mounts", "imagedb/content/sha256", "containers"):
        for path in sorted((image / top).rglob("*")):
            # Without its directory nothing says that a container was made by "run".
            if path.parent != image / "containers":
                yield path.relative_to(sample.root)
    yield (image / "repositories.json").relative_to(sample.root)
    if sample.driver != "vfs":
        home = sample.root / sample.driver
        for tree in sorted(home.iterdir()):
            for name in ("link", "lower", "committed"):
                if (tree / name).exists():
                    yield (tree / name).relative_to(sample.root)
        for link in sorted((home / "l").iterdir()):
            yield link.relative_to(sample.root)


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        if path.is_symlink():
            target = os.fsdecode(change(os.fsencode(os.readlink(path)))).strip("\0") or "."
            path.unlink()
            path.symlink_to(target)
        elif path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        else:
            path.write_bytes(change(path.read_bytes()))

    return damage


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _unreadable(path: Path) -> None:
    _remove(path)
    path.symlink_to(path.name)  # ELOOP, also for root


def _wrong_type(path: Path) -> None:
    was_directory = path.is_dir() and not path.is_symlink()
    _remove(path)
    if was_directory:
        path.touch()
    else:
        path.mkdir()


def _dangling(contents: bytes) -> bytes:
    """Well-formed, but of nothing that exists."""
    return bytes(b"9"[0] if byte in b"0123456789abcdefABCDEF" else byte for byte in contents).replace(
        b"sh9256", b"sha256"
    )


def _to_nothing(path: Path) -> None:
    text = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    if text.startswith(b"sha256:"):
        path.write_bytes(b"sha256:" + b"9" * 64)
    elif path.name in ("cache-id", "mount-id"):
        path.write_bytes(b"9" * 64)
    elif path.name == "init-id":
        path.write_bytes(b"9" * 64 + b"-init")
    else:
        _rewrite(_dangling)(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _rewrite(lambda old: old[: len(old) // 2]),
    "empty": _rewrite(lambda old: b""),
    "garbage": _rewrite(lambda old: bytes(255 - byte for byte in old) or b"\xff"),
    "unreadable": _unreadable,
    "missing": _remove,
    "wrong type": _wrong_type,
    "pointing to nothing": _to_nothing,
}


def exchange(path: Path, kept: Path) -> None:
    """Put what was there before back in its place."""
    if os.path.lexists(path):
        _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, path, symlinks=True) if kept.is_dir() and not kept.is_symlink() else shutil.copy2(
        kept, path, follow_symlinks=False
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_that_may_be_needed_is_removed(
    original: Sample, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_sample(original)
    lost = []
    for number, record in enumerate(records_of(original)):
        sample = original._replace(root=tmp_path / str(number))
        shutil.copytree(original.root, sample.root, symlinks=True)
        DAMAGES[damage](sample.root / record)
        for words in COMMANDS:
            status = main([*words, "--root", str(sample.root), "--driver", sample.driver])
            said = capfd.readouterr().err
            assert status in (0, 1), (record, words, status)
            assert "internal error" not in said, (record, words, said)
        exchange(sample.root / record, original.root / record)
        try:
            check_sample(sample)
        except Exception as error:
            lost.append(f"{record}: {type(error).__name__} {str(error).splitlines()[:1]}")
        shutil.rmtree(sample.root)
    assert lost == []


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_sample(tmp_path / "root", "vfs")


def run(sample: Sample, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, output, errors) of a command."""
    capfd.readouterr()
    status = main([*words, "--root", str(sample.root)])
    said = capfd.readouterr()
    return status, said.out, said.err


def test_a_damaged_container_is_removed_on_demand(sample: Sample, capfd: pytest.CaptureFixture[str]) -> None:
    image = sample.root / "image" / "vfs"
    (image / "layerdb" / "mounts" / "box" / "parent").write_text("garbage")
    status, _, said = run(sample, capfd, "container", "rm", "box")
    assert status == 1
    assert "container box cannot be read" in said
    assert "--force" in said
    assert "container rm --force box" in run(sample, capfd, "container", "create", "-n", "box")[2]
    assert run(sample, capfd, "container", "rm", "--force", "box")[0] == 0
    assert os.listdir(image / "containers") == []
    assert sorted(os.listdir(sample.root / "vfs" / "dir")) == sorted([sample.base, sample.top])
    assert run(sample, capfd, "fsck")[0] == 0


def test_a_container_whose_record_is_gone_is_removed_on_demand(
    sample: Sample, capfd: pytest.CaptureFixture[str]
) -> None:
    image = sample.root / "image" / "vfs"
    shutil.rmtree(image / "layerdb" / "mounts" / "box")
    status, out, _ = run(sample, capfd, "gc")
    assert status == 1
    assert f"that of container {sample.mount_id[:12]}, whose record is gone" in out
    status, _, said = run(sample, capfd, "container", "rm", "box")
    assert status == 1
    assert "its read-write layer is gone" in said
    assert run(sample, capfd, "container", "rm", "--force", "box")[0] == 0
    assert "2 things removed" in run(sample, capfd, "gc")[1]
    assert "there is no container" in run(sample, capfd, "container", "rm", "--force", "box")[2]
    assert sorted(os.listdir(sample.root / "vfs" / "dir")) == sorted([sample.base, sample.top])


def test_layers_of_a_damaged_image_stay_until_it_is_removed(sample: Sample, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(sample, capfd, "container", "rm", "box")[0] == 0
    (config,) = (sample.root / "image" / "vfs" / "imagedb" / "content" / "sha256").iterdir()
    config.write_text("{}")
    status, out, _ = run(sample, capfd, "gc", "--layers")
    assert status == 1
    assert f"image {config.name[:12]} may need it" in out
    with open_store(sample.root) as store:
        (top,) = [one.chain_id for one in store.map().values() if one.cache_id == sample.top]
    status, _, said = run(sample, capfd, "layer", "rm", top)
    assert status == 1
    assert "may still be needed: image" in said
    assert f"removed sha256:{config.name}" in run(sample, capfd, "image", "rm", config.name[:12])[1]
    assert run(sample, capfd, "gc", "--layers")[0] == 0
    assert os.listdir(sample.root / "vfs" / "dir") == []


def test_a_damaged_layer_of_an_image_keeps_the_others(sample: Sample, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(sample, capfd, "container", "rm", "box")[0] == 0
    with open_store(sample.root) as store:
        (top,) = [one.chain_id for one in store.map().values() if one.cache_id == sample.top]
    (sample.root / "image" / "vfs" / "layerdb" / "sha256" / top[7:] / "size").write_text("many")
    for words in (("gc", "--layers"), ("fsck", "--repair"), ("gc", "--layers")):
        run(sample, capfd, *words)
    assert sorted(os.listdir(sample.root / "vfs" / "dir")) == sorted([sample.base, sample.top])
    assert run(sample, capfd, "image", "rm", "app")[0] == 0
    assert run(sample, capfd, "fsck", "--repair")[0] == 0
    assert run(sample, capfd, "gc", "--layers")[0] == 0
    assert os.listdir(sample.root / "vfs" / "dir") == []
