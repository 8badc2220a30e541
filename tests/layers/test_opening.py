"""Which store is opened, and by whom: contract row 117."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, TOP, stream
from unionfs.drivers import vfs
from unionfs.drivers.registry import Registry
from unionfs.errors import DriverError, LayerStoreError, NotSupportedError, StoreLockedError, StoreNotFoundError
from unionfs.host.locks import wait_until_free
from unionfs.layers.file_metadata import FileMetadataStore
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import collect
from unionfs.layers.identity import create_chain_id, diff_id_of
from unionfs.layers.opening import default_root, open_store


def test_one_process_at_a_time(vfs_shop: Workshop) -> None:
    """Row 117."""
    with pytest.raises(StoreLockedError, match="is in use by this process"):
        open_store(vfs_shop.root, "vfs")
    program = "import sys; from unionfs.layers.opening import open_store; open_store(sys.argv[1], 'vfs')"
    command = [sys.executable, "-c", program, str(vfs_shop.root)]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()}; close it there" in done.stderr
    vfs_shop.store.close()
    subprocess.run(command, check=True)
    vfs_shop.reopen()


RECORD = "tar-split.json.gz"

IN_ANOTHER_PROCESS = """
import sys
from unionfs.layers import open_store
with open_store(sys.argv[1]) as store:
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def opened_elsewhere(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process has the store open until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"open\n"
        try:
            yield other
        finally:
            other.stdin.close()


def test_who_waits_gets_it_when_it_is_free(vfs_shop: Workshop) -> None:
    vfs_shop.store.close()
    waited: list[str] = []

    def wait(error: StoreLockedError) -> None:
        waited.append(str(error))
        assert not wait_until_free(error.lock, 0.01)
        assert other.stdin is not None
        other.stdin.close()
        assert wait_until_free(error.lock)

    with opened_elsewhere(vfs_shop.root) as other:
        vfs_shop.store = open_store(vfs_shop.root, wait=wait)
    (said,) = waited
    assert f"is in use by process {other.pid}" in said


def test_who_has_it_does_not_wait_for_itself(vfs_shop: Workshop) -> None:
    with pytest.raises(StoreLockedError, match="is in use by this process"):
        open_store(vfs_shop.root, wait=lambda error: pytest.fail("it waits"))


def contents_of(root: Path) -> dict[str, int]:
    """Everything below a directory, with the time of its last change; not what the other process writes just now."""
    return {str(path): path.lstat().st_ctime_ns for path in (root, *root.rglob("*")) if path.name != RECORD}


def test_a_look_takes_no_lock_and_changes_nothing(shop: Workshop) -> None:
    """Beside the process that has it open, also while that is in the middle of something."""
    base = shop.store.register(stream(BASE))
    rw = shop.store.create_rw_layer("c", base.chain_id, init=lambda path: None)
    real, write_end = os.pipe()
    thread = threading.Thread(target=lambda: shop.store.register(os.fdopen(real, "rb"), base.chain_id).release())
    thread.start()
    with open(write_end, "wb") as file:
        file.write(TOP[:100])
        file.flush()
        while not list(shop.layerdb.glob(f"tmp/*/{RECORD}")):
            pass  # by now its tree is there too
        (shop.layerdb / "tmp" / "write-set-crashed").mkdir()
        if shop.driver != "vfs":
            (shop.root / shop.driver / "a-creating").mkdir()  # of the other process, as far as anybody knows
        before = contents_of(shop.root)
        with open_store(shop.root, read_only=True) as look:
            assert look.driver_name == shop.driver
            assert list(look.map()) == [base.chain_id]
            assert look.map()[base.chain_id].verify() == len(BASE)
            assert list(look.rw_layers()) == ["c"]
            box = look.get_rw_layer("c")
            assert box.changes() == []
            assert not box.is_mounted()
            assert look.unreadable == []
            assert len(look.recover()) == 2, "told, and left alone"
            for change in (
                lambda: look.register(stream(TOP)),
                lambda: look.create_rw_layer("d"),
                box.release,
                box.mount,
                lambda: look.adopt_rw_layer("d", rw.mount_id),
                lambda: look.adopt(rw.mount_id),
                lambda: look.remove_unreadable_rw_layer("c"),
                look.cleanup,
                lambda: fsck(look, repair=True),
                lambda: collect(look),
            ):
                with pytest.raises(LayerStoreError, match="opened to be read only"):
                    change()
            assert fsck(look, repair=False) != []
            with look.get(base.chain_id) as handle:
                assert handle.size == base.size
        assert contents_of(shop.root) == before
        file.write(TOP[100:])
    thread.join()
    (shop.layerdb / "tmp" / "write-set-crashed").rmdir()
    if shop.driver != "vfs":
        (shop.root / shop.driver / "a-creating").rmdir()
    base.release()


def test_what_goes_during_a_look_is_not_called_damaged(
    vfs_shop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = vfs_shop.store.register(stream(BASE))
    rw = vfs_shop.store.create_rw_layer("c", base.chain_id)
    real = FileMetadataStore.list_mounts

    def list_then_remove(self: FileMetadataStore) -> list[str]:
        found = real(self)
        if "c" in vfs_shop.store.rw_layers():
            rw.release()
            base.release()
        return found

    monkeypatch.setattr(FileMetadataStore, "list_mounts", list_then_remove)
    with open_store(vfs_shop.root, read_only=True) as look:
        assert look.unreadable == []
    assert caplog.messages == []


def test_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="there is no layer store at"):
        open_store(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with open_store(tmp_path / "root", "vfs"), pytest.raises(StoreNotFoundError):
        open_store(tmp_path / "root", "overlay2", read_only=True)


def test_a_driver_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """One of another package, which knows nothing of looks, would clean up in its home."""
    registry = Registry()
    registry.register("vfs", vfs.init)
    with open_store(tmp_path, "vfs", registry=registry) as store:
        store.register(stream(BASE))
    with pytest.raises(NotSupportedError, match="driver vfs cannot only be looked at"):
        open_store(tmp_path, "vfs", registry=registry, read_only=True)


def test_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_ROOT", str(tmp_path / "chosen"))
    assert default_root() == str(tmp_path / "chosen")
    with open_store(driver="vfs") as store:
        store.register(stream(BASE))
    with open_store() as store:
        assert store.driver_name == "vfs", "the one used before"
        assert store.map().keys() == {create_chain_id([diff_id_of(BASE)])}
    monkeypatch.delenv("UNIONFS_ROOT")
    assert default_root() == "/var/lib/unionfs"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_root() == "/data/unionfs"


def test_a_look_with_another_driver_decides_nothing(tmp_path: Path) -> None:
    for name in ("vfs", "overlay2"):
        open_store(tmp_path, name).close()
    with open_store(tmp_path) as store:
        assert store.driver_name == "overlay2", "of two that hold nothing the better one"
    with open_store(tmp_path, "vfs") as store:
        layer = store.register(stream(BASE))
    with open_store(tmp_path) as store:
        assert store.driver_name == "vfs"
        assert layer.chain_id in store.map()
    with open_store(tmp_path, "overlay2") as store:
        store.create_rw_layer("c")
    with pytest.raises(DriverError, match=r"several valid graphdrivers: overlay2, vfs; name one of them \(--driver\)"):
        open_store(tmp_path)
