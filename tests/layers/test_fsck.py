"""What belongs to nobody, and a mount that nobody serves, are found and taken away."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from tests.layers.archives import archive, member
from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, TOP, stream
from unionfs.errors import MountDoesNotExistError
from unionfs.fuse_ops.session import mount_registry
from unionfs.host import mounts
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
        top = mounts.top_mount(path)
        assert top is not None
        server = mount_registry.find(top)
        assert server is not None
        assert fsck(store) == []
        end = os.pidfd_open(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        assert select.select([end], [], [], 10)[0]
        os.close(end)
        (problem,) = fsck(store)
        assert (problem.kind, problem.name, problem.advice) == ("dead-mount", path, f"unionfs umount --lazy {path}")
        assert [found.repaired for found in fsck(store, repair=True)] == [True]
        assert mounts.top_mount(path) is None
        assert fsck(store) == []
        store.cleanup()
    with open_store(tmp_path / "root") as store, store.get_rw_layer("c").mounted() as again:
        assert Path(again, "gone").read_text() == "1"


def test_each_cause_is_said_once(vfs_shop: Workshop) -> None:
    """A layer that cannot be read takes all down that stands on it: these name it, and do not repeat why."""
    below = vfs_shop.store.register(stream(BASE))
    middle = vfs_shop.store.register(stream(TOP), below.chain_id)
    top = vfs_shop.store.register(stream(BASE), middle.chain_id)
    vfs_shop.store.create_rw_layer("box", top.chain_id)
    path = Path(vfs_shop.store.records.tar_split_path(below.chain_id)).with_name("size")
    path.write_text("many")
    vfs_shop.reopen()
    found = {problem.name: problem for problem in fsck(vfs_shop.store)}
    assert set(found) == {below.chain_id, middle.chain_id, top.chain_id, "box"}
    assert found[below.chain_id].what == f"{path}: 'many' is no number"
    assert found[below.chain_id].advice == "pull the image again that has it, or register the layer again"
    for name in (middle.chain_id, top.chain_id, "box"):
        assert found[name].what == f"stands on layer {below.chain_id[7:19]}, which cannot be read"
        assert found[name].advice.startswith("comes back with it")
    assert found["box"].kind == "container"
    assert found["box"].advice == "comes back with it; its files stay until then"
    with pytest.raises(MountDoesNotExistError, match=f"container box cannot be read: {path}: 'many' is no number; run"):
        vfs_shop.store.get_rw_layer("box")
    assert not any(problem.repairable for problem in found.values())


def test_all_damaged_files_are_named(vfs_shop: Workshop) -> None:
    names = [f"file{number}" for number in range(4)]
    layer = vfs_shop.store.register(stream(archive([member(name, f"of {name}") for name in names])))
    tree = vfs_shop.own_files(layer.cache_id)
    (tree / names[0]).write_text("OF file0")
    (tree / names[2]).unlink()
    (tree / names[3]).write_text("of file3 and more")
    found = fsck(vfs_shop.store, deep=True)
    assert [problem.kind for problem in found] == ["damage"] * 3
    for name, problem in zip((names[0], names[2], names[3]), found, strict=True):
        assert f'"{name}"' in problem.what
    assert fsck(vfs_shop.store, deep=False) == []
    (tree / names[1]).write_text("of file1")
    for number in (0, 2, 3):
        (tree / names[number]).write_text(f"of {names[number]}")
    assert layer.damages() == []
