"""Files held open while something happens to them."""

from __future__ import annotations

import mmap
import os
import threading

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import upper_entries
from tests.support.users import in_child

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture(params=["lower", "upper"])
def opened(request: pytest.FixtureRequest, box: Sandbox) -> Sandbox:
    """A sandbox whose file ``f`` is in the lower layer or, from an earlier mount, in the upper one."""
    box.lower().file("f", "0123456789").file("g", "g")
    if request.param == "upper":
        with box.mount():
            os.chmod(box.at("f"), 0o600)
    return box


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_an_unlinked_file_lives_on(opened: Sandbox, flags: int) -> None:
    box = opened
    with box.mount():
        fd = os.open(box.at("f"), flags)
        try:
            number = os.fstat(fd).st_ino
            os.unlink(box.at("f"))
            assert not os.path.lexists(box.at("f"))
            assert os.read(fd, 100) == b"0123456789"
            st = os.fstat(fd)
            assert (st.st_nlink, st.st_size, st.st_ino) == (0, 10, number)
            if flags == os.O_RDWR:
                assert os.write(fd, b"more") == 4
                # fuse-overlayfs 2.0 fails here: fstat of an unlinked file after a write
                st = os.fstat(fd)
                assert (st.st_nlink, st.st_size) == (0, 14)
                os.ftruncate(fd, 3)
                assert os.fstat(fd).st_size == 3
                os.fsync(fd)
                assert os.pread(fd, 100, 0) == b"012"
            os.fchmod(fd, 0o640)
            os.fchown(fd, 1, 2)
            os.utime(fd, ns=(1, 1))
            st = os.fstat(fd)
            assert (st.st_mode & 0o777, st.st_uid, st.st_gid, st.st_mtime_ns) == (0o640, 1, 2, 1)
            with open(box.at("f"), "w") as f:
                f.write("another")
            assert os.fstat(fd).st_nlink == 0
            assert os.pread(fd, 3, 0) == b"012"
        finally:
            os.close(fd)
        with open(box.at("f")) as f:
            assert f.read() == "another"
    box.assert_kernel_agrees()


def test_a_file_renamed_over_lives_on(opened: Sandbox) -> None:
    box = opened
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDWR)
        try:
            os.rename(box.at("g"), box.at("f"))
            assert os.pread(fd, 4, 0) == b"0123"
            os.pwrite(fd, b"xx", 0)
            assert os.pread(fd, 4, 0) == b"xx23"
            assert os.fstat(fd).st_nlink == 0
            with open(box.at("f")) as f:
                assert f.read() == "g"
        finally:
            os.close(fd)
    box.assert_kernel_agrees()


def test_writes_through_a_renamed_file_arrive(opened: Sandbox) -> None:
    box = opened
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDWR)
        try:
            os.rename(box.at("f"), box.at("h"))
            os.pwrite(fd, b"yy", 8)
            os.mkdir(box.at("d"))
            os.rename(box.at("h"), box.at("d/h"))
            os.pwrite(fd, b"zz", 0)
        finally:
            os.close(fd)
        with open(box.at("d/h")) as f:
            assert f.read() == "zz234567yy"
    box.assert_kernel_agrees()


def test_truncation_by_another_is_seen(opened: Sandbox) -> None:
    box = opened
    with box.mount():
        reader, writer = os.open(box.at("f"), os.O_RDONLY), os.open(box.at("f"), os.O_RDWR)
        try:
            assert os.pread(reader, 100, 0) == b"0123456789"
            os.truncate(box.at("f"), 4)
            assert os.fstat(reader).st_size == os.fstat(writer).st_size == 4
            assert os.pread(reader, 100, 0) == os.pread(writer, 100, 0) == b"0123"
            with open(box.at("f"), "w"):
                pass
            assert os.pread(reader, 100, 0) == b""
            os.pwrite(writer, b"end", 6)
            assert os.pread(reader, 100, 0) == b"\0" * 6 + b"end"
        finally:
            os.close(reader)
            os.close(writer)
    box.assert_kernel_agrees()


def test_a_reader_opened_before_copy_up_sees_later_writes(box: Sandbox) -> None:
    """``tail -f`` on a lower file."""
    box.lower().file("log", "one\n").file("d/x", "x")
    with box.mount():
        fd = os.open(box.at("log"), os.O_RDONLY)
        try:
            assert os.read(fd, 100) == b"one\n"
            with open(box.at("log"), "a") as f:
                f.write("two\n")
            assert os.read(fd, 100) == b"two\n"
            assert os.fstat(fd).st_size == 8
            os.rename(box.at("log"), box.at("log.1"))
            with open(box.at("log.1"), "a") as f:
                f.write("three\n")
            assert os.read(fd, 100) == b"three\n"
        finally:
            os.close(fd)


