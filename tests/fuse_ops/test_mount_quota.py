"""``-o quota=BYTES``: the upper directory holds no more, and df says so."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mounts import MountFailedError, mounted_image, mounted_tmpfs, wait_until
from tests.support.sandbox import Sandbox, needs_root
from tests.support.usage import is_counted, taken_bytes, used_bytes

pytest_plugins = ["tests.support.sandbox"]
needs_root()

MIB = 1 << 20
LIMIT = 4 * MIB
QUOTA = f"quota={LIMIT}"
KEEP_SIZE, PUNCH_HOLE = 1, 2


def places(box: Sandbox) -> tuple[str, str]:
    """The directories that count."""
    assert box.upper is not None
    assert box.work is not None
    return box.upper, box.work + "/work"  # the outer work directory is the caller's


def on_disk(box: Sandbox) -> int:
    """What is taken."""
    return taken_bytes(*places(box))[0]


def shown(box: Sandbox) -> tuple[int, int]:
    """Size and used bytes, as df(1) shows them."""
    st = os.statvfs(box.target)
    return st.f_blocks * st.f_frsize, used_bytes(box.target)


def counted(box: Sandbox) -> bool:
    """Whether df shows what is on the disk."""
    return is_counted(box.target, *places(box))


def assert_counted(box: Sandbox) -> None:
    assert counted(box), (shown(box), taken_bytes(*places(box)))


def error_of(function: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        function()
    assert caught.value.errno is not None
    return caught.value.errno


def fill(path: str, piece: int = 256 << 10) -> int:
    """Write to a new file until it is refused, and return how much it took; only ENOSPC is a refusal."""
    written = 0
    with open(path, "wb", buffering=0) as file:
        while written < 100 * MIB:
            try:
                written += file.write(bytes(piece))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
    return written


def test_writes_end_at_the_limit(box: Sandbox) -> None:
    box.lower().file("f", "x")
    with box.mount(QUOTA):
        size, before = shown(box)
        assert size == LIMIT
        written = fill(box.at("big"))
        assert written == LIMIT - before  # to the last block
        assert shown(box) == (LIMIT, LIMIT)
        assert os.stat(box.at("big")).st_size == written
        # What the program was told is what is there, also on disk.
        fd = os.open(box.at("big"), os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        assert_counted(box)
        df = subprocess.run(["df", "--output=size,used,avail", "-B1", box.target], check=True, capture_output=True)
        assert [int(word) for word in df.stdout.split()[-3:]] == [LIMIT, LIMIT, 0]
        os.unlink(box.at("big"))
        assert wait_until(lambda: shown(box)[1] == before, 10)
        assert fill(box.at("again")) == written


def test_small_and_odd_writes_at_the_limit(box: Sandbox) -> None:
    box.lower()
    with box.mount(QUOTA):
        free = LIMIT - shown(box)[1] - 4096  # one block for the second file
        assert fill(box.at("big"), piece=300_001) == free + 4096
        os.truncate(box.at("big"), free - 100)
        assert shown(box)[1] <= LIMIT - 4096
        with open(box.at("small"), "wb", buffering=0) as file:
            assert sum(file.write(b"x" * 100) for _ in range(40)) == 4000
            assert file.write(b"x" * 1000) == 96  # the end of its block
            assert error_of(lambda: file.write(b"x")) == errno.ENOSPC
        with open(box.at("big"), "r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            assert file.write(b"y" * 500) == 100  # its last block has this much room
            # What is there may be written anew, whatever it is.
            file.seek(0)
            assert file.write(b"z" * 300_000) == 300_000
        assert shown(box)[1] == LIMIT
        assert_counted(box)


def test_nothing_new_at_the_limit_but_removal(box: Sandbox) -> None:
    low = box.lower().file("d/e/f", "x" * 5000).file("g", "y" * 100).file("h", "z")
    with box.mount(QUOTA):
        fill(box.at("big"))
        refused: list[Callable[[], object]] = [
            lambda: os.mkdir(box.at("dir")),
            lambda: os.symlink("t" * 200, box.at("link")),
            lambda: os.mkfifo(box.at("fifo")),
            lambda: os.close(os.open(box.at("new"), os.O_CREAT | os.O_WRONLY)),
            lambda: os.link(box.at("big"), box.at("second")),
            lambda: os.close(os.open(box.at("g"), os.O_WRONLY)),
            lambda: os.chmod(box.at("d/e/f"), 0o600),
            lambda: os.setxattr(box.at("big"), "user.x", b"1" * 3000),
            lambda: os.rename(box.at("g"), box.at("moved")),
        ]
        for number, attempt in enumerate(refused):
            assert error_of(attempt) == errno.ENOSPC, number
        # Nothing was half done.
        assert sorted(os.listdir(box.target)) == ["big", "d", "g", "h"]
        assert sorted(os.listdir(box.in_upper())) == ["big"]
        assert os.stat(box.at("d/e/f")).st_mode & 0o777 == 0o644
        # Whoever wants to make room can.
        os.unlink(box.at("h"))
        os.unlink(box.at("d/e/f"))
        os.rename(box.at("big"), box.at("big2"))
        os.truncate(box.at("big2"), MIB)
        os.chmod(box.at("g"), 0o600)
        os.unlink(box.at("big2"))
        assert_counted(box)
    assert os.path.exists(low.at("h"))
    box.assert_kernel_agrees()


def test_copy_up_needs_room(box: Sandbox) -> None:
    box.lower().file("big", os.urandom(3 * MIB)).file("small", b"s" * 5000).sparse("sparse", 1 << 30, MIB, b"data")
    with box.mount(QUOTA):
        with open(box.at("sparse"), "r+b") as file:  # a gigabyte of holes takes a block
            file.write(b"1")
        assert shown(box)[1] < MIB
        with open(box.at("half"), "wb") as file:
            file.write(bytes(2 * MIB))
        used = shown(box)[1]
        assert error_of(lambda: os.close(os.open(box.at("big"), os.O_RDWR))) == errno.ENOSPC
        assert shown(box)[1] == used
        assert not os.path.lexists(box.in_upper("big"))
        assert box.work is not None
        assert [name for name in os.listdir(box.work + "/work") if os.stat(f"{box.work}/work/{name}").st_blocks] == []
        os.close(os.open(box.at("small"), os.O_RDWR))
        assert shown(box)[1] == used + 8192
        os.close(os.open(box.at("big"), os.O_RDWR | os.O_TRUNC))  # copies nothing
        assert_counted(box)
        os.unlink(box.at("half"))
    with box.mount(QUOTA, "metacopy=on"):
        assert_counted(box)


@pytest.mark.disk
def test_copies_at_the_same_time_do_not_share_the_room(box: Sandbox) -> None:
    low = box.lower()
    for number in range(8):
        low.file(f"f{number}", os.urandom(MIB))
    with box.mount(QUOTA):
        results: list[int] = []

        def copy(number: int) -> None:
            try:
                os.close(os.open(box.at(f"f{number}"), os.O_RDWR))
                results.append(0)
            except OSError as error:
                assert error.errno is not None
                results.append(error.errno)

        threads = [threading.Thread(target=copy, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [0] * 3 + [errno.ENOSPC] * 5
        assert_counted(box)
        assert on_disk(box) <= LIMIT


def test_unlinked_files_count_until_closed(box: Sandbox) -> None:
    box.lower().file("low", b"l" * 5000)
    with box.mount(QUOTA):
        before = shown(box)[1]
        with open(box.at("f"), "w+b", buffering=0) as file:
            file.write(bytes(MIB))
            os.unlink(box.at("f"))
            assert shown(box)[1] == before + MIB
            file.write(bytes(MIB))
            assert shown(box)[1] == before + 2 * MIB
            with open(box.at("g"), "w+b", buffering=0) as other:
                other.write(bytes(MIB))
                os.rename(box.at("low"), box.at("g"))
                assert shown(box)[1] >= before + 3 * MIB
        assert wait_until(lambda: counted(box), 10)
        assert shown(box)[1] < before + MIB


def test_unnamed_files(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower()
    with box.mount(QUOTA):
        before = shown(box)[1]
        fd = os.open(box.target, os.O_TMPFILE | os.O_RDWR)
        os.write(fd, bytes(MIB))
        assert shown(box)[1] == before + MIB
        directory = os.open(box.target, os.O_PATH)
        os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=directory)
        os.close(directory)
        os.close(fd)
        assert shown(box)[1] == before + MIB
        os.close(os.open(box.target, os.O_TMPFILE | os.O_RDWR))
        with open(os.open(box.target, os.O_TMPFILE | os.O_RDWR), "wb") as file:
            file.write(bytes(MIB))
        assert wait_until(lambda: shown(box)[1] == before + MIB, 10)
        assert_counted(box)


def test_hard_links_count_once(box: Sandbox) -> None:
    box.lower().file("a", os.urandom(MIB)).link("b", "a").link("c", "a")
    with box.mount(QUOTA):
        before = shown(box)[1]
        for name in "abc":
            os.chmod(box.at(name), 0o600)
        os.link(box.at("a"), box.at("d"))
        assert shown(box)[1] == before + MIB
        os.unlink(box.at("a"))
        os.unlink(box.at("d"))
        os.unlink(box.at("b"))
        assert shown(box)[1] == before + MIB
        with open(box.at("c"), "rb") as file:
            os.unlink(box.at("c"))
            assert len(file.read()) == MIB
            assert shown(box)[1] == before + MIB
        assert wait_until(lambda: shown(box)[1] == before, 10)
        with open(box.at("x"), "wb") as file:
            file.write(bytes(MIB))
        os.link(box.at("x"), box.at("y"))
        assert_counted(box)
    with box.mount(QUOTA):
        assert_counted(box)
        os.unlink(box.at("x"))
        assert_counted(box)
        os.unlink(box.at("y"))
        assert wait_until(lambda: counted(box), 10)
        assert shown(box)[1] < MIB


def test_sparse_files_and_holes(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower()
    with box.mount(QUOTA):
        before = shown(box)[1]
        fd = os.open(box.at("f"), os.O_CREAT | os.O_RDWR)
        os.ftruncate(fd, 1 << 40)
        assert shown(box)[1] == before
        os.pwrite(fd, b"x" * 100, 1 << 30)
        assert shown(box)[1] == before + 4096
        os.ftruncate(fd, 100)
        assert wait_until(lambda: shown(box)[1] == before, 10)
        os.posix_fallocate(fd, 0, MIB)
        assert_counted(box)
        used = shown(box)[1]
        assert used >= before + MIB
        assert error_of(lambda: os.posix_fallocate(fd, 0, 5 * MIB)) == errno.ENOSPC
        assert shown(box)[1] == used
        fill(box.at("rest"))
        os.posix_fallocate(fd, 0, MIB)  # nothing to do
        assert os.pwrite(fd, b"p" * MIB, 0) == MIB  # that is what it was allocated for
        assert error_of(lambda: os.pwrite(fd, b"p", MIB)) == errno.ENOSPC
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", str(MIB), box.at("f")], check=True)
        assert os.statvfs(box.target).f_bfree * 4096 >= MIB
        assert os.pwrite(fd, b"p", MIB) == 1
        os.close(fd)
        assert_counted(box)


@pytest.mark.disk
def test_allocation_beyond_the_end_counts(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower()
    with box.mount(QUOTA):
        before = shown(box)[1]
        with open(box.at("f"), "wb"):
            pass
        subprocess.run(["fallocate", "-n", "-l", str(2 * MIB), box.at("f")], check=True)
        assert shown(box)[1] == before + 2 * MIB
        assert subprocess.run(["fallocate", "-n", "-l", str(9 * MIB), box.at("f")], stderr=-3, check=False).returncode
        assert fill(box.at("rest")) == LIMIT - before - 2 * MIB
        with open(box.at("f"), "r+b", buffering=0) as file:
            assert file.write(bytes(MIB)) == MIB
        assert_counted(box)
    with box.mount(QUOTA):
        assert shown(box)[1] == LIMIT


def test_copying_in_the_kernel(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower()
    with box.mount(QUOTA):
        with open(box.at("a"), "wb") as file:
            file.write(os.urandom(3 * MIB))
        free = LIMIT - shown(box)[1]
        with open(box.at("a"), "rb") as source, open(box.at("b"), "wb") as target:
            copied = 0
            with pytest.raises(OSError) as caught:
                while copied < 3 * MIB:
                    copied += os.copy_file_range(source.fileno(), target.fileno(), 3 * MIB - copied)
        assert caught.value.errno == errno.ENOSPC
        assert copied == free
        assert_counted(box)


def test_written_through_a_mapping(box: Sandbox) -> None:
    """What cannot be kept is told by fsync(2); nothing beyond the limit gets to the disk."""
    box.lower()
    with box.mount(QUOTA), open(box.at("f"), "w+b") as file:
        file.truncate(8 * MIB)
        with mmap.mmap(file.fileno(), 8 * MIB) as mapped:
            mapped[:MIB] = b"m" * MIB
            mapped.flush()
            assert shown(box)[1] >= MIB
            mapped[:] = b"n" * (8 * MIB)
            assert error_of(mapped.flush) in (errno.ENOSPC, errno.EIO)
        assert on_disk(box) <= LIMIT
        assert_counted(box)


def test_the_limit_survives_a_remount_and_can_be_raised(box: Sandbox) -> None:
    box.lower()
    with box.mount(QUOTA):
        fill(box.at("f"))
    with box.mount(QUOTA):
        assert shown(box) == (LIMIT, LIMIT)
        assert error_of(lambda: os.mkdir(box.at("d"))) == errno.ENOSPC
    with box.mount(f"quota={2 * LIMIT}"):
        assert shown(box) == (2 * LIMIT, LIMIT)
        assert fill(box.at("g")) == LIMIT
    with box.mount(QUOTA):  # lowered below what is there
        assert shown(box)[0] == LIMIT
        assert os.statvfs(box.target).f_bfree == 0
        assert error_of(lambda: os.mkdir(box.at("d"))) == errno.ENOSPC
        with open(box.at("g"), "r+b") as file:
            assert file.write(b"anew") == 4
        os.unlink(box.at("g"))
        os.unlink(box.at("f"))
        assert wait_until(lambda: counted(box), 10)  # the last close is told a little later
        os.mkdir(box.at("d"))
    with box.mount():  # without a limit
        assert shown(box)[0] > 100 * LIMIT
        assert fill(box.at("f")) > LIMIT


def test_what_a_dead_server_left_counts_once(box: Sandbox) -> None:
    box.lower().file("low", b"l" * MIB)
    assert box.work is not None
    os.makedirs(box.work + "/work/left")
    Path(box.work, "work/left/over").write_bytes(bytes(3 * MIB))
    with box.mount("volatile", QUOTA):
        assert_counted(box)  # it is gone
        with open(box.at("f"), "wb") as file:
            file.write(bytes(3 * MIB + 65536))
        assert_counted(box)
        assert error_of(lambda: os.close(os.open(box.at("low"), os.O_RDWR))) == errno.ENOSPC


@pytest.fixture
def memory_box(box: Sandbox) -> Iterator[Sandbox]:
    """With an upper directory in memory, where every block is known at once."""
    with mounted_tmpfs(os.path.join(box.root, "memory")) as where:
        box.upper, box.work = f"{where}/upper", f"{where}/work"
        os.mkdir(box.upper)
        os.mkdir(box.work)
        yield box


def test_many_random_changes_are_counted(memory_box: Sandbox) -> None:
    """After each round the count is what is there, and after a remount it still is."""
    box = memory_box
    low = box.lower()
    for number in range(20):
        low.file(f"d{number % 4}/f{number}", b"x" * number * 3000)
    rng = random.Random(5)

    def change(number: int) -> None:
        path, other = (box.at(f"d{rng.randrange(4)}/f{rng.randrange(30)}") for _ in range(2))
        match rng.randrange(9):
            case 0 | 1:
                with open(path, "ab") as file:
                    file.write(bytes(rng.randrange(60_000)))
            case 2:
                os.truncate(path, rng.randrange(50_000))
            case 3:
                os.unlink(path)
            case 4:
                os.rename(path, other)
            case 5:
                os.link(path, other)
            case 6:
                os.symlink("s" * rng.choice([10, 100]), path)
            case 7:
                os.setxattr(path, f"user.{number}", os.urandom(rng.choice([10, 2000])))
            case 8:
                os.rename(path, box.at(f"d{rng.randrange(4)}/n{number}"))

    for _ in range(3):
        with box.mount(QUOTA):
            assert shown(box)[1] == on_disk(box)
            for number in range(150):
                try:
                    change(number)
                except OSError as error:
                    assert error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOSPC, errno.EINVAL, errno.ELOOP, 95, 1)
            assert wait_until(lambda: shown(box)[1] == on_disk(box), 10), (shown(box)[1], on_disk(box))
            assert on_disk(box) <= LIMIT
    box.assert_kernel_agrees()


def test_removed_trees_are_given_back(box: Sandbox) -> None:
    low = box.lower()
    for number in range(50):
        low.file(f"t/{number}/f", b"1" * 5000)
    with box.mount(QUOTA):
        before = shown(box)[1]
        subprocess.run(["cp", "-a", box.at("t"), box.at("copy")], check=True)
        for number in range(50):
            os.chmod(box.at(f"t/{number}/f"), 0o600)
        assert shown(box)[1] > before + 100 * 4096
        subprocess.run(["rm", "-r", box.at("copy"), box.at("t")], check=True)
        assert wait_until(lambda: counted(box), 10)
        assert shown(box)[1] <= before + 8192


@pytest.mark.parametrize("fstype", ["xfs", "tmpfs"])
def test_on_other_file_systems(box: Sandbox, fstype: str) -> None:
    """XFS allocates more than is written; this is not held against the program."""
    box.lower().file("f", b"f" * 5000)
    where = os.path.join(box.root, "fs")
    with (
        mounted_image(os.path.join(box.root, "image"), where, "xfs", 320 * MIB)
        if fstype == "xfs"
        else mounted_tmpfs(where)
    ):
        box.upper, box.work = os.path.join(where, "upper"), os.path.join(where, "work")
        os.mkdir(box.upper)
        os.mkdir(box.work)
        with box.mount(f"quota={40 * MIB}"):
            before = shown(box)[1]
            assert fill(box.at("big")) == 40 * MIB - before
            assert shown(box)[1] == 40 * MIB
            os.truncate(box.at("big"), 20 * MIB)
            os.chmod(box.at("f"), 0o600)
            assert shown(box)[1] == before + 20 * MIB + 8192
            os.unlink(box.at("big"))
            assert wait_until(lambda: shown(box)[1] == before + 8192, 10)


def test_room_that_others_made_is_found(box: Sandbox) -> None:
    """Another mount of the same directories, as ``docker cp`` makes them, removes a file."""
    box.lower()
    with box.mount(QUOTA):
        fill(box.at("f"))
        with open(box.in_upper("f"), "r+b") as file:
            file.truncate(MIB)

        def has_room() -> bool:
            with contextlib.suppress(OSError):
                os.mkdir(box.at("d"))
            return os.path.isdir(box.at("d"))

        assert wait_until(has_room, 60)  # it does not look all the time
        assert fill(box.at("g")) > 2 * MIB


@pytest.mark.parametrize("value", ["abc", "-1", "10Q", "", "0x10", "G", "9" * 30])
def test_wrong_values_are_one_line(direct_box: Sandbox, value: str) -> None:
    direct_box.lower()
    with pytest.raises(MountFailedError) as caught, direct_box.mount(f"quota={value}"):
        pass
    assert caught.value.returncode == 1
    assert caught.value.stderr.count("\n") == 1
    assert f"option quota={value}" in caught.value.stderr


@pytest.mark.parametrize("word", ["writeback=1", "passthrough=1"])
def test_what_would_go_round_the_limit_is_refused(direct_box: Sandbox, word: str) -> None:
    direct_box.lower()
    with pytest.raises(MountFailedError, match="exclude each other"), direct_box.mount(QUOTA, word):
        pass
