"""What is half done is finished, what is under way is left alone: contract rows 86, 113, 114 and 118."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layers.conftest import Workshop, write
from tests.layers.samples import BASE, OTHER, TOP, stream
from unionfs.errors import DriverError
from unionfs.host import disk
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import Garbage, collect
from unionfs.layers.identity import create_chain_id, diff_id_of
from unionfs.layers.layer import Layer


class FullDisk:
    """Fails one change to the disk of the store or its driver, by its number from 1.

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
            except (OSError, DriverError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                assert isinstance(cause, OSError)
                assert cause.errno == errno.ENOSPC
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


def test_a_container_that_is_made_or_removed_is_under_way_with_its_init_layer(
    vfs_shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = vfs_shop.store
    seen: list[list[Garbage]] = []
    container = store.create_rw_layer("new", init=lambda path: seen.append(collect(store, dry_run=True)))
    real_remove = store.driver.remove

    def remove(tree: str) -> None:
        seen.append(collect(store, dry_run=True))
        real_remove(tree)

    monkeypatch.setattr(store.driver, "remove", remove)
    container.release()
    assert seen == [[], [], []]  # made, and two trees removed
    vfs_shop.assert_nothing_leaked()


def test_what_cannot_be_read_makes_way_for_two_at_once(vfs_shop: Workshop) -> None:
    """Two layers that are registered again at the same time: neither brings the other's damage back on the list."""
    chains = {tar: vfs_shop.store.register(stream(tar)) for tar in (BASE, OTHER)}
    for layer in chains.values():
        (vfs_shop.record(layer) / "size").write_text("many")
    store = vfs_shop.reopen()
    assert len(store.unreadable) == 2
    threads = [threading.Thread(target=store.register, args=(stream(tar),)) for tar in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.unreadable == []
