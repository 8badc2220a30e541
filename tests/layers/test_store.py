"""The layer store beyond moby's own tests: rows 84 to 119 of the specification, on the simplest driver."""

from __future__ import annotations

import errno
import gzip
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.layers.archives import archive, member
from tests.layers.conftest import Workshop, write
from tests.layers.hammer import hammer
from unionfs.errors import (
    ActiveMountError,
    ArchiveError,
    DigestMismatchError,
    DriverError,
    LayerBusyError,
    LayerDamagedError,
    LayerDoesNotExistError,
    LayerNotRetainedError,
    LayerStoreError,
    MaxDepthExceededError,
    MountDoesNotExistError,
    NotMountedError,
    StoreLockedError,
)
from unionfs.fuse_ops import mount_registry, mountinfo
from unionfs.layers import disk
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import collect
from unionfs.layers.identity import create_chain_id, diff_id_of
from unionfs.layers.layer import Layer
from unionfs.layers.metadata import Descriptor
from unionfs.layers.opening import default_root, open_store

BASE = archive([member("etc/"), member("etc/conf", "base"), member("gone", "1")])
TOP = archive([member("etc/"), member("etc/conf", "top"), member(".wh.gone")])
OTHER = archive([member("other", "layer")])


def stream(tar: bytes) -> io.BytesIO:
    return io.BytesIO(tar)


class Pipe:
    """A stream that cannot be rewound, and gives little at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._data.read(min(size, 700))


# Registering


def test_everything_counts_for_the_digest(vfs_shop: Workshop) -> None:
    """Row 84."""
    tar = BASE + b"\1trailing garbage" * 100
    layer = vfs_shop.store.register(stream(tar))
    assert layer.diff_id == diff_id_of(tar)
    assert layer.verify() == len(tar)
    with layer.tar_stream() as out:
        assert out.read() == tar


@pytest.mark.parametrize("wrap", [stream, lambda tar: stream(gzip.compress(tar)), Pipe])
def test_any_stream_will_do(vfs_shop: Workshop, wrap: Callable[[bytes], Any]) -> None:
    tar = archive([member("a", "first"), member("big", os.urandom(300_000)), member("a", "second")])
    layer = vfs_shop.store.register(wrap(tar))
    assert layer.diff_id == diff_id_of(tar)
    assert layer.verify() == len(tar)
    vfs_shop.assert_nothing_leaked()


def test_a_stream_is_read_from_where_it_stands(vfs_shop: Workshop) -> None:
    tar = archive([member("a", "first"), member("a", "second")])
    file = io.BytesIO(b"something before" + tar)
    file.seek(16)
    assert vfs_shop.store.register(file).diff_id == diff_id_of(tar)
    assert not file.closed


def test_expected_digest(vfs_shop: Workshop) -> None:
    """Row 85."""
    store = vfs_shop.store
    with pytest.raises(DigestMismatchError, match=f"{diff_id_of(BASE)}, but {diff_id_of(TOP)} was expected"):
        store.register(stream(BASE), expected_diff_id=diff_id_of(TOP))
    assert store.map() == {}
    vfs_shop.assert_nothing_leaked()
    first = store.register(stream(BASE), expected_diff_id=diff_id_of(BASE))
    unread = stream(BASE)
    second = store.register(unread, expected_diff_id=diff_id_of(BASE))
    assert unread.tell() == 0
    assert second is not first
    assert second.chain_id == first.chain_id


def test_progress(vfs_shop: Workshop) -> None:
    tar = archive([member("big", os.urandom(3_000_000))])
    seen: list[int] = []
    vfs_shop.store.register(stream(gzip.compress(tar)), progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == len(tar)


def test_descriptor(vfs_shop: Workshop) -> None:
    descriptor = Descriptor(
        media_type="a/b", digest=diff_id_of(b""), size=5, urls=("http://x",), annotations={"k": "v"}
    )
    layer = vfs_shop.store.register_with_descriptor(stream(BASE), "", descriptor)
    written = (vfs_shop.record(layer) / "descriptor.json").read_text()
    before, _, after = written.partition(descriptor.digest)
    assert before == '{"mediaType":"a/b","size":5,"digest":"'
    assert after == '","urls":["http://x"],"annotations":{"k":"v"}}'
    assert vfs_shop.reopen().map()[layer.chain_id].descriptor == descriptor
    plain = vfs_shop.store.register_with_descriptor(stream(TOP), "", Descriptor(media_type="a/b"))
    assert not (vfs_shop.record(plain) / "descriptor.json").exists()


class Failing:
    """A driver that fails in one call, once."""

    def __init__(self, driver: Any, call: str, error: Exception) -> None:
        self._driver = driver
        self._call = call
        self._error: Exception | None = error

    def __getattr__(self, name: str) -> Any:
        if name == self._call and self._error is not None:
            error, self._error = self._error, None

            def fail(*_: object) -> None:
                raise error

            return fail
        return getattr(self._driver, name)

    # These make it one of the kinds of drivers with more to offer.
    def sync(self, layer_id: str) -> None:
        self.__getattr__("sync")(layer_id)

    def layer_ids(self) -> list[str]:
        ids: list[str] = self._driver.layer_ids()
        return ids


@contextmanager
def failing(shop: Workshop, call: str, error: Exception | None = None) -> Iterator[None]:
    real = shop.store.driver
    broken = Failing(real, call, error or DriverError("the test wants this"))
    if call == "sync":
        object.__setattr__(broken, "sync", broken.__getattr__("sync"))
    shop.store.driver = broken
    try:
        yield
    finally:
        shop.store.driver = real


@pytest.mark.parametrize("call", ["create", "apply_diff", "sync"])
def test_a_failed_registration_leaves_nothing(vfs_shop: Workshop, call: str) -> None:
    """Row 86."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    with failing(vfs_shop, call), pytest.raises(DriverError, match="the test wants this"):
        store.register(stream(TOP), base.chain_id)
    vfs_shop.assert_nothing_leaked()
    assert store.reference_count(base.chain_id) == 1
    assert store.register(stream(TOP), base.chain_id).verify() == len(TOP)


