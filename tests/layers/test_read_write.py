"""Read-write layers come and go: contract rows 96 to 99."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.layers.conftest import Workshop, write
from tests.layers.failures import failing
from tests.layers.samples import BASE, stream
from unionfs.errors import (
    ActiveMountError,
    DriverError,
    LayerBusyError,
    LayerNotRetainedError,
    LayerStoreError,
    MountDoesNotExistError,
    NotMountedError,
)


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
    with pytest.raises(MountDoesNotExistError, match="there is no container"):
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
    with pytest.raises(NotMountedError, match="container c is not mounted; mount it first"):
        rw.unmount()
    path = rw.mount()
    assert rw.is_mounted()
    with pytest.raises(ActiveMountError, match="container c is mounted"):
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
