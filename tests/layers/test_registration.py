"""Layers come in: any stream, nothing of one that fails, and each only once. Contract rows 84 to 88."""

from __future__ import annotations

import errno
import gzip
import io
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.layers.archives import archive, member
from tests.layers.conftest import Workshop
from tests.layers.failures import failing
from tests.layers.samples import BASE, TOP, stream
from unionfs.errors import ArchiveError, DigestMismatchError, DriverError, MaxDepthExceededError
from unionfs.layers.identity import diff_id_of
from unionfs.layers.layer import Layer
from unionfs.layers.metadata import Descriptor


class Pipe:
    """A stream that cannot be rewound, and gives little at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._data.read(min(size, 700))


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


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_layer_of_no_bytes(shop: Workshop, pack: Callable[[bytes], bytes]) -> None:
    base = shop.store.register(stream(BASE))
    layer = shop.store.register(stream(pack(b"")), base.chain_id)
    assert (layer.diff_id, layer.diff_size) == (diff_id_of(b""), 0)
    assert layer.verify() == 0
    shop.reopen()
    with shop.store.get(layer.chain_id) as again, again.tar_stream() as out:
        assert out.read() == b""


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
    monkeypatch.setattr(store._keeper, "sync", lambda *_: None)  # 125 times would take long
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
