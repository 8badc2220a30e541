"""What belongs to nobody, and a mount that nobody serves, are found and taken away."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, stream
from unionfs.fuse_ops.session import mount_registry
from unionfs.host import mountinfo
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import collect
from unionfs.layers.opening import open_store


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
