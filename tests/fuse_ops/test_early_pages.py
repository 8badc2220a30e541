"""Small files are in the kernel's page cache when they have been opened, before anybody reads them."""

from __future__ import annotations

import os
import stat

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import cached_pages
from unionfs.fuse_ops.speedups.reading_ahead import EarlyPages, size_to_give
from unionfs.fuse_ops.tree.inodes import FileInode, OpenFile

pytest_plugins = ["tests.support.sandbox"]
needs_root()

PAGE = 4096
SMALL = b"".join(b"%07d\n" % number for number in range(PAGE))  # 32 KiB
LARGE = SMALL * 5


@pytest.fixture
def box(box: Sandbox) -> Sandbox:
    box.lower().file("small", SMALL).file("odd", SMALL[:5000]).file("large", LARGE).file("empty", b"").file(
        "other", b"o"
    )
    return box


def begin(box: Sandbox) -> None:
    """Send so many requests that this program counts as alone."""
    for number in range(20):
        assert not os.path.lexists(box.at(f"missing-{number}"))


def pages_after_open(path: str, flags: int = os.O_RDONLY) -> int:
    fd = os.open(path, flags)
    try:
        return cached_pages(fd)
    finally:
        os.close(fd)


def contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_a_small_file_is_there_when_it_is_opened(box: Sandbox) -> None:
    with box.mount():
        begin(box)
        assert pages_after_open(box.at("small")) == len(SMALL) // PAGE
        assert pages_after_open(box.at("odd")) == 2
        assert contents(box.at("small")) == SMALL
        assert contents(box.at("odd")) == SMALL[:5000]


def test_large_and_empty_files_are_left_to_who_reads_them(box: Sandbox) -> None:
    with box.mount():
        begin(box)
        assert pages_after_open(box.at("large")) == 0
        assert pages_after_open(box.at("empty")) == 0
        assert contents(box.at("large")) == LARGE
        assert contents(box.at("empty")) == b""


def test_nothing_is_kept_where_nothing_may_be(box: Sandbox) -> None:
    with box.mount("timeout=0"):
        begin(box)
        assert pages_after_open(box.at("small")) == 0
        assert contents(box.at("small")) == SMALL


def test_what_is_written_later_is_seen(box: Sandbox) -> None:
    with box.mount():
        begin(box)
        reader = os.open(box.at("small"), os.O_RDONLY)
        try:
            assert cached_pages(reader) == len(SMALL) // PAGE
            writer = os.open(box.at("small"), os.O_RDWR)
            try:
                os.pwrite(writer, b"changed", 100)
                os.ftruncate(writer, 200)
            finally:
                os.close(writer)
            expected = SMALL[:100] + b"changed" + SMALL[107:200]
            assert os.pread(reader, 1000, 0) == expected
        finally:
            os.close(reader)
        assert contents(box.at("small")) == expected
        assert os.stat(box.at("small")).st_size == 200
    box.assert_kernel_agrees()


def test_reading_does_not_change_what_stat_shows(box: Sandbox) -> None:
    with box.mount():
        begin(box)
        before = os.stat(box.at("odd"))
        assert contents(box.at("odd")) == SMALL[:5000]
        assert os.stat(box.at("odd")) == before


def test_all_names_of_a_file_share_the_pages(box: Sandbox) -> None:
    os.link(os.path.join(box.lowers[0], "odd"), os.path.join(box.lowers[0], "second"))
    with box.mount():
        begin(box)
        assert os.stat(box.at("odd")).st_nlink == 2
        assert pages_after_open(box.at("second")) == 2
        assert contents(box.at("odd")) == contents(box.at("second")) == SMALL[:5000]


class TestSizeToGive:
    @staticmethod
    def opened(path: str, *, writable: bool = False) -> OpenFile:
        return OpenFile(FileInode(7, stat.S_IFREG), os.open(path, os.O_RDONLY), writable=writable)

    @pytest.fixture
    def path(self, tmp_path: os.PathLike[str]) -> str:
        path = os.path.join(tmp_path, "f")
        with open(path, "wb") as file:
            file.write(SMALL)
        return path

    def test_all_of_a_small_file(self, path: str) -> None:
        file = self.opened(path)
        assert size_to_give(file, os.O_RDONLY) == len(SMALL)
        assert size_to_give(file, os.O_RDONLY | os.O_DIRECT) == 0
        file.close()

    def test_nothing_twice_until_the_kernel_asks(self, path: str) -> None:
        file = self.opened(path)
        file.inode.kernel.page_cache_primed = True
        assert size_to_give(file, os.O_RDONLY) == 0
        EarlyPages(lambda inode, contents: None, lambda fd, buffer, offset: None).reads(file, 0, 100)
        assert size_to_give(file, os.O_RDONLY) == len(SMALL)
        file.close()

    def test_nothing_while_another_has_it_open(self, path: str) -> None:
        file = self.opened(path)
        other = OpenFile(file.inode, os.open(path, os.O_RDONLY), writable=False)
        assert size_to_give(file, os.O_RDONLY) == 0
        other.close()
        assert size_to_give(file, os.O_RDONLY) == len(SMALL)
        file.close()

    def test_nothing_of_what_may_change(self, path: str) -> None:
        file = self.opened(path)
        file.inode.upper = True
        assert size_to_give(file, os.O_RDONLY) == 0
        file.close()