class FullDisk:
    """Fails one of the store's own changes to the disk, by its number from 1.

    With ``sync_dir`` not only what comes before a rename fails, but also what makes it last.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.failed = ""
        self._left = at
        for name in ("ensure_dir", "new_dir", "write_file", "move", "sync_dir", "delete"):
            monkeypatch.setattr(disk, name, self._counting(name, getattr(disk, name)))

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any) -> Any:
            self._left -= 1
            if not self._left:
                self.failed = name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])
            return real(*arguments)

        return change


DISK_OPERATIONS: dict[str, Callable[[Workshop], object]] = {
    "register": lambda shop: shop.store.register(stream(TOP), create_chain_id([diff_id_of(BASE)])),
    "create": lambda shop: shop.store.create_rw_layer("new", init=write("etc/hosts", "x")),
    "release": lambda shop: shop.store.get(create_chain_id([diff_id_of(OTHER)])).release(),
    "remove": lambda shop: shop.store.get_rw_layer("old").release(),
}


@pytest.mark.parametrize("operation", DISK_OPERATIONS)
def test_the_disk_fails_at_each_step(
    vfs_shop: Workshop, operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Row 86, and the same for what else changes the store: it stays usable, and nothing of it is left."""
    base = vfs_shop.store.register(stream(BASE))
    vfs_shop.store.register(stream(OTHER))
    vfs_shop.store.create_rw_layer("old", base.chain_id)
    vfs_shop.store.close()
    failures = []
    for at in range(1, 200):
        shop = Workshop(Path(shutil.copytree(vfs_shop.root, tmp_path / f"try-{at}", symlinks=True)), "vfs")
        before = (shop.store.map().keys(), shop.store.rw_layers().keys())
        with monkeypatch.context() as broken:
            full = FullDisk(broken, at)
            try:
                DISK_OPERATIONS[operation](shop)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                # As the caller was told: nothing has happened. Or what has is complete, and a layer below it is left.
                if "old" in shop.store.rw_layers():
                    assert before == (shop.store.map().keys(), shop.store.rw_layers().keys()), (at, full.failed)
                else:
                    assert operation == "remove"
                    assert before[0] == shop.store.map().keys()
                    assert shop.store.reference_count(base.chain_id) == 0
        after = (shop.store.map().keys(), shop.store.rw_layers().keys())
        shop.store.recover()
        shop.assert_nothing_leaked()
        shop.reopen()
        assert shop.store.unreadable == [], (at, full.failed)
        assert after == (shop.store.map().keys(), shop.store.rw_layers().keys()), (at, full.failed)
        assert fsck(shop.store, deep=True) == []
        if after == before:
            DISK_OPERATIONS[operation](shop)  # now it works
        shop.store.close()
        if not full.failed:
            break
        failures.append(full.failed)
    assert {"move", "sync_dir"} <= set(failures)
    assert len(failures) >= 3


