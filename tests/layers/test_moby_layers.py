"""moby's tests of its layer package, by their names there, on every driver."""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layers.archives import archive, member
from tests.layers.conftest import Workshop, write
from unionfs.archive.changes import ChangeKind
from unionfs.errors import LayerDamagedError, LayerNotRetainedError, LayerStoreError, MountNameConflictError
from unionfs.layers import identity
from unionfs.layers.file_metadata import FileMetadataStore
from unionfs.layers.identity import ChainID, create_chain_id, diff_id_of
from unionfs.layers.layer import EMPTY_LAYER, is_empty
from unionfs.layers.metadata import LayerRecord, MountRecord
from unionfs.layers.tar_split import disassemble


def read(root: str, path: str) -> str:
    return Path(root, path).read_text()


def test_mount_and_register(shop: Workshop) -> None:
    """TestMountAndRegister."""
    layer = shop.layer("", write("testfile.txt", "some test data"))
    assert layer.size > 0
    rw = shop.store.create_rw_layer("new-test-mount", layer.chain_id)
    with rw.mounted() as path:
        assert read(path, "testfile.txt") == "some test data"
    assert rw.release() == []
    assert [gone.chain_id for gone in layer.release()] == [layer.chain_id]


def test_layer_release(shop: Workshop) -> None:
    """TestLayerRelease: two branches on shared parents."""
    one = shop.layer("", write("layer1.txt", "layer 1 file"))
    two = shop.layer(one.chain_id, write("layer2.txt", "layer 2 file"))
    assert one.release() == []
    three_a = shop.layer(two.chain_id, write("layer3.txt", "layer 3a file"))
    three_b = shop.layer(two.chain_id, write("layer3.txt", "layer 3b file"))
    assert two.release() == []
    assert len(shop.store.map()) == 4
    assert [gone.chain_id for gone in three_b.release()] == [three_b.chain_id]
    released = three_a.release()
    assert [gone.chain_id for gone in released] == [three_a.chain_id, two.chain_id, one.chain_id]
    assert [gone.diff_id for gone in released] == [three_a.diff_id, two.diff_id, one.diff_id]
    assert released[0].size == sum(gone.diff_size for gone in released)
    assert shop.store.map() == {}


def test_store_restore(shop: Workshop) -> None:
    """TestStoreRestore."""
    one = shop.layer("", write("layer1.txt", "layer 1 file"))
    two = shop.layer(one.chain_id, write("layer2.txt", "layer 2 file"))
    one.release()
    three = shop.layer(two.chain_id, write("layer3.txt", "layer 3 file"))
    two.release()
    rw = shop.store.create_rw_layer("some-mount_name", three.chain_id)
    with rw.mounted() as path:
        write("testfile.txt", "nothing here")(path)
    before = {chain: (layer.diff_id, layer.size, layer.cache_id) for chain, layer in shop.store.map().items()}

    store = shop.reopen()
    assert {chain: (layer.diff_id, layer.size, layer.cache_id) for chain, layer in store.map().items()} == before
    again = store.get(three.chain_id)
    with pytest.raises(MountNameConflictError, match="there is a container"):
        store.create_rw_layer("some-mount_name", three.chain_id)
    rw = store.get_rw_layer("some-mount_name")
    first = rw.mount()
    assert rw.mount() == first
    assert read(first, "testfile.txt") == "nothing here"
    rw.unmount()
    assert read(first, "testfile.txt") == "nothing here"
    rw.unmount()
    assert store.release_rw_layer(rw) == []
    assert store.release_rw_layer(rw) == []
    assert [gone.chain_id for gone in again.release()] == [three.chain_id, two.chain_id, one.chain_id]


