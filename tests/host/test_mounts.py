"""A mount is asked whether it answers; who asks gets an answer, whatever the server does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.drivers.rig import make_rig
from tests.layers.samples import BASE, stream
from tests.support.mounts import is_running, servers_of, wait_until
from tests.support.syscalls import mount, umount2
from unionfs.engines.snapshotter.mounts import SnapshotUnions
from unionfs.host import mounts
from unionfs.host.mounts import Answer, is_dead, probe
from unionfs.layers import fsck, open_store


@contextmanager
def stopped(server: int) -> Iterator[None]:
    """The server hangs until the end of the block."""
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


@contextmanager
def no_wait(server: int) -> Iterator[None]:
    """The server hangs, and goes on only when the block waits for it: then the test fails, but ends."""
    waited = threading.Timer(20, os.kill, (server, signal.SIGCONT))
    with stopped(server):
        waited.start()
        yield
        assert waited.is_alive(), "something has waited for the server"
    waited.cancel()
    waited.join()


def test_alive_silent_and_dead(tmp_path: Path) -> None:
    with make_rig("unionfs", str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        assert probe(path) is Answer.ALIVE
        (server,) = servers_of(path)
        before = threading.active_count()
        with stopped(server):
            assert {probe(path, 0.1) for _ in range(5)} == {Answer.SILENT}
            assert threading.active_count() == before + 1, "it was asked once"
        assert wait_until(lambda: probe(path, 0.1) is Answer.ALIVE, 10)
        os.kill(server, signal.SIGKILL)
        assert wait_until(lambda: not is_running(server), 10)
        assert probe(path) is Answer.DEAD
        assert is_dead(path)
        rig.driver.put("x")
    assert probe("/nowhere/at/all") is Answer.ALIVE, "no server is known to be gone there"


def test_a_driver_does_not_wait_for_a_server_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_LIMIT_S", 0.1)
    with make_rig("unionfs", str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        (server,) = servers_of(path)
        with no_wait(server):
            again = rig.restart()
            assert again.get("x") == path
            assert again.get("x") == path
            assert SnapshotUnions._is_served(path)
        for _ in range(3):
            again.put("x")
        assert rig.mounts() == []


def test_fsck_tells_a_server_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_LIMIT_S", 0.1)
    with open_store(tmp_path / "root", "unionfs") as store:
        base = store.register(stream(BASE))
        path = store.create_rw_layer("c", base.chain_id).mount()
        (server,) = servers_of(path)
        with no_wait(server):
            (problem,) = fsck(store, repair=True)
        assert (problem.kind, problem.name, problem.repaired) == ("stuck-mount", path, False)
        assert wait_until(lambda: fsck(store) == [], 10)
        store.cleanup()


@pytest.mark.parametrize("visible", [True, False])
def test_whether_it_is_mounted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: bool) -> None:
    """With the kernel's control file system in its place, and on a host without it there."""
    control = tmp_path / "connections"
    control.mkdir()
    monkeypatch.setattr(mounts, "_CONTROL", str(control))
    if visible:
        mount("none", str(control), "fusectl")
    try:
        with make_rig("unionfs", str(tmp_path)) as rig:
            rig.make_base()
            rig.driver.create_read_write("x", "base")
            top = mounts.top_mount(rig.driver.get("x"))
            assert top is not None
            assert mounts.is_mounted_anywhere(top.minor) is True
            assert mounts.waiting_requests(top.minor) == 0
            rig.driver.put("x")
            assert mounts.is_mounted_anywhere(top.minor) is False
            assert mounts.waiting_requests(top.minor) is None
    finally:
        if visible:
            umount2(str(control))