@pytest.mark.parametrize(
    "bad",
    [BASE[:700], gzip.compress(BASE)[:-20], b"nothing like an archive" * 100, archive([member("../a", "1")])],
    ids=["cut off", "cut off gzip", "no archive", "outside"],
)
def test_a_bad_archive(vfs_shop: Workshop, bad: bytes) -> None:
    before = threading.active_count()
    with pytest.raises(ArchiveError):
        vfs_shop.store.register(stream(bad))
    vfs_shop.assert_nothing_leaked()
    assert vfs_shop.store.map() == {}
    assert threading.active_count() == before


def test_a_stream_that_fails(vfs_shop: Workshop) -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise ConnectionResetError(errno.ECONNRESET, "the network is gone")

    with pytest.raises(ConnectionResetError, match="the network is gone"):
        vfs_shop.store.register(Broken())
    vfs_shop.assert_nothing_leaked()


def test_depth(vfs_shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 88."""
    store = vfs_shop.store
    monkeypatch.setattr(store, "_sync", lambda *_: None)  # 125 times would take long
    parent = ""
    for number in range(125):
        layer = store.register(stream(archive([member(f"{number}", "x")])), parent)
        parent = layer.chain_id
    assert layer.depth == 125
    assert layer.size == 125
    with pytest.raises(MaxDepthExceededError, match="max depth exceeded"):
        store.register(stream(TOP), parent)
    store.create_rw_layer("deepest", parent)
    assert len(vfs_shop.reopen().map()) == 125


# Handles


def test_views_pin_nothing(vfs_shop: Workshop) -> None:
    """Row 93."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    assert top.parent is not None
    views = [store.map()[base.chain_id], top.parent]
    for view in views:
        assert not hasattr(view, "release")
        with pytest.raises(LayerNotRetainedError):
            store.release(view)
    base.release()
    top.release()
    assert store.release(views[0]) == []
    rw = store.create_rw_layer("nothing below")
    assert rw.parent is None


def test_release_of_handles(vfs_shop: Workshop) -> None:
    """Rows 89 and 90."""
    store = vfs_shop.store
    one = store.register(stream(BASE))
    two = store.get(one.chain_id)
    assert one != two
    assert one.release() == []
    with pytest.raises(LayerNotRetainedError, match="layer not retained"):
        one.release()
    assert [gone.diff_id for gone in two.release()] == [diff_id_of(BASE)]
    assert one.release() == two.release() == []
    with pytest.raises(LayerDoesNotExistError, match="layer does not exist"):
        store.get(one.chain_id)
    with pytest.raises(LayerDoesNotExistError):
        store.register(stream(TOP), one.chain_id)
    with pytest.raises(LayerDoesNotExistError):
        store.create_rw_layer("x", one.chain_id)
    vfs_shop.assert_nothing_leaked()


def test_context_manager(vfs_shop: Workshop) -> None:
    with vfs_shop.store.register(stream(BASE)) as layer, vfs_shop.store.get(layer.chain_id) as again:
        assert again.diff_size == 5
    assert vfs_shop.store.map() == {}


def test_wrong_counts_are_an_error_and_remove_nothing(vfs_shop: Workshop) -> None:
    """Row 92: a panic in moby."""
    store = vfs_shop.store
    layer = store.register(stream(BASE))
    layer.stored.reference_count = 0
    with pytest.raises(LayerStoreError, match=r"internal error: .* has no reference to give back"):
        layer.release()
    other = store.register(stream(TOP))
    other.stored.references.add(object())
    with pytest.raises(LayerStoreError, match=r"internal error: .* has handles"):
        other.release()
    assert len(store.map()) == 2
    assert store.get(layer.chain_id).verify() == len(BASE)


def test_a_release_that_fails_can_be_repeated(vfs_shop: Workshop) -> None:
    store = vfs_shop.store
    layer = store.register(stream(BASE))
    with failing(vfs_shop, "remove", LayerBusyError("in use")), pytest.raises(LayerBusyError):
        layer.release()
    assert store.get(layer.chain_id).release() == []
    assert vfs_shop.reopen().map().keys() == {layer.chain_id}
    again = vfs_shop.store.get(layer.chain_id)
    assert [gone.chain_id for gone in again.release()] == [layer.chain_id]
    vfs_shop.assert_nothing_leaked()


def test_parents_stay_on_demand(vfs_shop: Workshop) -> None:
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    rw = store.create_rw_layer("c", top.chain_id)
    base.release()
    top.release()
    assert store.release_rw_layer(rw, keep_parents=True) == []
    assert [gone.chain_id for gone in store.release(store.get(top.chain_id), keep_parents=True)] == [top.chain_id]
    assert store.map().keys() == {base.chain_id}


def test_what_nobody_asked_for_is_not_given_up(vfs_shop: Workshop) -> None:
    """A layer without references, as after a start, outlives an operation on it that fails."""
    base = vfs_shop.store.register(stream(BASE))
    store = vfs_shop.reopen()
    with pytest.raises(ArchiveError):
        store.register(stream(b"no archive" * 100), base.chain_id)
    assert store.map().keys() == {base.chain_id}


# Read-write layers


@pytest.mark.parametrize("call", ["create_read_write", "get", "put", "sync"])
def test_a_failed_creation_leaves_nothing(vfs_shop: Workshop, call: str) -> None:
    """Row 96."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    with failing(vfs_shop, call), pytest.raises(DriverError):
        store.create_rw_layer("c", base.chain_id, init=write("x", "y"))
    vfs_shop.assert_nothing_leaked()
    assert store.rw_layers() == {}
    assert store.reference_count(base.chain_id) == 1

    def fail(path: str) -> None:
        raise RuntimeError(path)

    with pytest.raises(RuntimeError):
        store.create_rw_layer("c", base.chain_id, init=fail)
    vfs_shop.assert_nothing_leaked()
    store.create_rw_layer("c", base.chain_id)


def test_a_removal_that_fails_can_be_repeated(vfs_shop: Workshop) -> None:
    """Row 97."""
    store = vfs_shop.store
    rw = store.create_rw_layer("c")
    with failing(vfs_shop, "remove", LayerBusyError("in use")), pytest.raises(LayerBusyError):
        rw.release()
    with rw.mounted() as path:
        assert os.listdir(path) == []
    assert store.get_mount_id("c") == rw.mount_id
    assert rw.release() == []
    with pytest.raises(MountDoesNotExistError, match="mount does not exist"):
        store.get_rw_layer("c")
    with pytest.raises(MountDoesNotExistError):
        store.get_mount_id("c")
    vfs_shop.assert_nothing_leaked()


def test_each_handle_is_released_on_its_own(vfs_shop: Workshop) -> None:
    """Row 98."""
    store = vfs_shop.store
    one = store.create_rw_layer("c")
    two = store.get_rw_layer("c")
    assert one is not two
    assert one.release() == []
    with pytest.raises(LayerNotRetainedError):
        one.release()
    assert list(store.rw_layers()) == ["c"]
    assert two.release() == []
    assert store.rw_layers() == {}


@pytest.mark.parametrize("driver", ["unionfs", "overlay2"])
def test_unmounting(shop: Workshop) -> None:
    """Row 99."""
    base = shop.store.register(stream(BASE))
    rw = shop.store.create_rw_layer("c", base.chain_id)
    with pytest.raises(NotMountedError, match="c: is not mounted; mount it first"):
        rw.unmount()
    path = rw.mount()
    assert rw.is_mounted()
    with pytest.raises(ActiveMountError, match="mount still active: c is mounted"):
        shop.store.release_rw_layer(rw, force=False)
    rw = shop.reopen().get_rw_layer("c")
    assert rw.is_mounted()
    assert Path(path, "gone").read_text() == "1"
    rw.unmount()
    assert not rw.is_mounted()
    with pytest.raises(NotMountedError):
        rw.unmount()
    rw.mount()
    assert [gone.chain_id for gone in rw.release()] == [base.chain_id]


def test_rw_metadata(shop: Workshop) -> None:
    rw = shop.store.create_rw_layer("c")
    assert rw.metadata()["ID"] == "c"
    rw.release()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "n" * 256, "nul\0"])
def test_names(vfs_shop: Workshop, name: str) -> None:
    with pytest.raises(LayerStoreError, match="cannot be named"):
        vfs_shop.store.create_rw_layer(name)
    vfs_shop.assert_nothing_leaked()


# Streams


def test_changes_since_an_ancestor(shop: Workshop) -> None:
    """Row 101."""
    store = shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    other = store.register(stream(TOP))
    with top.tar_stream_from() as flat, top.tar_stream_from(base.chain_id) as changes:
        fresh = store.register(flat)
        again = store.register(changes, base.chain_id)
    with store.create_rw_layer("flat", fresh.chain_id).mounted() as path:
        assert sorted(os.listdir(path)) == ["etc"]
        assert Path(path, "etc", "conf").read_text() == "top"
    with store.create_rw_layer("changes", again.chain_id).mounted() as path:
        assert sorted(os.listdir(path)) == ["etc"]
    for stranger in (top.chain_id, other.chain_id, "sha256:00"):
        with pytest.raises(LayerStoreError, match="cannot provide diff to non-parent"):
            top.tar_stream_from(stranger)


def test_an_export_does_not_follow_links_out(shop: Workshop, tmp_path: Path) -> None:
    """Row 105."""
    layer = shop.store.register(stream(BASE))
    (tmp_path / "secret").write_text("base")
    file = shop.own_files(layer.cache_id) / "etc" / "conf"
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(LayerDamagedError, match='checksum failed for "etc/conf"'):
        layer.verify()


def test_a_missing_record(vfs_shop: Workshop) -> None:
    layer = vfs_shop.store.register(stream(BASE))
    (vfs_shop.record(layer) / "tar-split.json.gz").unlink()
    with pytest.raises(LayerDamagedError, match=r"tar-split.json.gz: is missing, so layer .* cannot be exported"):
        layer.tar_stream()
    assert [problem.kind for problem in fsck(vfs_shop.store)] == ["record"]


# On disk


def test_layout(vfs_shop: Workshop) -> None:
    """Row 106: the bytes that Docker writes."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    rw = store.create_rw_layer("some-name", top.chain_id, init=write("x", "y"))
    found = {
        str(path.relative_to(vfs_shop.layerdb)): path.read_bytes()
        for path in vfs_shop.layerdb.rglob("*")
        if path.is_file() and path.suffix != ".gz"
    }
    found.pop("lock")
    digits = (base.chain_id[7:], top.chain_id[7:])
    assert found == {
        f"sha256/{digits[0]}/diff": diff_id_of(BASE).encode(),
        f"sha256/{digits[0]}/size": b"5",
        f"sha256/{digits[0]}/cache-id": base.cache_id.encode(),
        f"sha256/{digits[1]}/diff": diff_id_of(TOP).encode(),
        f"sha256/{digits[1]}/size": b"3",
        f"sha256/{digits[1]}/cache-id": top.cache_id.encode(),
        f"sha256/{digits[1]}/parent": base.chain_id.encode(),
        "mounts/some-name/mount-id": rw.mount_id.encode(),
        "mounts/some-name/init-id": rw.mount_id.encode() + b"-init",
        "mounts/some-name/parent": top.chain_id.encode(),
    }
    modes = {
        name: (vfs_shop.layerdb / name).stat().st_mode & 0o7777
        for name in ("", "tmp", "sha256", f"sha256/{digits[0]}", f"sha256/{digits[0]}/diff", "mounts")
    }
    assert modes == {
        "": 0o700,
        "tmp": 0o755,
        "sha256": 0o755,
        f"sha256/{digits[0]}": 0o700,
        f"sha256/{digits[0]}/diff": 0o644,
        "mounts": 0o755,
    }
    records = gzip.decompress((vfs_shop.record(base) / "tar-split.json.gz").read_bytes())
    assert records.startswith(b'{"type":2,"payload":"')


def test_the_trees_are_synced_before_the_commit(vfs_shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 107 and 109: the order of what makes a layer, and a read-write layer, last."""
    steps: list[str] = []
    base = vfs_shop.store.register(stream(BASE))

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            what = os.path.basename(str(arguments[-1] if name == "move" else arguments[0]))
            steps.append(f"{name} {what[:9]}")
            return call(*arguments)

        return noted

    driver = vfs_shop.store.driver
    monkeypatch.setattr(vfs_shop.store, "_sync", note("payload", vfs_shop.store._sync))
    monkeypatch.setattr(driver, "create", note("create", driver.create))
    monkeypatch.setattr(driver, "create_read_write", note("create", driver.create_read_write))
    for name in ("write_file", "sync_dir", "move"):
        monkeypatch.setattr(disk, name, note(name, getattr(disk, name)))
    top = vfs_shop.store.register(stream(TOP), base.chain_id)
    tree, digits = top.cache_id[:9], top.chain_id[7:16]
    assert steps == [
        "sync_dir tmp",
        "write_file cache-id",
        "sync_dir write-set",
        f"create {tree}",
        f"payload {tree}",
        "write_file diff",
        "write_file size",
        "write_file parent",
        "sync_dir write-set",
        f"move {digits}",
        "sync_dir sha256",
        "sync_dir tmp",
    ]
    steps.clear()
    rw = vfs_shop.store.create_rw_layer("c", top.chain_id)
    tree = rw.mount_id[:9]
    assert [step for step in steps if not step.endswith(str(vfs_shop.layerdb.name))] == [
        "sync_dir tmp",
        "write_file mount-id",
        "write_file parent",
        "sync_dir mount-set",
        f"create {tree}",
        "payload ",
        "sync_dir mount-set",
        "move c",
        "sync_dir mounts",
        "sync_dir tmp",
    ]


@pytest.mark.parametrize("damage", ["empty directory", "diff", "size", "cache-id", "parent", "other"])
def test_a_damaged_layer_is_named_and_makes_way(vfs_shop: Workshop, damage: str) -> None:
    """Rows 108 and 110; moby#23184, #44909."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    other = store.register(stream(TOP))
    where = vfs_shop.record(top)
    if damage == "empty directory":
        for path in where.iterdir():
            path.unlink()
        named = where / "diff"
    elif damage == "other":
        (where / "parent").unlink()
        named = where
    else:
        named = where / damage
        named.write_bytes(b"" if damage != "diff" else b"sha256:zzz")
    store = vfs_shop.reopen()
    (unreadable,) = store.unreadable
    assert (unreadable.kind, unreadable.name, unreadable.path) == ("layer", top.chain_id, str(named))
    assert unreadable.reason.startswith(f"{named}: ")
    assert store.map().keys() == {base.chain_id, other.chain_id}
    again = store.register(stream(TOP), base.chain_id)
    assert again.chain_id == top.chain_id
    assert store.unreadable == []
    store = vfs_shop.reopen()
    assert store.map()[top.chain_id].verify() == len(TOP)
    assert [problem for problem in fsck(store, deep=True, repair=True) if not problem.repaired] == []
    vfs_shop.assert_nothing_leaked()


def test_a_layer_on_a_damaged_one_comes_back_with_it(vfs_shop: Workshop) -> None:
    base = vfs_shop.store.register(stream(BASE))
    top = vfs_shop.store.register(stream(TOP), base.chain_id)
    vfs_shop.store.create_rw_layer("c", top.chain_id)
    (vfs_shop.record(base) / "size").write_text("many")
    store = vfs_shop.reopen()
    assert {(one.kind, one.name) for one in store.unreadable} == {
        ("layer", base.chain_id),
        ("layer", top.chain_id),
        ("mount", "c"),
    }
    assert [problem for problem in fsck(store, repair=True) if problem.repaired] == []
    store.register(stream(BASE))
    store = vfs_shop.reopen()
    assert store.unreadable == []
    assert store.map()[top.chain_id].verify() == len(TOP)
    assert list(store.rw_layers()) == ["c"]


def test_a_damaged_mount(vfs_shop: Workshop) -> None:
    vfs_shop.store.create_rw_layer("c")
    (vfs_shop.layerdb / "mounts" / "c" / "mount-id").write_text("")
    store = vfs_shop.reopen()
    (unreadable,) = store.unreadable
    assert unreadable.path.endswith("mounts/c/mount-id")
    kinds = [(problem.kind, problem.repaired) for problem in fsck(store, repair=True)]
    assert kinds == [("mount", False), ("tree", False)], "the tree may be the container's"
    store.create_rw_layer("c")
    assert list(vfs_shop.reopen().rw_layers()) == ["c"]


def test_space_around_values(vfs_shop: Workshop) -> None:
    """Row 111."""
    layer = vfs_shop.store.register(stream(BASE))
    for name in ("size", "diff", "cache-id"):
        path = vfs_shop.record(layer) / name
        path.write_text(f" {path.read_text()}\n")
    store = vfs_shop.reopen()
    assert store.unreadable == []
    assert store.map()[layer.chain_id].diff_size == 5


def test_counts_after_a_start(vfs_shop: Workshop) -> None:
    """Rows 112 and 116."""
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    store.create_rw_layer("one", base.chain_id)
    store.create_rw_layer("two", base.chain_id)
    assert store.reference_count(base.chain_id) == 4
    store = vfs_shop.reopen()
    assert store.reference_count(base.chain_id) == 3
    assert store.reference_count(top.chain_id) == 0
    assert [one.name for one in collect(store, layers=True, dry_run=True)] == [top.chain_id]
    assert len(store.map()) == 2


@pytest.mark.parametrize("on_demand", [False, True])
def test_what_was_being_removed_goes(vfs_shop: Workshop, on_demand: bool) -> None:
    """Rows 113 and 114."""
    layer = vfs_shop.store.register(stream(BASE))
    other = vfs_shop.store.register(stream(TOP))
    rw = vfs_shop.store.create_rw_layer("c")
    vfs_shop.store.close()
    vfs_shop.record(layer).rename(f"{vfs_shop.record(layer)}-{'a' * 64}-removing")
    (vfs_shop.layerdb / "mounts" / "c").rename(vfs_shop.layerdb / "tmp" / "mount-removing-abc")
    write_set = vfs_shop.layerdb / "tmp" / "write-set-abc"
    write_set.mkdir()
    (write_set / "cache-id").write_text("f" * 64)
    (vfs_shop.layerdb / "tmp" / "write-set-empty").mkdir()
    # A removal whose tree is in use again is none.
    claimed = vfs_shop.layerdb / "tmp" / "write-set-claimed"
    claimed.mkdir()
    (claimed / "cache-id").write_text(other.cache_id)
    store = vfs_shop.reopen(recover=not on_demand)
    if on_demand:
        assert {layer.cache_id, rw.mount_id} <= vfs_shop.trees()
        assert len([problem for problem in fsck(store) if problem.kind == "leftover"]) == 5
        assert len(collect(store)) == 5
    assert vfs_shop.trees() == {other.cache_id}
    vfs_shop.assert_nothing_leaked()
    assert fsck(store, deep=True) == []


def test_cleaning_up_leaves_what_is_under_way(vfs_shop: Workshop) -> None:
    store = vfs_shop.store
    real, write_end = os.pipe()
    done: list[Layer] = []

    def register() -> None:
        with open(real, "rb") as file:
            done.append(store.register(file))

    thread = threading.Thread(target=register)
    thread.start()
    with open(write_end, "wb") as file:
        file.write(BASE[:1024])
        file.flush()
        while not vfs_shop.trees():
            pass
        store.cleanup()
        assert collect(store, dry_run=True) == []
        # Row 118: nobody waits for it either.
        store.register(stream(TOP))
        file.write(BASE[1024:])
    thread.join()
    assert done[0].verify() == len(BASE)
    vfs_shop.assert_nothing_leaked()


def test_orphans(vfs_shop: Workshop) -> None:
    """Row 115."""
    vfs_shop.store.register(stream(BASE))
    tree = vfs_shop.own_files("0" * 64)
    tree.mkdir()
    (tree / "data").write_bytes(bytes(100_000))
    (found,) = collect(vfs_shop.store, dry_run=True)
    assert (found.kind, found.name) == ("tree", "0" * 64)
    assert found.size >= 100_000
    assert [problem.kind for problem in fsck(vfs_shop.store)] == ["tree"]
    assert [problem.repaired for problem in fsck(vfs_shop.store, repair=True)] == [True]
    vfs_shop.assert_nothing_leaked()


def test_one_process_at_a_time(vfs_shop: Workshop) -> None:
    """Row 117."""
    with pytest.raises(StoreLockedError, match="is in use by this process"):
        open_store(vfs_shop.root, "vfs")
    program = "import sys; from unionfs.layers.opening import open_store; open_store(sys.argv[1], 'vfs')"
    command = [sys.executable, "-c", program, str(vfs_shop.root)]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()}; close it there" in done.stderr
    vfs_shop.store.close()
    subprocess.run(command, check=True)
    vfs_shop.reopen()


def test_forwarders(shop: Workshop) -> None:
    """Row 119."""
    assert shop.store.driver_name == shop.driver
    assert dict(shop.store.driver_status())["Backing Filesystem"]


def test_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_ROOT", str(tmp_path / "chosen"))
    assert default_root() == str(tmp_path / "chosen")
    with open_store(driver="vfs") as store:
        store.register(stream(BASE))
    with open_store() as store:
        assert store.driver_name == "vfs", "the one used before"
        assert store.map().keys() == {create_chain_id([diff_id_of(BASE)])}
    monkeypatch.delenv("UNIONFS_ROOT")
    assert default_root() == "/var/lib/unionfs"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_root() == "/data/unionfs"


def test_a_look_with_another_driver_decides_nothing(tmp_path: Path) -> None:
    for name in ("vfs", "overlay2"):
        open_store(tmp_path, name).close()
    with open_store(tmp_path) as store:
        assert store.driver_name == "overlay2", "of two that hold nothing the better one"
    with open_store(tmp_path, "vfs") as store:
        layer = store.register(stream(BASE))
    with open_store(tmp_path) as store:
        assert store.driver_name == "vfs"
        assert layer.chain_id in store.map()
    with open_store(tmp_path, "overlay2") as store:
        store.create_rw_layer("c")
    with pytest.raises(DriverError, match=r"several valid graphdrivers: overlay2, vfs; name one of them \(--driver\)"):
        open_store(tmp_path)


# Many at once


def test_many_threads(shop: Workshop) -> None:
    """16 threads register, get, release, create, mount and remove; the counts are right at the end."""
    hammer(shop.store, turns=4)


def test_many_processes_of_many_threads(driver: str, tmp_path: Path) -> None:
    """Issue 4, point 5: of 4 processes at the same moment one has the store, and the others are told which."""
    root = tmp_path / "root"
    command = [sys.executable, "-m", "tests.layers.hammer", str(root), driver]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
            for _ in range(4)
        ]
        for process in processes:
            stack.callback(process.kill)

        def answers(line: str) -> list[str]:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            return said()

        def said() -> list[str]:
            return [process.stdout.readline().strip() for process in processes if process.stdout is not None]

        assert said() == ["ready"] * 4
        first = answers("open it\n")
        assert sorted(line.partition(" ")[0] for line in first) == ["open", *["refused"] * 3], first
        owner = processes[first.index("open")].pid
        for line in first:
            assert line == "open" or f"is in use by process {owner}; close it there" in line
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("hammer\n")
            process.stdin.flush()
        for process, line in zip(processes, first, strict=True):
            assert process.stdout is not None
            rest = process.stdout.read().split("\n")
            assert rest == [*(["open"] if line != "open" else []), "done", ""], rest
            assert process.wait() == 0
    shop = Workshop(root, driver)
    assert shop.store.map() == {}
    shop.assert_nothing_leaked()
    assert fsck(shop.store, deep=True) == []
    shop.store.close()


