"""What the kernel knows and the backing file does not: data that it has not written yet, times of mapped files.

Whatever is asked about a file, the answer has to be what read(2) shows. The kernel's overlayfs is the reference.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import fallocate

pytest_plugins = ["tests.support.sandbox"]
needs_root()

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
PUNCH_HOLE_KEEP_SIZE = 3
MS_SYNC = 4
TICKS_S = 0.05  # longer than a tick of the kernel's clock, by which attributes may lag behind


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(path: str, *, keeps_open: bool = True) -> Iterator[memoryview]:
    """A shared mapping of ``SIZE`` bytes of a file; without ``keeps_open`` nobody has the file open any more.

    (The mapping of Python's ``mmap`` has a descriptor of its own.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(path, os.O_RDWR)
    try:
        address = libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        assert address != ctypes.c_void_p(-1).value
        if not keeps_open:
            os.close(fd)
            fd = -1
        try:
            yield memoryview((ctypes.c_char * SIZE).from_address(address)).cast("B")
        finally:
            libc.munmap(address, SIZE)
    finally:
        if fd >= 0:
            os.close(fd)


def synced(memory: memoryview) -> None:
    """msync(2) a mapping."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).msync(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), MS_SYNC) == 0


def data_ranges(path: str) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE tell of a file: begin and end of each range of data."""
    ranges: list[tuple[int, int]] = []
    with opened(path, os.O_RDONLY) as fd:
        end = 0
        while True:
            try:
                begin = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return ranges
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            ranges.append((begin, end))


def assert_has_data(path: str, *wanted: tuple[int, int]) -> None:
    ranges = data_ranges(path)
    for begin, end in wanted:
        assert any(first <= begin and end <= last for first, last in ranges), (path, ranges, wanted)


def contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# -- data that the kernel has not written yet -------------------------------------------------------------------------


@pytest.fixture(params=["passthrough=1", "passthrough=0"])
def cached(request: pytest.FixtureRequest, box: Sandbox) -> Iterator[Sandbox]:
    """A mount whose files the kernel caches, and one where it writes to the upper ones by itself."""
    low = box.lower().file("low", b"a" * PAGE)
    low.sparse("holes", SIZE, 40 * PAGE, b"h" * PAGE).sparse("setuid", SIZE, 0, b"")
    os.chmod(low.at("setuid"), 0o4755)
    with box.mount(request.param):
        yield box


def test_seeking_in_a_file_that_is_being_written(cached: Sandbox) -> None:
    box = cached
    with opened(box.at("new"), os.O_WRONLY | os.O_CREAT) as new, opened(box.at("low"), os.O_RDWR) as low:
        os.pwrite(new, b"x" * PAGE, 0)
        assert_has_data(box.at("new"), (0, PAGE))
        os.pwrite(new, b"x" * PAGE, 10 * PAGE)
        assert_has_data(box.at("new"), (0, PAGE), (10 * PAGE, 11 * PAGE))
        os.pwrite(low, b"z" * 70_000, 30 * PAGE)
        assert_has_data(box.at("low"), (0, PAGE), (30 * PAGE, 30 * PAGE + 70_000))
        assert data_ranges(box.at("low"))[-1][1] == 30 * PAGE + 70_000
        with pytest.raises(OSError) as caught:
            os.lseek(low, 30 * PAGE + 70_000, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("name", ["holes", "setuid"])
def test_seeking_in_a_file_that_is_mapped(cached: Sandbox, name: str) -> None:
    path = cached.at(name)
    with mapped(path) as memory:
        memory[20 * PAGE : 20 * PAGE + 4] = b"mmap"
        assert_has_data(path, (20 * PAGE, 20 * PAGE + 4))
        memory[2 * PAGE] = 1
        assert_has_data(path, (2 * PAGE, 2 * PAGE + 1))
    with mapped(path, keeps_open=False) as memory:
        memory[10 * PAGE] = 1
        assert_has_data(path, (10 * PAGE, 10 * PAGE + 1), (20 * PAGE, 20 * PAGE + 4))
    assert_has_data(path, (10 * PAGE, 10 * PAGE + 1))


def test_holes_are_told_of_a_file_that_nobody_writes(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().sparse("holes", SIZE, 40 * PAGE, b"h" * PAGE)
    with box.mount("passthrough=0"):
        with opened(box.at("holes"), os.O_RDWR) as fd:
            os.pwrite(fd, b"x" * PAGE, 10 * PAGE)
        assert data_ranges(box.at("holes")) == [(10 * PAGE, 11 * PAGE), (40 * PAGE, 41 * PAGE)]


@pytest.mark.parametrize("program", ["cp", "tar"])
def test_a_file_that_is_being_written_is_copied_whole(cached: Sandbox, program: str) -> None:
    box = cached
    there = box.new_dir("there")
    os.close(os.open(box.at("old"), os.O_WRONLY | os.O_CREAT))
    os.stat(box.at("old"))
    with (
        opened(box.at("new"), os.O_WRONLY | os.O_CREAT) as new,
        opened(box.at("old"), os.O_WRONLY) as old,
        opened(box.at("low"), os.O_WRONLY) as low,
    ):
        for fd in (new, old, low):
            os.pwrite(fd, b"x" * 100_000, 0)
            os.pwrite(fd, b"y" * 10, 300_000)
        names = ["new", "old", "low"]
        if program == "cp":
            subprocess.run(["cp", *(box.at(name) for name in names), there], check=True)
        else:
            tar = subprocess.run(["tar", "-cSf-", "-C", box.target, *names], check=True, capture_output=True).stdout
            subprocess.run(["tar", "-xf-", "-C", there], check=True, input=tar)
        for name in names:
            assert contents(os.path.join(there, name)) == b"x" * 100_000 + bytes(200_000) + b"y" * 10


def test_a_file_without_blocks_shows_none_when_nobody_writes(cached: Sandbox) -> None:
    with opened(cached.at("new"), os.O_WRONLY | os.O_CREAT):
        pass
    assert os.stat(cached.at("new")).st_blocks == 0


def test_ranges_are_copied_as_they_are_read(cached: Sandbox) -> None:
    box = cached
    with opened(box.at("new"), os.O_RDWR | os.O_CREAT) as new, opened(box.at("copy"), os.O_RDWR | os.O_CREAT) as copy:
        os.ftruncate(new, SIZE)
        os.pwrite(new, b"x" * PAGE, 3 * PAGE)
        os.pwrite(copy, b"o" * 10 * PAGE, 0)
        done = 0
        while done < SIZE:
            more = os.copy_file_range(new, copy, SIZE - done, done, done)
            assert more > 0
            done += more
        assert os.pread(copy, 2 * SIZE, 0) == bytes(3 * PAGE) + b"x" * PAGE + bytes(SIZE - 4 * PAGE)
    assert contents(box.at("copy")) == contents(box.at("new"))


@pytest.mark.parametrize("option", ["passthrough=1", "passthrough=0"])
def test_punched_and_truncated_with_data_in_the_cache(direct_box: Sandbox, option: str) -> None:
    box = direct_box
    box.lower().file("low", b"a" * PAGE)
    with box.mount(option), opened(box.at("low"), os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 8 * PAGE, 0)
        fallocate(fd, PUNCH_HOLE_KEEP_SIZE, PAGE + 10, 2 * PAGE)
        assert os.pread(fd, 9 * PAGE, 0) == b"x" * (PAGE + 10) + bytes(2 * PAGE) + b"x" * (5 * PAGE - 10)
        os.pwrite(fd, b"y" * PAGE, 8 * PAGE)
        os.truncate(box.at("low"), 8 * PAGE + 5)
        os.ftruncate(fd, 9 * PAGE)
        assert os.pread(fd, 10 * PAGE, 8 * PAGE) == b"y" * 5 + bytes(PAGE - 5)
    with box.mount(option):
        assert contents(box.at("low"))[8 * PAGE :] == b"y" * 5 + bytes(PAGE - 5)


# -- attributes that change without a request -------------------------------------------------------------------------


def times(path: str) -> tuple[int, int]:
    st = os.stat(path)
    return st.st_mtime_ns, st.st_ctime_ns


def assert_moves(path: str, change: Callable[[], object]) -> None:
    """Both times of ``path``, which the kernel has been told, are later after ``change``, and are those on disk."""
    before = times(path)
    time.sleep(TICKS_S)
    change()
    after = times(path)
    assert after[0] > before[0] and after[1] > before[1], (before, after)


@pytest.mark.parametrize("keeps_open", [True, False])
@pytest.mark.parametrize("name", ["low", "upper", "new", "read"])
def test_storing_through_a_mapping_moves_the_times(box: Sandbox, name: str, keeps_open: bool) -> None:
    box.lower().file("low", b"a" * SIZE).file("read", b"a" * SIZE)
    with open(box.in_upper("upper"), "wb") as file:
        file.write(b"a" * SIZE)
    # While somebody has a lower file open, writers of it are not passed through.
    with box.mount(), opened(box.at("read"), os.O_RDONLY):
        path = box.at(name)
        if name == "new":
            with open(path, "wb") as file:
                file.write(b"a" * SIZE)
        os.utime(path, (10**9, 10**9))
        os.stat(path)
        with mapped(path, keeps_open=keeps_open) as memory:
            for page in range(3):

                def store(at: int = page * PAGE) -> None:
                    memory[at] = 1
                    synced(memory)

                assert_moves(path, store)
        last = times(path)
        assert last == times(path)
        assert last[0] == times(box.in_upper(name))[0]


def test_storing_into_a_new_file_that_stays_open_moves_the_times(box: Sandbox) -> None:
    box.lower()
    with box.mount(), opened(box.at("new"), os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, SIZE)
        os.stat(box.at("new"))
        with mmap.mmap(fd, SIZE) as memory:

            def store() -> None:
                memory[0] = 1
                memory.flush()

            assert_moves(box.at("new"), store)


def test_storing_shows_in_a_listing_with_attributes(box: Sandbox) -> None:
    box.lower().file("low", b"a" * SIZE)
    with box.mount(), opened(box.at("low"), os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as memory:
        for n in range(3):
            before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(box.target)}
            time.sleep(TICKS_S)
            memory[n * PAGE] = 1
            memory.flush()
            after = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(box.target)}
            assert after["low"] > before["low"]


def test_what_the_kernel_writes_by_itself_moves_the_times(box: Sandbox) -> None:
    box.lower().file("low", b"a" * SIZE)
    path = box.at("low")
    with box.mount(), opened(path, os.O_RDWR) as fd, open(box.at("other"), "w+b") as other:
        read_end, write_end = os.pipe()
        os.write(write_end, b"s" * PAGE)
        assert_moves(path, lambda: os.splice(read_end, fd, PAGE, offset_dst=0))
        os.close(read_end)
        os.close(write_end)
        assert_moves(path, lambda: os.pwritev(fd, [b"v" * PAGE], 0))
        other.write(b"o" * PAGE)
        other.flush()
        os.lseek(fd, 0, os.SEEK_SET)
        assert_moves(path, lambda: os.sendfile(fd, other.fileno(), 0, PAGE))
        assert_moves(path, lambda: os.copy_file_range(other.fileno(), fd, PAGE, 0, 0))
        assert_moves(path, lambda: os.ftruncate(fd, SIZE - 1))
        assert_moves(path, lambda: os.truncate(path, SIZE))
        with opened(path, os.O_WRONLY | os.O_DIRECT) as direct, mmap.mmap(-1, PAGE) as page:
            assert_moves(path, lambda: os.pwrite(direct, page, 0))


def test_allocating_moves_the_times_and_shows_blocks(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("low", b"a" * PAGE)
    path = box.at("low")
    with box.mount(), opened(path, os.O_RDWR) as fd:
        assert_moves(path, lambda: fallocate(fd, 0, 0, SIZE))
        assert os.stat(path).st_blocks >= SIZE // 512
        assert_moves(path, lambda: fallocate(fd, PUNCH_HOLE_KEEP_SIZE, 0, SIZE))
        assert os.stat(path).st_blocks < SIZE // 512
        with mmap.mmap(fd, SIZE) as memory:
            before = os.stat(path).st_blocks
            time.sleep(TICKS_S)
            memory[10 * PAGE] = 1
            memory.flush()
            assert os.stat(path).st_blocks > before


def test_the_kernel_keeps_the_attributes_of_a_file_that_nobody_maps_any_more(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("low", b"a" * SIZE)
    path = box.at("low")
    with box.mount() as here:
        with mapped(path) as memory:
            memory[0] = 1
        for _ in range(2):
            os.stat(path)
        os.kill(here.pid, 19)  # SIGSTOP: whatever asks the server now waits for ever
        try:
            done = subprocess.run(
                ["timeout", "-s", "KILL", "5", "stat", "-c", "%s", path], capture_output=True, check=False
            )
        finally:
            os.kill(here.pid, 18)
        assert done.stdout.strip() == b"%d" % SIZE