def test_tar_stream_stability(shop: Workshop) -> None:
    """TestTarStreamStability."""
    tars = [
        archive([member("etc/"), member("etc/hosts", "mydomain 10.0.0.1"), member("etc/profile", "PATH=/usr/bin")]),
        archive([member("root/"), member("root/.bashrc", "PATH=/usr/sbin:/usr/bin")]),
    ]
    one = shop.store.register(io.BytesIO(tars[0]))
    two = shop.store.register(io.BytesIO(tars[1]), one.chain_id)
    cache = shop.own_files(one.cache_id)
    (cache / "etc" / "extra").write_text("smuggled in")
    with one.tar_stream() as stream:
        assert stream.read() == tars[0]
    one.release()
    with two.tar_stream() as stream:
        assert stream.read() == tars[1]
    two.release()


def test_register_existing_layer(shop: Workshop) -> None:
    """TestRegisterExistingLayer; contract rows 87 and 89."""
    base = shop.layer("", write("etc/profile", "# Base configuration"))
    tar = archive([member("root/"), member("root/.bashrc", "# Root configuration")])
    one = shop.store.register(io.BytesIO(tar), base.chain_id)
    two = shop.store.register(io.BytesIO(tar), base.chain_id)
    assert one is not two
    assert one.chain_id == two.chain_id
    assert one.cache_id == two.cache_id
    assert len(shop.store.map()) == 2
    shop.assert_nothing_leaked()
    assert one.release() == []
    with pytest.raises(LayerNotRetainedError, match="layer not retained"):
        one.release()
    assert [gone.chain_id for gone in two.release()] == [two.chain_id]
    assert two.release() == []


def test_tar_stream_verification(shop: Workshop) -> None:
    """TestTarStreamVerification: the records of two layers are swapped."""
    tars = [archive([member("foo", "abc")]), archive([member("foo", "abc"), member("bar", "def")])]
    layers = [shop.store.register(io.BytesIO(tar)) for tar in tars]
    files = [shop.record(layer) / "tar-split.json.gz" for layer in layers]
    aside = shop.root / "aside"
    files[0].rename(aside)
    files[1].rename(files[0])
    aside.rename(files[1])
    with layers[0].tar_stream() as stream, pytest.raises(LayerDamagedError):
        stream.read()
    with layers[1].tar_stream() as stream, pytest.raises(LayerDamagedError, match="could not verify layer data"):
        stream.read()


def test_layer_size(shop: Workshop) -> None:
    """TestLayerSize."""
    one = shop.layer("", write("file1", "Base contents"))
    two = shop.layer(one.chain_id, write("file2", "Added contents"))
    assert (one.diff_size, one.size) == (13, 13)
    assert (two.diff_size, two.size) == (14, 27)
    assert two.parent is not None
    assert two.parent.chain_id == one.chain_id
    assert one.parent is None


def test_mount_init(shop: Workshop) -> None:
    """TestMountInit; contract row 95."""
    base = shop.layer("", write("testfile.txt", "base data!"))
    rw = shop.store.create_rw_layer("fun-mount", base.chain_id, init=write("testfile.txt", "init data!", 0o777))
    with rw.mounted() as path:
        assert read(path, "testfile.txt") == "init data!"
        assert os.stat(os.path.join(path, "testfile.txt")).st_mode & 0o7777 == 0o777
    assert rw.changes() == []
    mount_id = shop.store.get_mount_id("fun-mount")
    assert {mount_id, mount_id + "-init"} <= shop.trees()
    rw.release()


def test_mount_size(shop: Workshop) -> None:
    """TestMountSize."""
    base = shop.layer("", write("file1", "Base contents"))
    rw = shop.store.create_rw_layer("mount-size", base.chain_id, init=write("file-init", "Init contents", 0o777))
    with rw.mounted() as path:
        write("file2", "Mutable contents", 0o755)(path)
        assert rw.size() == len("Mutable contents")
    assert rw.size() == len("Mutable contents")
    rw.release()


