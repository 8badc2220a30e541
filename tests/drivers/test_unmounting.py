"""The end of a mount: with copies of it in other mount namespaces, users there, dead servers, and mounts on top."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drivers.rig import Rig, make_rig
from tests.support.mounts import is_running, mounted_elsewhere, other_namespace, servers_of, wait_until
from tests.support.syscalls import mount
from unionfs.drivers import home
from unionfs.drivers.layered import Stack
from unionfs.engines.snapshotter.mounts import SnapshotUnions
from unionfs.errors import LayerBusyError
from unionfs.testing.trees import write


@pytest.fixture
def unionfs_rig(tmp_path: Path) -> Iterator[Rig]:
    with make_rig("unionfs", str(tmp_path)) as made:
        made.make_base()
        made.driver.create_read_write("x", "base")
        yield made


@pytest.mark.parametrize("end", ["put", "remove", "cleanup"])
def test_a_copy_in_another_namespace_goes_too(unionfs_rig: Rig, end: str, caplog: pytest.LogCaptureFixture) -> None:
    """moby#17902, #22260: nobody uses the copy, so nothing is waited for and no server is killed."""
    path = unionfs_rig.driver.get("x")
    write(path, "kept", b"1")
    (server,) = servers_of(path)
    with other_namespace() as other, caplog.at_level(logging.WARNING):
        assert mounted_elsewhere(other, path)
        if end == "cleanup":
            unionfs_rig.driver.cleanup()
        else:
            getattr(unionfs_rig.driver, end)("x")
        assert not mounted_elsewhere(other, path)
        assert not is_running(server)
    assert caplog.messages == []
    if end != "remove":
        with unionfs_rig.got("x") as again:
            assert Path(again, "kept").read_bytes() == b"1"


def test_a_user_in_another_namespace_keeps_the_server(unionfs_rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """It is not killed: what uses it may write on, and it ends with that."""
    path = unionfs_rig.driver.get("x")
    (server,) = servers_of(path)
    with other_namespace(f"cd {path};") as other:
        with caplog.at_level(logging.WARNING):
            unionfs_rig.driver.put("x")
        assert not mounted_elsewhere(other, path)
        assert is_running(server)
        Path(f"/proc/{other}/cwd/late").write_text("2")
    (said,) = caplog.messages
    assert f"{path}: something in another mount namespace still uses it" in said
    assert wait_until(lambda: not is_running(server), 10)
    with unionfs_rig.got("x") as again:
        assert Path(again, "late").read_text() == "2"


def test_a_disk_that_fails_keeps_no_mount(unionfs_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unionfs_rig.driver.get("x")
    (server,) = servers_of(path)
    device, sync, failed = os.stat(path).st_dev, os.fsync, []

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_dev == device:
            failed.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    user = os.open(path, os.O_RDONLY)  # so it is taken out of sight, after what was written has been settled
    unionfs_rig.driver.put("x")
    assert failed
    assert not os.path.ismount(path)
    os.close(user)
    assert wait_until(lambda: not is_running(server), 10)


def test_more_mounts_on_top_than_tries(layered_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_TRIES", 2)
    layered_rig.make_base()
    layered_rig.driver.create_read_write("x", "base")
    path = layered_rig.driver.get("x")
    for _ in range(3):
        mount("none", path, "tmpfs")
    with pytest.raises(LayerBusyError, match="cannot be unmounted: "):
        layered_rig.driver.remove("x")
    layered_rig.driver.remove("x")
    assert layered_rig.mounts() == []


def test_a_dead_mount_is_not_handed_out(unionfs_rig: Rig) -> None:
    """Also when somebody else has it: who starts a container again must not get the mount that killed it."""
    path = unionfs_rig.driver.get("x")
    (server,) = servers_of(path)
    os.kill(server, signal.SIGKILL)
    assert wait_until(lambda: not is_running(server), 10)
    assert unionfs_rig.driver.get("x") == path
    assert sorted(os.listdir(path)) == ["bin", "etc", "sh"]
    unionfs_rig.driver.put("x")
    assert sorted(os.listdir(path)) == ["bin", "etc", "sh"], "the first user's"
    unionfs_rig.driver.put("x")
    assert unionfs_rig.mounts() == []


def test_a_snapshot_goes_from_other_namespaces_too(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "union"):
        (tmp_path / name).mkdir()
    path = str(tmp_path / "union")
    stack = Stack(
        home=str(tmp_path),
        target=path,
        lowers=(str(tmp_path / "lower"),),
        upper=str(tmp_path / "upper"),
        work=str(tmp_path / "work"),
    )
    unions = SnapshotUnions()
    unions.ensure(stack, ())
    (server,) = servers_of(path)
    with other_namespace() as other:
        unions.detach(path)
        assert not mounted_elsewhere(other, path)
        assert wait_until(lambda: not is_running(server), 10)
        unions.ensure(stack, ())
    unions.detach(path)
