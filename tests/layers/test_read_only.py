"""Handles on read-only layers, and their counts: contract rows 89 to 93."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.layers.conftest import Workshop
from tests.layers.failures import failing
from tests.layers.samples import BASE, OTHER, TOP, stream
from unionfs.errors import (
    ArchiveError,
    DriverError,
    LayerBusyError,
    LayerDoesNotExistError,
    LayerNotRetainedError,
    LayerStoreError,
)
from unionfs.layers import collect
from unionfs.layers.identity import diff_id_of


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


class SlowRemoval:
    """Removing a tree takes until :attr:`go_on` is set, and then fails if :attr:`fault` says so."""

    def __init__(self, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.fault: Exception | None = None
        real = shop.store.driver.remove

        def remove(tree: str) -> None:
            self.begun.set()
            assert self.go_on.wait(60)
            if self.fault is not None:
                raise self.fault
            real(tree)

        monkeypatch.setattr(shop.store.driver, "remove", remove)


@pytest.mark.parametrize("outcome", ["removed", "failed", "failed after it came again"])
def test_the_removal_of_a_large_layer_holds_nobody_up(
    vfs_shop: Workshop, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    store = vfs_shop.store
    base = store.register(stream(BASE))
    top = store.register(stream(TOP), base.chain_id)
    slow = SlowRemoval(vfs_shop, monkeypatch)
    if outcome != "removed":
        slow.fault = DriverError("the disk failed")
    with ThreadPoolExecutor() as threads:
        removal = threads.submit(top.release)
        assert slow.begun.wait(60)
        try:
            # All of this waits for the removal if that holds a lock; so it is asked on a thread of its own.
            other = threads.submit(store.register, stream(OTHER)).result(30)
            assert store.map().keys() == {base.chain_id, other.chain_id}
            with pytest.raises(LayerDoesNotExistError):
                store.get(top.chain_id)
            assert collect(store, layers=True, dry_run=True) == []
            assert store.incomplete() == []
            again = store.register(stream(TOP), base.chain_id) if "again" in outcome else None
        finally:
            slow.go_on.set()
        if outcome == "failed":
            with pytest.raises(DriverError, match="the disk failed"):
                removal.result(30)
            slow.fault = None
            assert store.get(top.chain_id).release() == []
            assert [gone.chain_id for gone in top.release()] == [top.chain_id], "the handle is good again"
        else:
            assert [gone.chain_id for gone in removal.result(30)] == [top.chain_id]
    slow.fault = None
    if again is not None:
        assert again.verify() == len(TOP)
        assert len(store.incomplete()) == 1
        store.recover()
        again.release()
    assert store.reference_count(base.chain_id) == 1
    base.release()
    other.release()
    vfs_shop.assert_nothing_leaked()
    assert vfs_shop.trees() == set()
