"""The parts that drivers are made of: counts, locks, removal, copies, file system names, quotas."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.drivers.xfs import mounted_xfs
from tests.support.mounts import mounted_tmpfs
from tests.support.snapshot import snapshot
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import home, quota, vfs
from unionfs.drivers.layered import MountChecker, RefCounter
from unionfs.drivers.quota import ProjectQuota, project_of, set_project
from unionfs.drivers.vfs import copy_tree
from unionfs.errors import DriverError, LayerBusyError, OptionError, QuotaNotSupportedError
from unionfs.host.fs_magic import FsMagic, fs_magic, fs_name
from unionfs.host.locks import NamedLocks

OLD_NS = 1_000_000_000_123_456_789


# Counts


class Mounted:
    """A checker that says what it is told to."""

    def __init__(self, *paths: str) -> None:
        self.paths = set(paths)
        self.asked: list[str] = []

    def is_mounted(self, path: str) -> bool:
        self.asked.append(path)
        return path in self.paths


def test_count_goes_up_and_down() -> None:
    counter = RefCounter(Mounted())
    assert [counter.increment("/a"), counter.increment("/a"), counter.decrement("/a"), counter.decrement("/a")] == [
        1, 2, 1, 0,
    ]  # fmt: skip
    assert counter.paths() == []


def test_count_never_falls_below_zero() -> None:
    counter = RefCounter(Mounted())
    assert [counter.decrement("/a"), counter.decrement("/a"), counter.increment("/a")] == [0, 0, 1]


def test_mounted_path_starts_at_one_and_is_asked_once() -> None:
    checker = Mounted("/a")
    counter = RefCounter(checker)
    assert [counter.increment("/a"), counter.decrement("/a"), counter.increment("/b")] == [2, 1, 1]
    assert checker.asked == ["/a", "/b"]
    assert counter.decrement("/a") == 0
    assert counter.increment("/a") == 2  # forgotten at zero, so the table is asked again
    counter.forget("/a")
    checker.paths.clear()
    assert counter.increment("/a") == 1


def test_mount_checker(tmp_path: Path) -> None:
    checker = MountChecker()
    assert not checker.is_mounted(str(tmp_path))
    assert not checker.is_mounted(str(tmp_path / "nothing"))
    with mounted_tmpfs(str(tmp_path / "t")):
        assert checker.is_mounted(str(tmp_path / "t"))
    assert not checker.is_mounted(str(tmp_path / "t"))


# Locks


def test_named_locks_exclude_each_other_by_name_and_leave_nothing() -> None:
    locks = NamedLocks()
    inside: list[str] = []
    overlaps: list[str] = []

    def work(*names: str) -> None:
        for _ in range(50):
            with locks.hold(*names):
                for name in set(names):
                    if name in inside:
                        overlaps.append(name)
                inside.extend(names)
                time.sleep(0)
                for name in names:
                    inside.remove(name)

    threads = [
        threading.Thread(target=work, args=names)
        for names in (("a",), ("b",), ("a", "b"), ("b", "a"), ("a", "a"), ("c", ""))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert overlaps == []
    assert len(locks) == 0


def test_different_names_do_not_wait() -> None:
    locks = NamedLocks()
    with locks.hold("a"), locks.hold("b"):
        assert len(locks) == 2


# Removal (moby's containerfs tests)


def test_ensure_remove_all_not_exist(tmp_path: Path) -> None:
    home.delete(str(tmp_path / "nothing"))


def test_ensure_remove_all_with_dir(tmp_path: Path) -> None:
    (tmp_path / "d/e/f").mkdir(parents=True)
    home.delete(str(tmp_path / "d"))
    assert os.listdir(tmp_path) == []


def test_ensure_remove_all_with_mount(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").touch()
    (tmp_path / "d/one/two").mkdir(parents=True)
    for where in ("d/one/two", "d/one/two"):  # one on top of the other
        subprocess.run(["mount", "--bind", tmp_path / "outside", tmp_path / where], check=True)
    with open(tmp_path / "d/one/two/kept", "rb"):
        started = time.monotonic()
        home.delete(str(tmp_path / "d"))
        assert time.monotonic() - started < 5
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert (tmp_path / "outside/kept").exists()


def test_immutable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/fixed").touch()
    subprocess.run(["chattr", "+i", tmp_path / "d/fixed"], check=True)
    try:
        with pytest.raises(DriverError, match=r"cannot delete .*/d: .*chattr -i"):
            home.delete(str(tmp_path / "d"))
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "d/fixed"], check=True)
    home.delete(str(tmp_path / "d"))


def test_directory_that_keeps_being_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_TRIES", 2)
    (tmp_path / "d").mkdir()

    def busy(_: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("unionfs.host.disk.delete", busy)
    with open(tmp_path / "d/open", "wb"), pytest.raises(LayerBusyError, match=f"process {os.getpid()} .this process"):
        home.delete(str(tmp_path / "d"))


# Copies (moby's copy tests)


def test_copy_dir(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "dir/sub").mkdir(parents=True)
    (source / "dir/file").write_bytes(b"contents")
    os.chmod(source / "dir/file", 0o6751)
    os.chown(source / "dir/sub", 3, 4)
    os.chmod(source / "dir/sub", 0o1700)
    os.mkfifo(source / "fifo", 0o600)
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.symlink("nowhere", source / "link")
    os.link(source / "dir/file", source / "second")
    os.setxattr(source / "dir/file", "user.note", b"1")
    os.setxattr(source / "dir", "trusted.overlay.opaque", b"y")  # of an overlay that somebody runs inside
    with open(source / "sparse", "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"x")
    (source / b"\xff\xfe".decode("utf-8", "surrogateescape")).touch()
    for at, dirs, files in os.walk(source, topdown=False):
        for name in dirs + files:
            os.utime(os.path.join(at, name), ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    target = tmp_path / "target"
    target.mkdir()
    copy_tree(str(source), str(target))
    assert snapshot(str(target)) == snapshot(str(source))
    assert os.stat(target / "sparse").st_blocks == os.stat(source / "sparse").st_blocks
    assert os.stat(target / "second").st_ino == os.stat(target / "dir/file").st_ino
    assert os.stat(target / "second").st_ino != os.stat(source / "second").st_ino


def test_copy_shares_blocks_where_it_can(tmp_path: Path) -> None:
    with mounted_xfs(tmp_path / "image", tmp_path / "xfs"):
        source, target = tmp_path / "xfs/source", tmp_path / "xfs/target"
        for directory in (source, target):
            directory.mkdir()
        (source / "big").write_bytes(os.urandom(64 << 20))
        os.sync()
        before = os.statvfs(tmp_path / "xfs").f_bfree
        copy_tree(str(source), str(target))
        os.sync()
        after = os.statvfs(tmp_path / "xfs")
        assert (before - after.f_bfree) * after.f_frsize < 8 << 20
        assert (target / "big").read_bytes() == (source / "big").read_bytes()


def test_failed_copy_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = vfs.init(str(tmp_path / "h"), [], IdMapping())
    driver.create("base")
    Path(driver.get("base"), "f").write_bytes(b"1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x/f")

    monkeypatch.setattr("unionfs.drivers.vfs.copy_data", full)
    with pytest.raises(DriverError, match=r"cannot create layer x as a copy of .*: /x/f: No space left"):
        driver.create("x", "base")
    assert os.listdir(tmp_path / "h/dir") == ["base"]


def test_xattr_unsupported_by_backing_fs(tmp_path: Path) -> None:
    """moby's test of vfs: an archive with xattrs on a file system without."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("file")
        member.pax_headers = {"SCHILY.xattr.user.test": "value"}
        archive.addfile(member)
    where = tmp_path / "ramfs"
    where.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", where], check=True)
    try:
        driver = vfs.init(str(where / "vfs"), [], IdMapping())
        driver.create("x")
        with pytest.raises(Exception, match=r"xattr|not supported"):
            driver.apply_diff("x", "", io.BytesIO(buffer.getvalue()))
        driver = vfs.init(str(where / "vfs"), ["vfs.xattrs=i_want_broken_containers"], IdMapping())
        assert ("Extended file attributes", "best-effort") in driver.status()
        driver.create("y")
        driver.apply_diff("y", "", io.BytesIO(buffer.getvalue()))
        assert os.listdir(driver.get("y")) == ["file"]
    finally:
        subprocess.run(["umount", where], check=True)
    with pytest.raises(OptionError, match=r"vfs\.xattrs=maybe"):
        vfs.init(str(tmp_path / "h"), ["vfs.xattrs=maybe"], IdMapping())


