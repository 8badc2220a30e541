"""What a start finds, damaged or not: contract rows 108 to 112 and 116."""

from __future__ import annotations

import pytest

from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, TOP, stream
from unionfs.errors import LayerStoreError, MountDoesNotExistError, MountNameConflictError
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
    """Nobody can tell which tree is the container's, so none is removed, until somebody says to."""
    rw = vfs_shop.store.create_rw_layer("c")
    (vfs_shop.layerdb / "mounts" / "c" / "mount-id").write_text("")
    store = vfs_shop.reopen()
    (unreadable,) = store.unreadable
    assert unreadable.path.endswith("mounts/c/mount-id")
    assert unreadable.reason.endswith("is empty; run unionfs fsck")
    kinds = [(problem.kind, problem.repaired) for problem in fsck(store, repair=True)]
    assert kinds == [("container", False), ("tree", False)]
    (kept,) = collect(store)
    assert kept.problem == "it may be that of container c, which cannot be read; run unionfs fsck"
    with pytest.raises(MountNameConflictError, match="container rm --force c"):
        store.create_rw_layer("c")
    with pytest.raises(MountDoesNotExistError):
        store.remove_unreadable_rw_layer("d")
    assert store.remove_unreadable_rw_layer("c") is False
    assert [(one.name, one.problem) for one in collect(store)] == [(rw.mount_id, "")]
    store.create_rw_layer("c")
    assert list(vfs_shop.reopen().rw_layers()) == ["c"]
    vfs_shop.assert_nothing_leaked()


def test_a_damaged_mount_goes_with_the_trees_it_names(vfs_shop: Workshop) -> None:
    rw = vfs_shop.store.create_rw_layer("c", init=lambda path: None)
    (vfs_shop.layerdb / "mounts" / "c" / "mount-id").write_text("")
    store = vfs_shop.reopen()
    assert [problem.kind for problem in fsck(store, repair=True)] == ["container"], (
        "the init layer's id tells the other"
    )
    assert rw.mount_id in vfs_shop.trees()
    assert store.remove_unreadable_rw_layer("c") is True
    vfs_shop.assert_nothing_leaked()
    assert vfs_shop.trees() == set()


def test_a_damaged_mount_is_adopted_again(vfs_shop: Workshop) -> None:
    """That puts it right; another tree of that name would leave its own to be removed."""
    rw = vfs_shop.store.create_rw_layer("c")
    other = vfs_shop.store.create_rw_layer("other")
    (vfs_shop.layerdb / "mounts" / "c" / "parent").write_text("sha256:" + "9" * 64)
    (vfs_shop.layerdb / "mounts" / "other" / "parent").write_text("?")
    store = vfs_shop.reopen()
    with pytest.raises(MountNameConflictError, match=f"c already, of the tree {rw.mount_id}"):
        store.adopt_rw_layer("c", other.mount_id)
    with pytest.raises(LayerStoreError, match="belongs to a layer already"):
        store.adopt_rw_layer("third", rw.mount_id)
    with pytest.raises(LayerStoreError, match="belongs to a layer already"):
        store.adopt(rw.mount_id)
    assert store.adopt_rw_layer("c", rw.mount_id).mount_id == rw.mount_id
    assert [one.name for one in vfs_shop.reopen().unreadable] == ["other"]
    assert {rw.mount_id, other.mount_id} == vfs_shop.trees()


def test_two_records_of_one_tree(vfs_shop: Workshop) -> None:
    """One of them means another tree, which must not go, and neither may take the tree of the other with it."""
    one = vfs_shop.store.create_rw_layer("one")
    two = vfs_shop.store.create_rw_layer("two")
    layer = vfs_shop.store.register(stream(BASE))
    (vfs_shop.layerdb / "mounts" / "two" / "mount-id").write_text(one.mount_id)
    store = vfs_shop.reopen()
    assert {(bad.name, bad.shared) for bad in store.unreadable} == {("one", True), ("two", True)}
    assert [problem.repaired for problem in fsck(store, repair=True)] == [False] * 3
    assert collect(store, layers=True)[0].problem
    assert {one.mount_id, two.mount_id, layer.cache_id} == vfs_shop.trees()
    store.remove_unreadable_rw_layer("two")
    assert {one.mount_id, two.mount_id, layer.cache_id} == vfs_shop.trees()
    assert list(vfs_shop.reopen().rw_layers()) == ["one"]


def test_a_renamed_record_keeps_its_tree(vfs_shop: Workshop) -> None:
    """As somebody does who wants to try without it."""
    base = vfs_shop.store.register(stream(BASE))
    top = vfs_shop.store.register(stream(TOP), base.chain_id)
    where = vfs_shop.record(top)
    aside = where.with_name("aside")
    where.rename(aside)
    store = vfs_shop.reopen()
    assert [(bad.kind, bad.name) for bad in store.unreadable] == [("stray", "aside")]
    assert [(problem.kind, problem.repaired) for problem in fsck(store, repair=True)] == [("stray", False)]
    assert [found.name for found in collect(store, layers=True) if not found.problem] == []
    aside.rename(where)
    assert vfs_shop.reopen().map()[top.chain_id].verify() == len(TOP)


def test_a_driver_without_its_file_system(vfs_shop: Workshop) -> None:
    """All trees are gone at once: that is a disk that is not mounted, and no reason to forget what is on it."""
    layer = vfs_shop.store.register(stream(BASE))
    vfs_shop.store.create_rw_layer("c")
    trees = vfs_shop.root / "vfs" / "dir"
    away = trees.with_name("away")
    trees.rename(away)
    store = vfs_shop.reopen()
    assert {(problem.kind, problem.repaired) for problem in fsck(store, repair=True)} == {
        ("layer", False),
        ("container", False),
    }
    assert collect(store, layers=True) == []
    trees.rmdir()
    away.rename(trees)
    store = vfs_shop.reopen()
    assert list(store.rw_layers()) == ["c"]
    assert list(store.map()) == [layer.chain_id]


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
