"""The records on disk: Docker's bytes, in an order that outlives a crash. Contract rows 106, 107, 109."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.layers.conftest import Workshop, write
from tests.layers.samples import BASE, TOP, stream
from unionfs.host import disk
from unionfs.layers.identity import diff_id_of


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
            before = len(steps)
            result = call(*arguments)
            if name == "create":
                del steps[before:]  # what a driver does is its own affair
            return result

        return noted

    driver = vfs_shop.store.driver
    keeper = vfs_shop.store._keeper
    monkeypatch.setattr(keeper, "sync", note("payload", keeper.sync))
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