def test_appending_from_several_processes_loses_nothing(opened: Sandbox) -> None:
    box = opened
    count, writers = 200, 6

    def append(letter: str) -> None:
        fd = os.open(box.at("f"), os.O_WRONLY | os.O_APPEND)
        for n in range(count):
            os.write(fd, f"{letter}{n:05}\n".encode())
        os.close(fd)

    with box.mount():
        threads = [
            threading.Thread(target=in_child, args=(lambda letter=letter: append(letter),))
            for letter in "abcdef"[:writers]
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        with open(box.at("f")) as f:
            text = f.read()
        assert text.startswith("0123456789")
        lines = text[10:].splitlines()
        assert sorted(lines) == sorted(f"{w}{n:05}" for w in "abcdef"[:writers] for n in range(count))
        for w in "abcdef"[:writers]:
            assert [x for x in lines if x[0] == w] == [f"{w}{n:05}" for n in range(count)]


def test_shared_mappings_are_the_file(opened: Sandbox) -> None:
    box = opened

    def use() -> tuple[bytes, bytes, bytes]:
        fd = os.open(box.at("f"), os.O_RDWR)
        with mmap.mmap(fd, 10) as m:
            m[0:2] = b"MM"
            with open(box.at("f"), "rb") as f:
                first = f.read()
            os.pwrite(fd, b"ww", 8)
            second = bytes(m[:])
            m[4:6] = b"XX"
            m.flush()
        os.close(fd)
        with open(box.at("f"), "rb") as f:
            return first, second, f.read()

    with box.mount():
        first, second, third = in_child(use)
    assert first == b"MM23456789"
    assert second == b"MM234567ww"
    assert third == b"MM23XX67ww"
    with open(box.in_upper("f"), "rb") as f:
        assert f.read() == third
    box.assert_kernel_agrees()


def test_a_mapping_outlives_close_and_unlink(opened: Sandbox) -> None:
    box = opened

    def use() -> tuple[bytes, bytes]:
        fd = os.open(box.at("f"), os.O_RDWR)
        with mmap.mmap(fd, 10) as m:
            os.close(fd)
            os.unlink(box.at("f"))
            m[0:1] = b"Z"
            m.flush()
            return bytes(m[:]), open(box.at("g"), "rb").read()

    with box.mount():
        assert in_child(use) == (b"Z123456789", b"g")


def test_private_mappings_change_nothing(opened: Sandbox) -> None:
    box = opened

    def use() -> tuple[bytes, bytes]:
        fd = os.open(box.at("f"), os.O_RDONLY)
        with mmap.mmap(fd, 10, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as m:
            m[0:2] = b"PP"
            mapped = bytes(m[:])
        os.close(fd)
        with open(box.at("f"), "rb") as f:
            return mapped, f.read()

    with box.mount():
        assert in_child(use) == (b"PP23456789", b"0123456789")


def test_a_shared_read_mapping_made_before_copy_up_sees_the_write(box: Sandbox) -> None:
    """Better than the kernel's overlayfs, where such a mapping keeps the lower file."""
    box.lower().file("f", "0123456789")

    def use() -> bytes:
        fd = os.open(box.at("f"), os.O_RDONLY)
        with mmap.mmap(fd, 10, prot=mmap.PROT_READ) as m:
            assert m[:] == b"0123456789"
            with open(box.at("f"), "r+b") as f:
                f.write(b"new")
            return bytes(m[:])

    with box.mount():
        assert in_child(use) == b"new3456789"


def test_running_a_lower_program_while_it_is_replaced(box: Sandbox) -> None:
    low = box.lower()
    with open("/bin/sleep", "rb") as f:
        low.file("sleep", f.read(), mode=0o755)
    import subprocess

    with box.mount():
        running = subprocess.Popen([box.at("sleep"), "60"])
        try:
            # As dpkg does: write beside it and rename over it.
            with open(box.at("sleep.new"), "wb") as f:
                f.write(b"#!/bin/sh\nexit 7\n")
            os.chmod(box.at("sleep.new"), 0o755)
            os.rename(box.at("sleep.new"), box.at("sleep"))
            assert running.poll() is None
            assert subprocess.run([box.at("sleep")], check=False).returncode == 7
        finally:
            running.kill()
            running.wait()
    box.assert_kernel_agrees()


def test_open_descriptor_can_be_linked_back(box: Sandbox) -> None:
    box.lower().file("f", "data").dir("d")
    with box.mount():
        fd, proc = os.open(box.at("f"), os.O_RDWR), os.open("/proc", os.O_RDONLY)
        try:
            # With a directory descriptor Python calls linkat(2), which follows the link when told so.
            os.link(f"self/fd/{fd}", box.at("d/again"), src_dir_fd=proc, follow_symlinks=True)
            os.unlink(box.at("f"))
            os.write(fd, b"D")
            assert os.fstat(fd).st_nlink == 1
        finally:
            os.close(fd)
            os.close(proc)
        with open(box.at("d/again")) as f:
            assert f.read() == "Data"
    box.assert_kernel_agrees()


def test_unlinked_files_leave_nothing_in_upper_and_work(opened: Sandbox) -> None:
    box = opened
    with box.mount():
        fds = [os.open(box.at("f"), os.O_RDWR), os.open(box.at("new"), os.O_RDWR | os.O_CREAT)]
        for fd, name in zip(fds, ("f", "new"), strict=True):
            os.unlink(box.at(name))
            os.write(fd, b"x" * 100_000)
        for fd in fds:
            os.close(fd)
    assert upper_entries(box.in_upper()) == {"f": "whiteout"}
    left = [p for p in upper_entries(box.work or "") if p not in ("work", "work/incompat")]
    assert left == []


def test_file_locks_exclude_processes(box: Sandbox) -> None:
    import fcntl

    box.lower().file("f", "x")

    def try_lock() -> bool:
        fd = os.open(box.at("f"), os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    with box.mount():
        assert in_child(try_lock)
        with open(box.at("f"), "r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            assert not in_child(try_lock)
            fcntl.flock(f, fcntl.LOCK_UN)
            fcntl.lockf(f, fcntl.LOCK_EX)
            assert not in_child(try_lock)
        assert in_child(try_lock)