def test_the_same_layer_from_many_threads(vfs_shop: Workshop) -> None:
    store = vfs_shop.store
    handles: list[Layer] = []

    def work() -> None:
        handles.append(store.register(stream(BASE)))
        handles.append(store.register(stream(BASE), expected_diff_id=diff_id_of(BASE)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(handle) for handle in handles}) == 16
    assert {handle.cache_id for handle in handles} == vfs_shop.trees()
    assert store.reference_count(handles[0].chain_id) == 16
    vfs_shop.assert_nothing_leaked()


def test_a_dead_file_system_server(tmp_path: Path) -> None:
    """fsck finds a mount that nobody serves any more, and takes it away."""
    with open_store(tmp_path / "root", "unionfs") as store:
        base = store.register(stream(BASE))
        rw = store.create_rw_layer("c", base.chain_id)
        path = rw.mount()
        top = mountinfo.top_mount(path)
        assert top is not None
        server = mount_registry.find(top.minor)
        assert server is not None
        assert fsck(store) == []
        end = os.pidfd_open(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        assert select.select([end], [], [], 10)[0]
        os.close(end)
        (problem,) = fsck(store)
        assert (problem.kind, problem.name, problem.advice) == ("dead-mount", path, f"umount -l {path}")
        assert [found.repaired for found in fsck(store, repair=True)] == [True]
        assert mountinfo.top_mount(path) is None
        assert fsck(store) == []
        store.cleanup()
    with open_store(tmp_path / "root") as store, store.get_rw_layer("c").mounted() as again:
        assert Path(again, "gone").read_text() == "1"
