"""What a start finds, damaged or not: contract rows 108 to 112 and 116."""

from __future__ import annotations

import pytest

from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, TOP, stream
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import collect


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
