"""Handles on read-only layers, and their counts: contract rows 89 to 93."""

from __future__ import annotations

import pytest

from tests.layers.conftest import Workshop
from tests.layers.failures import failing
from tests.layers.samples import BASE, TOP, stream
from unionfs.errors import ArchiveError, LayerBusyError, LayerDoesNotExistError, LayerNotRetainedError, LayerStoreError
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