def test_mount_changes(shop: Workshop) -> None:
    """TestMountChanges."""

    def base_files(root: str) -> None:
        for number in (1, 2, 3):
            write(f"testfile{number}.txt", f"base data {number}!")(root)
            os.utime(os.path.join(root, f"testfile{number}.txt"), (1_000_000, 1_000_000))

    base = shop.layer("", base_files)
    rw = shop.store.create_rw_layer("mount-changes", base.chain_id, init=write("testfile1.txt", "init data!", 0o777))
    with rw.mounted() as path:
        write("testfile1.txt", "mount data!", 0o755)(path)
        os.unlink(os.path.join(path, "testfile2.txt"))
        os.chmod(os.path.join(path, "testfile3.txt"), 0o755)
        write("testfile4.txt", "mount data!")(path)
    assert [(change.kind, change.path) for change in rw.changes()] == [
        (ChangeKind.MODIFY, b"/testfile1.txt"),
        (ChangeKind.DELETE, b"/testfile2.txt"),
        (ChangeKind.MODIFY, b"/testfile3.txt"),
        (ChangeKind.ADD, b"/testfile4.txt"),
    ]
    rw.release()


def test_mount_apply(shop: Workshop) -> None:
    """TestMountApply."""
    base = shop.layer("", write("testfile.txt", "base data"))
    rw = shop.store.create_rw_layer("mount-apply", base.chain_id)
    rw.apply_diff(io.BytesIO(archive([member("newfile.txt", "here's another file")])))
    with rw.mounted() as path:
        assert read(path, "newfile.txt") == "here's another file"
        assert read(path, "testfile.txt") == "base data"
    rw.release()


def test_empty_layer() -> None:
    """TestEmptyLayer."""
    assert str(EMPTY_LAYER.chain_id) == str(EMPTY_LAYER.diff_id)
    assert EMPTY_LAYER.diff_id == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
    assert is_empty(EMPTY_LAYER.diff_id)
    assert not is_empty("sha256:" + "0" * 64)
    assert EMPTY_LAYER.parent is None
    assert (EMPTY_LAYER.size, EMPTY_LAYER.diff_size, EMPTY_LAYER.metadata()) == (0, 0, {})
    for stream in (EMPTY_LAYER.tar_stream(), EMPTY_LAYER.tar_stream_from("")):
        assert diff_id_of(stream.read()) == EMPTY_LAYER.diff_id
    with pytest.raises(LayerStoreError, match="can't get parent tar stream of an empty layer"):
        EMPTY_LAYER.tar_stream_from("sha256:" + "0" * 64)


def a_record(cache_id: str = "c" * 64) -> tuple[ChainID, LayerRecord]:
    diff_id = diff_id_of(os.urandom(8))
    return create_chain_id([diff_id]), LayerRecord(diff_id=diff_id, size=0, cache_id=cache_id)


def test_commit_failure(tmp_path: Path) -> None:
    """TestCommitFailure: a file is where the layers belong."""
    records = FileMetadataStore(str(tmp_path))
    (tmp_path / "sha256").touch()
    transaction = records.begin("c" * 64)
    with pytest.raises(NotADirectoryError):
        transaction.commit(*a_record())
    transaction.cancel()
    assert os.listdir(tmp_path / "tmp") == []


def test_start_transaction_failure(tmp_path: Path) -> None:
    """TestStartTransactionFailure: a file is where transactions belong."""
    records = FileMetadataStore(str(tmp_path))
    (tmp_path / "tmp").touch()
    with pytest.raises(NotADirectoryError):
        records.begin("c" * 64)
    (tmp_path / "tmp").unlink()
    transaction = records.begin("c" * 64)
    assert str(transaction).startswith(str(tmp_path / "tmp"))
    transaction.cancel()


def test_get_orphan(tmp_path: Path) -> None:
    """TestGetOrphan: what a removal left is found by its name, as Docker's is."""
    records = FileMetadataStore(str(tmp_path))
    chain_id, record = a_record()
    records.begin(record.cache_id).commit(chain_id, record)
    assert records.incomplete() == []
    path = tmp_path / "sha256" / chain_id[7:]
    path.rename(tmp_path / "sha256" / f"{chain_id[7:]}-{identity.new_id()}-removing")
    (leftover,) = records.incomplete()
    assert leftover.driver_ids == (record.cache_id,)
    assert records.list_layers() == []


