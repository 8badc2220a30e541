"""System calls that need the direct transport: holes, preallocation, unnamed files, copies inside of the mount."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from tests.support.mounts import is_ours, mounted_image
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import upper_entries
from tests.support.syscalls import fallocate

pytest_plugins = ["tests.support.sandbox"]
needs_root()

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FS_NODUMP_FL, FS_NOATIME_FL = 0x40, 0x80
PUNCH_HOLE_KEEP_SIZE = 3


def test_fallocate_and_punch_hole(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("f", b"x" * 1_000_000)
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDWR)
        try:
            fallocate(fd, 0, 0, 2_000_000)
            assert os.fstat(fd).st_size == 2_000_000
            fallocate(fd, 1, 0, 3_000_000)
            assert os.fstat(fd).st_size == 2_000_000
            fallocate(fd, PUNCH_HOLE_KEEP_SIZE, 4096, 8192)
            assert os.pread(fd, 8192 + 2, 4095) == b"x" + b"\0" * 8192 + b"x"
            with pytest.raises(OSError):
                fallocate(fd, 0, 0, 0)
        finally:
            os.close(fd)
    box.assert_kernel_agrees()


def test_seeking_to_holes_and_data(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().sparse("f", 10 << 20, 4 << 20, b"x" * 8192)
    with box.mount():
        for flags in (os.O_RDONLY, os.O_RDWR):
            fd = os.open(box.at("f"), flags)
            assert os.lseek(fd, 0, os.SEEK_DATA) == 4 << 20
            assert os.lseek(fd, 4 << 20, os.SEEK_HOLE) == (4 << 20) + 8192
            with pytest.raises(OSError) as caught:
                os.lseek(fd, 5 << 20, os.SEEK_DATA)
            assert caught.value.errno == errno.ENXIO
            os.close(fd)


def test_unnamed_files(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().dir("d").file("d/other")
    with box.mount():
        fd, proc = os.open(box.at("d"), os.O_TMPFILE | os.O_RDWR, 0o640), os.open("/proc", os.O_RDONLY)
        os.write(fd, b"content")
        assert os.listdir(box.at("d")) == ["other"]
        assert os.fstat(fd).st_nlink == 0
        os.link(f"self/fd/{fd}", box.at("d/named"), src_dir_fd=proc, follow_symlinks=True)
        assert os.fstat(fd).st_nlink == 1
        os.close(fd)
        os.close(proc)
        with open(box.at("d/named")) as f:
            assert f.read() == "content"
        os.close(os.open(box.at("d"), os.O_TMPFILE | os.O_RDWR))
    assert set(upper_entries(box.in_upper())) == {"d", "d/named"}
    box.assert_kernel_agrees()


def test_copy_file_range(direct_box: Sandbox) -> None:
    box = direct_box
    data = os.urandom(3 << 20)
    box.lower().file("f", data).file("over", b"y" * 100)
    with box.mount():
        src, dst = os.open(box.at("f"), os.O_RDONLY), os.open(box.at("over"), os.O_RDWR)
        done = 0
        while done < len(data):
            more = os.copy_file_range(src, dst, len(data) - done)
            assert more > 0
            done += more
        os.close(src)
        os.close(dst)
        with open(box.at("over"), "rb") as f:
            assert f.read() == data
    box.assert_kernel_agrees()


def test_file_flags(direct_box: Sandbox) -> None:
    """``chattr`` and ``lsattr``."""
    box = direct_box
    box.lower().file("f", "x")
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDONLY)
        before = struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, b"\0" * 4))[0]
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("i", before | FS_NODUMP_FL | FS_NOATIME_FL))
        after = struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, b"\0" * 4))[0]
        os.close(fd)
        assert after & (FS_NODUMP_FL | FS_NOATIME_FL) == FS_NODUMP_FL | FS_NOATIME_FL


def test_birth_times(direct_box: Sandbox) -> None:
    import subprocess
    import time

    box = direct_box
    box.lower().file("f", "x")
    with box.mount():
        began = int(time.time()) - 1
        with open(box.at("new"), "w"):
            pass
        words = ["stat", "-c", "%W", box.at("new"), box.at("f")]
        new, old = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        assert int(new) >= began
        assert int(old) > 0


def test_default_acls_replace_the_umask(direct_box: Sandbox) -> None:
    import subprocess

    box = direct_box
    low = box.lower().dir("d").dir("plain")
    subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx,g::rwx,o::rwx", low.at("d")], check=True)
    with box.mount():
        old = os.umask(0o077)
        try:
            for d in ("d", "plain"):
                os.close(os.open(box.at(d + "/f"), os.O_CREAT | os.O_WRONLY, 0o666))
                os.mkdir(box.at(d + "/d"), 0o777)
        finally:
            os.umask(old)
        assert [oct(os.stat(box.at(p)).st_mode & 0o777) for p in ("d/f", "d/d", "plain/f", "plain/d")] == [
            "0o666",
            "0o777",
            "0o600",
            "0o700",
        ]
    box.assert_kernel_agrees()


def test_a_default_acl_that_comes_and_goes(direct_box: Sandbox) -> None:
    import subprocess

    box = direct_box
    box.lower().dir("d")
    modes = []

    def make(name: str) -> None:
        os.close(os.open(box.at("d/" + name), os.O_CREAT | os.O_WRONLY, 0o666))
        modes.append(os.stat(box.at("d/" + name)).st_mode & 0o777)

    with box.mount():
        old = os.umask(0o077)
        try:
            make("before")
            subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx,g::rwx,o::rwx", box.at("d")], check=True)
            make("with")
            subprocess.run(["setfacl", "-k", box.at("d")], check=True)
            make("after")
        finally:
            os.umask(old)
    assert modes == [0o600, 0o666, 0o600]


def test_truncating_to_the_same_size_is_a_change(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("f", "1234")
    with box.mount():
        before = os.stat(box.at("f")).st_mtime_ns
        os.truncate(box.at("f"), 4)
        assert os.stat(box.at("f")).st_mtime_ns > before


def test_writes_pass_through_only_to_upper_files(direct_box: Sandbox) -> None:
    """A lower file that is open for reading and is then written must not be written in its layer."""
    box = direct_box
    low = box.lower()
    for n in range(50):
        low.file(f"f{n}", f"content {n}")
    with box.mount():
        readers = [os.open(box.at(f"f{n}"), os.O_RDONLY) for n in range(50)]
        writers = [os.open(box.at(f"f{n}"), os.O_RDWR) for n in range(50)]
        late = [os.open(box.at(f"f{n}"), os.O_RDWR | os.O_APPEND) for n in range(50)]
        for n in range(50):
            os.pwrite(writers[n], b"C", 0)
            os.write(late[n], b"!")
            assert os.pread(readers[n], 100, 0) == f"Content {n}!".encode()
            assert os.fstat(readers[n]).st_size == len(f"content {n}!")
        for fd in (*readers, *writers, *late):
            os.close(fd)
    for n in range(50):
        with open(low.at(f"f{n}")) as f:
            assert f.read() == f"content {n}"
        with open(box.in_upper(f"f{n}")) as f:
            assert f.read() == f"Content {n}!"


@pytest.mark.parametrize("order", ["reader first", "writer first", "created"])
def test_every_open_of_one_file_sees_the_same(direct_box: Sandbox, order: str) -> None:
    """Opens that pass through and opens that do not, of one inode at once."""
    box = direct_box
    box.lower().file("f", b"0" * 10_000)
    with box.mount():
        name = "f"
        if order == "created":
            name = "new"
            first = os.open(box.at(name), os.O_RDWR | os.O_CREAT)
            os.write(first, b"0" * 10_000)
        else:
            first = os.open(box.at(name), os.O_RDONLY if order == "reader first" else os.O_RDWR)
        others = [os.open(box.at(name), f) for f in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND)]
        for turn, fd in enumerate(others[1:]):
            os.pwrite(fd, bytes([65 + turn]) * 100, turn * 1000)
            expected = os.pread(others[0], 20_000, 0)
            assert expected.count(bytes([65 + turn])) == 100
            assert os.pread(first, 20_000, 0) == expected
        os.truncate(box.at(name), 50)
        for fd in (first, *others):
            assert os.fstat(fd).st_size == 50
            os.close(fd)
    box.assert_kernel_agrees()


def test_pyfuse3_answers_what_it_cannot(box: Sandbox) -> None:
    """On the portable transport these calls fail in the way that programs know, or are done the slow way."""
    if os.environ["UNIONFS_TRANSPORT"] != "pyfuse3" or not is_ours():
        return
    box.lower().file("f", b"x" * 10_000).dir("d")
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDWR)
        with pytest.raises(OSError) as caught:
            fallocate(fd, 0, 0, 20_000)
        assert caught.value.errno == errno.EOPNOTSUPP
        os.posix_fallocate(fd, 0, 20_000)  # the C library writes instead
        assert os.fstat(fd).st_size == 20_000
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 20_000
        with pytest.raises(OSError) as caught:
            os.open(box.at("d"), os.O_TMPFILE | os.O_RDWR)
        assert caught.value.errno == errno.EOPNOTSUPP
        os.close(fd)


def test_project_of_a_file_is_not_the_containers_to_change(direct_box: Sandbox) -> None:
    """It stands for the host's quota."""
    box = direct_box
    box.lower()
    where = os.path.join(box.root, "xfs")
    with mounted_image(os.path.join(box.root, "image"), where, "xfs", 320 << 20):
        box.upper, box.work = f"{where}/upper", f"{where}/work"
        os.mkdir(box.upper)
        os.mkdir(box.work)
        with box.mount():
            os.mkdir(box.at("d"))
            fd = os.open(box.at("d"), os.O_RDONLY)
            try:
                present = bytearray(28)
                fcntl.ioctl(fd, FS_IOC_FSGETXATTR, present)
                fcntl.ioctl(fd, FS_IOC_FSSETXATTR, present)  # as it is
                for field, value in ((12, 7), (1, 0x02)):  # project, its inheritance
                    wanted = bytearray(present)
                    wanted[field] |= value
                    with pytest.raises(PermissionError):
                        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, wanted)
                flags = bytearray(4)
                fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
                flags[3] |= 0x20  # FS_PROJINHERIT_FL
                with pytest.raises(PermissionError):
                    fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)
            finally:
                os.close(fd)