# File system names


def test_fs_names() -> None:
    assert {fs_name(magic) for magic in FsMagic} == {
        "aufs", "btrfs", "cramfs", "ecryptfs", "extfs", "f2fs", "fuse", "gpfs", "jffs2", "jfs", "nfs", "overlayfs",
        "ramfs", "reiserfs", "smb", "squashfs", "tmpfs", "unsupported", "vxfs", "xfs", "zfs",
    }  # fmt: skip
    assert fs_name(0x1234) == "<unknown>"


def test_fs_magic(tmp_path: Path) -> None:
    assert fs_magic("/proc/self") == 0x9FA0
    with mounted_tmpfs(str(tmp_path / "t")):
        assert fs_magic(str(tmp_path / "t")) == FsMagic.TMPFS
        assert fs_magic(str(tmp_path / "t/not/yet")) == FsMagic.TMPFS


# Project quotas


def test_quota_needs_xfs(tmp_path: Path) -> None:
    with (
        mounted_tmpfs(str(tmp_path / "t")),
        pytest.raises(QuotaNotSupportedError, match="is not on xfs, so no size can be enforced"),
    ):
        ProjectQuota(str(tmp_path / "t"))


def test_project_quotas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits themselves need a kernel with CONFIG_XFS_QUOTA; all else is the same without."""
    with mounted_xfs(tmp_path / "image", tmp_path / "xfs") as has_quotas:
        home = str(tmp_path / "xfs/home")
        os.mkdir(home)
        asked: list[tuple[int, int, tuple[int, ...]]] = []
        if not has_quotas:
            with pytest.raises(QuotaNotSupportedError, match="has no project quotas"):
                ProjectQuota(home)
            assert os.listdir(home) == []

            def record(_: ProjectQuota, command: int, number: int, data: bytes) -> bytes:
                if command == quota._Q_XSETQLIM:
                    asked.append((command, number, quota._DISK_QUOTA.unpack(data)))
                elif number == 5:  # somebody else's
                    return quota._DISK_QUOTA.pack(1, 2, 0, 5, 0, 0, 0, 0, 8, 1)
                else:
                    raise OSError(errno.ENOENT, "No such file or directory")
                return data

            monkeypatch.setattr(ProjectQuota, "_quotactl", record)
        limits = ProjectQuota(home)
        node = os.lstat(home + "/backingFsBlockDev")
        assert stat.S_ISBLK(node.st_mode)
        assert node.st_rdev == os.stat(home).st_dev
        for name in ("a", "b"):
            os.mkdir(f"{home}/{name}")
            limits.apply(f"{home}/{name}", 50 << 20)
        assert (project_of(home), project_of(home + "/a"), project_of(home + "/b")) == (0, 2, 3)
        os.mkdir(home + "/a/inside")
        assert project_of(home + "/a/inside") == 2
        # Another process goes on after the ids that are taken, and so does one with another home's own id.
        os.mkdir(home + "/c")
        ProjectQuota(home).apply(home + "/c", 1)
        assert project_of(home + "/c") == 4
        if not has_quotas:
            os.mkdir(home + "/e")
            ProjectQuota(home).apply(home + "/e", 1)
            assert project_of(home + "/e") == 6
        set_project(home, 100)
        os.mkdir(home + "/d")
        ProjectQuota(home).apply(home + "/d", 0)
        assert project_of(home + "/d") == 102
        if has_quotas:
            assert limits.limit_of(home + "/a") == 50 << 20
            with pytest.raises(OSError) as raised, open(home + "/a/big", "wb", buffering=0) as file:
                for _ in range(60):
                    file.write(bytes(1 << 20))
            assert raised.value.errno in (errno.EDQUOT, errno.ENOSPC)
        else:
            blocks = [(number, fields[2], fields[3], fields[4], fields[5]) for _, number, fields in asked]
            assert (2, 12, 2, 102400, 102400) in blocks  # of 512 bytes, soft and hard
            assert (4, 12, 4, 1, 1) in blocks


def test_disk_quota_is_the_kernels(tmp_path: Path) -> None:
    """linux/dqblk_xfs.h: 112 bytes, limits from the ninth."""
    assert quota._DISK_QUOTA.size == 112
    packed = quota._DISK_QUOTA.pack(1, 2, 12, 7, 0x1122, 0x3344, 0, 0, 0, 0)
    assert packed[4:8] == (7).to_bytes(4, "little")
    assert packed[8:10] == b"\x22\x11"
    assert packed[16:18] == b"\x44\x33"


def test_default_size_without_quotas(tmp_path: Path) -> None:
    with mounted_tmpfs(str(tmp_path / "t")), pytest.raises(QuotaNotSupportedError, match=r"/t/h is not on xfs"):
        vfs.init(str(tmp_path / "t/h"), ["size=1G"], IdMapping())