def test_graph_driver_home_gone(shop: Workshop) -> None:
    """Not moby's: a layer whose tree was deleted is reported, and can be registered again."""
    tar = archive([member("a", "1")])
    layer = shop.store.register(io.BytesIO(tar))
    tree = shop.own_files(layer.cache_id)
    shutil.rmtree(tree if shop.driver == "vfs" else tree.parent)
    store = shop.reopen()
    (unreadable,) = store.unreadable
    assert unreadable.name == layer.chain_id
    assert layer.cache_id in unreadable.reason
    again = store.register(io.BytesIO(tar))
    assert again.chain_id == layer.chain_id
    assert store.unreadable == []
    assert again.verify() == len(tar)
    shop.reopen()
    shop.assert_nothing_leaked()


@pytest.mark.parametrize("with_record", [True, False])
def test_layer_migration(shop: Workshop, with_record: bool, tmp_path: Path) -> None:
    """TestLayerMigration, TestLayerMigrationNoTarsplit; contract row 120: trees that a driver has become layers."""
    tars = [
        archive([member("root/"), member("root/.bashrc", "# Boring configuration")]),
        archive([member("root/"), member("root/.bashrc", "# Updated configuration")]),
    ]
    driver = shop.store.driver
    parent = ""
    adopted = []
    for number, tar in enumerate(tars):
        tree = f"graph-id-{number}" + "0" * 60
        driver.create(tree, f"graph-id-{number - 1}" + "0" * 60 if number else "")
        driver.apply_diff(tree, f"graph-id-{number - 1}" + "0" * 60 if number else "", io.BytesIO(tar))
        lines: list[bytes] = []
        disassemble(io.BytesIO(tar), lines.append)
        record = io.BytesIO(gzip.compress(b"".join(lines))) if with_record else None
        layer = shop.store.adopt(tree, parent, record=record)
        assert layer.cache_id == tree
        assert layer.verify() > 0
        if with_record:
            assert layer.diff_id == diff_id_of(tar)
            with layer.tar_stream() as stream:
                assert stream.read() == tar
            again = shop.store.register(io.BytesIO(tar), parent)
            assert again.cache_id == tree
            again.release()
        with pytest.raises(LayerStoreError, match="belongs to a layer already"):
            shop.store.adopt(tree, parent)
        parent = layer.chain_id
        adopted.append(layer)
    assert {one.chain_id for one in shop.reopen().map().values()} == {one.chain_id for one in adopted}
    with shop.store.create_rw_layer("c", parent).mounted() as path:
        assert read(path, "root/.bashrc") == "# Updated configuration"
    gone = shop.store.get_rw_layer("c")
    shop.store.release_rw_layer(gone)


def test_an_adoption_that_fails_leaves_the_tree(shop: Workshop) -> None:
    tree = "1" * 64
    shop.store.driver.create(tree)
    lines: list[bytes] = []
    disassemble(io.BytesIO(archive([member("not/there", "1")])), lines.append)
    with pytest.raises(LayerDamagedError):
        shop.store.adopt(tree, record=io.BytesIO(b"".join(lines)))
    assert shop.store.driver.exists(tree)
    with pytest.raises(LayerStoreError, match="graph ID does not exist: 'nope'"):
        shop.store.adopt("nope")
    # Nor does the next start remove it, should this one die in the middle.
    shop.store.records.begin(tree, adopting=True)
    shop.reopen()
    assert shop.store.driver.exists(tree)
    shop.store.driver.remove(tree)


