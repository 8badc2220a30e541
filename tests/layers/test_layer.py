"""The streams of a layer: contract rows 101 to 105, and a missing record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.layers.archives import archive, member, symlink
from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, TOP, stream
from unionfs.errors import LayerDamagedError, LayerStoreError
from unionfs.layers.fsck import fsck


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


def test_contents_that_are_replaced_through_a_link_of_a_layer_below_come_back(shop: Workshop) -> None:
    """Of two entries for one file, only the last is in the tree; the stream does not say that they are one."""
    below = shop.store.register(stream(archive([member("usr/lib/old", "old"), symlink("lib", "usr/lib")])), "")
    tar = archive([member("lib/a", "first"), member("usr/lib/a", "second"), member("lib/b", "alone")])
    layer = shop.store.register(stream(tar), below.chain_id)
    assert layer.verify() == len(tar)
    with layer.tar_stream() as exported:
        assert exported.read() == tar
    shop.store.release(layer)
    shop.store.release(below)
