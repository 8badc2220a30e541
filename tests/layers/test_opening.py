"""Which store is opened, and by whom: contract row 117."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers.conftest import Workshop
from tests.layers.samples import BASE, stream
from unionfs.errors import DriverError, StoreLockedError
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