def test_mount_migration(shop: Workshop) -> None:
    """TestMountMigration; contract row 120: a container's tree that a driver has becomes a read-write layer."""
    base = shop.store.register(
        io.BytesIO(archive([member("etc/"), member("root/"), member("root/.bashrc", "# Boring")]))
    )
    driver, tree = shop.store.driver, identity.new_id()
    driver.create_read_write(f"{tree}-init", base.cache_id)
    fill = driver.get(f"{tree}-init")
    write("etc/hosts", "127.0.0.1 localhost")(fill)
    driver.put(f"{tree}-init")
    driver.create_read_write(tree, f"{tree}-init")
    fill = driver.get(tree)
    write("etc/hosts", "127.0.0.1 changed", 0o600)(fill)
    write("root/.bashrc", "# Updated configuration")(fill)
    write("root/testfile1.txt", "nothing valuable")(fill)
    driver.put(tree)

    with pytest.raises(LayerStoreError, match="graph ID does not exist: '0000"):
        shop.store.adopt_rw_layer("migration-mount", "0" * 64, base.chain_id)
    for other in ("nope", f"{tree}-init"):
        with pytest.raises(LayerStoreError, match="invalid mount id value"):
            shop.store.adopt_rw_layer("migration-mount", other, base.chain_id)
    with pytest.raises(LayerStoreError, match="belongs to a layer already"):
        shop.store.adopt_rw_layer("migration-mount", base.cache_id, base.chain_id)
    first = shop.store.adopt_rw_layer("migration-mount", tree, base.chain_id)
    assert [(change.path, change.kind) for change in first.changes()] == [
        (b"/etc", ChangeKind.MODIFY),
        (b"/etc/hosts", ChangeKind.MODIFY),
        (b"/root", ChangeKind.MODIFY),
        (b"/root/.bashrc", ChangeKind.MODIFY),
        (b"/root/testfile1.txt", ChangeKind.ADD),
    ]
    with pytest.raises(MountNameConflictError, match="there is a container migration-mount already"):
        shop.store.create_rw_layer("migration-mount", base.chain_id)
    with pytest.raises(MountNameConflictError, match="container migration-mount stands on sha256:"):
        shop.store.adopt_rw_layer("migration-mount", tree)
    with pytest.raises(MountNameConflictError, match="there is a container migration-mount already"):
        other = identity.new_id()
        driver.create_read_write(other)
        shop.store.adopt_rw_layer("migration-mount", other)
    driver.remove(other)
    assert base.release() == [], "the read-write layer needs it"

    store = shop.reopen()
    second = store.adopt_rw_layer("migration-mount", tree, base.chain_id)
    third = store.get_rw_layer("migration-mount")
    assert second.mount() == third.mount()
    assert read(second.mount(), "etc/hosts") == "127.0.0.1 changed"
    for handle in (second, second, third):
        handle.unmount()
    assert second.release() == []
    assert [gone.chain_id for gone in third.release()] == [base.chain_id]
    assert shop.trees() == set()


def test_an_adoption_of_a_container_that_fails_leaves_its_tree(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = identity.new_id()
    shop.store.driver.create_read_write(tree)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
        broken.setattr(FileMetadataStore, "commit_mount", fail)
        shop.store.adopt_rw_layer("c", tree)
    assert shop.store.incomplete() == []
    # Nor does the next start remove it, should this one die in the middle.
    shop.store.records.begin_mount("c", MountRecord(mount_id=tree), adopting=True)
    shop.reopen()
    assert shop.store.driver.exists(tree)
    assert shop.store.adopt_rw_layer("c", tree).release() == []
    assert not shop.store.driver.exists(tree)


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Threads take turns far more often, so that what is not guarded shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("turn", range(25))
def test_a_tree_is_adopted_once(vfs_shop: Workshop, fast_switches: None, turn: int) -> None:
    """By whichever of many threads comes first, as a layer or as a container's."""
    tree = identity.new_id()
    vfs_shop.store.driver.create_read_write(tree)
    together = threading.Barrier(8)
    refused: list[str] = []

    def adopt(number: int) -> None:
        together.wait()
        try:
            if number % 2:
                vfs_shop.store.adopt(tree)
            else:
                vfs_shop.store.adopt_rw_layer(f"c{number}", tree)
        except LayerStoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=adopt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(vfs_shop.store.map()) + len(vfs_shop.store.rw_layers()) == 1
    assert refused == [f"{tree} belongs to a layer already; give the id of a tree of no layer"] * 7
