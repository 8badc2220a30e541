"""Passthrough on the real kernel: every way that opens of one file can follow each other, none failing or stale.

Each test runs on the direct transport; the sandbox checks after it that no lower layer was changed.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.programs import listed_at
from tests.support.sandbox import Sandbox, needs_root
from tests.support.users import as_user

pytest_plugins = ["tests.support.sandbox"]
needs_root()

ALICE = 4001
PAGE = 4096


@contextmanager
def opened(path: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def box(direct_box: Sandbox) -> Sandbox:
    direct_box.lower().file("low", "lower data").file("big", b"a" * (4 * PAGE)).file("other", "other")
    return direct_box


def test_passthrough_is_used(box: Sandbox) -> None:
    with box.mount():
        here = listed_at(box.target)
        assert here is not None
        assert here["transport"] == "direct, passthrough"
    with box.mount("passthrough=0"):
        here = listed_at(box.target)
        assert here is not None
        assert here["transport"] == "direct"


def test_lower_readers_then_a_writer(box: Sandbox) -> None:
    with box.mount(), opened(box.at("low"), os.O_RDONLY) as reader:
        assert os.pread(reader, 100, 0) == b"lower data"
        with opened(box.at("low"), os.O_RDWR) as writer, opened(box.at("low"), os.O_RDONLY) as second:
            os.pwrite(writer, b"UPPER", 0)
            for fd in (reader, writer, second):
                assert os.pread(fd, 100, 0) == b"UPPER data"
        os.close(os.open(box.at("low"), os.O_RDWR))  # the reader is still there
        assert os.pread(reader, 100, 0) == b"UPPER data"
    with box.mount():
        assert contents(box.at("low")) == b"UPPER data"


def test_a_writer_then_readers_and_another_writer(box: Sandbox) -> None:
    with (
        box.mount(),
        opened(box.at("low"), os.O_WRONLY) as first,
        opened(box.at("low"), os.O_RDONLY) as reader,
        opened(box.at("low"), os.O_RDWR) as second,
    ):
        os.pwrite(first, b"1", 0)
        os.pwrite(second, b"2", 1)
        assert os.pread(reader, 100, 0) == b"12wer data"
        assert os.fstat(reader).st_size == 10
        os.pwrite(first, b"!", 99)
        assert os.fstat(reader).st_size == 100


def test_a_mapping_outlives_its_descriptor(box: Sandbox) -> None:
    with box.mount():
        with opened(box.at("new"), os.O_RDWR | os.O_CREAT) as fd:
            os.ftruncate(fd, PAGE)
            mapping = mmap.mmap(fd, PAGE)
        with opened(box.at("new"), os.O_RDWR) as fd:
            os.pwrite(fd, b"written", 0)
            assert mapping[:7] == b"written"
            mapping[:3] = b"MAP"
            assert os.pread(fd, 7, 0) == b"MAPtten"
        mapping.close()
    assert contents(box.in_upper("new"))[:7] == b"MAPtten"


def test_a_lower_mapping_then_a_writer(box: Sandbox) -> None:
    with box.mount():
        with opened(box.at("big"), os.O_RDONLY) as fd:
            mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        assert mapping[:4] == b"aaaa"
        with opened(box.at("big"), os.O_RDWR) as writer:
            os.pwrite(writer, b"bbbb", 0)
            assert os.pread(writer, 4, 0) == b"bbbb"
            assert mapping[:4] == b"bbbb"
        mapping.close()
        with opened(box.at("big"), os.O_RDWR) as writer:  # nobody is left: passed through from now on
            os.pwrite(writer, b"cc", 0)
            assert os.pread(writer, 5, 0) == b"ccbba"
        assert contents(box.at("big"))[:5] == b"ccbba"


@pytest.mark.parametrize("holder", [os.O_RDONLY, os.O_RDWR, None])
def test_setuid_goes_when_another_user_writes(box: Sandbox, holder: int | None) -> None:
    with box.mount():
        for name in ("low", "new"):
            with opened(box.at(name), os.O_RDWR | os.O_CREAT):
                pass
            os.chmod(box.at(name), 0o6777)
            held = None if holder is None else os.open(box.at(name), holder)

            def write(path: str = box.at(name)) -> None:
                with opened(path, os.O_WRONLY) as fd:
                    os.pwrite(fd, b"x", 0)

            write()  # by root: POSIX lets it stay, and so does the kernel
            assert stat.S_IMODE(os.stat(box.at(name)).st_mode) == 0o6777
            as_user(ALICE, write)
            assert stat.S_IMODE(os.stat(box.at(name)).st_mode) == 0o777
            if held is not None:
                os.close(held)


def test_setuid_of_a_new_file_goes_when_another_user_writes(box: Sandbox) -> None:
    with box.mount():
        before = os.umask(0)
        try:
            fd = os.open(box.at("new"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o6777)
        finally:
            os.umask(before)
        try:
            assert stat.S_IMODE(os.stat(box.at("new")).st_mode) == 0o6777
            as_user(ALICE, lambda: os.pwrite(fd, b"x", 0))
            assert stat.S_IMODE(os.stat(box.at("new")).st_mode) == 0o777
        finally:
            os.close(fd)
        assert contents(box.at("new")) == b"x"


def test_capabilities_go_when_the_file_is_written(box: Sandbox) -> None:
    with box.mount():
        os.chmod(box.at("low"), 0o777)
        subprocess.run(["setcap", "cap_net_raw+ep", box.at("low")], check=True)
        with opened(box.at("low"), os.O_WRONLY) as fd:
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError) as caught:
            os.getxattr(box.at("low"), "security.capability")
        assert caught.value.errno == errno.ENODATA


def test_direct_io_beside_other_users(box: Sandbox) -> None:
    with box.mount(), opened(box.at("big"), os.O_RDONLY) as cached:
        assert os.pread(cached, 1, 0) == b"a"
        for _ in range(2):  # beside cached ones, then beside passed-through ones
            with opened(box.at("big"), os.O_RDWR | os.O_DIRECT) as direct, mmap.mmap(-1, PAGE) as page:
                page.write(b"d" * PAGE)
                os.pwrite(direct, page, PAGE)
            assert contents(box.at("big"))[PAGE - 1 : PAGE + 1] == b"ad"
            with opened(box.at("other"), os.O_RDWR), opened(box.at("other"), os.O_RDONLY | os.O_DIRECT) as fd:
                assert os.fstat(fd).st_size == 5


def test_truncation_while_open(box: Sandbox) -> None:
    with box.mount(), opened(box.at("big"), os.O_RDWR) as fd, opened(box.at("big"), os.O_RDONLY) as reader:
        os.truncate(box.at("big"), 10)
        assert os.pread(reader, 100, 0) == b"a" * 10
        assert os.fstat(fd).st_size == os.stat(box.at("big")).st_size == 10
        os.ftruncate(fd, PAGE)
        assert os.pread(reader, 2 * PAGE, 0) == b"a" * 10 + bytes(PAGE - 10)
        with opened(box.at("big"), os.O_WRONLY | os.O_TRUNC):
            assert os.pread(reader, 100, 0) == b""
            assert os.fstat(reader).st_size == 0


@pytest.mark.parametrize("name", ["low", "new"])
def test_unlinked_while_open(box: Sandbox, name: str) -> None:
    with box.mount(), opened(box.at(name), os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"before", 0)
        os.unlink(box.at(name))
        os.pwrite(fd, b"AFTER.", 0)
        assert os.pread(fd, 6, 0) == b"AFTER."
        assert os.fstat(fd).st_nlink == 0
        with opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
            os.pwrite(again, b"again.", 0)
        assert os.pread(fd, 6, 0) == b"again."
        assert not os.path.exists(box.at(name))


def test_renamed_over_while_open(box: Sandbox) -> None:
    with box.mount(), opened(box.at("low"), os.O_RDWR) as old, opened(box.at("other"), os.O_RDWR) as new:
        os.rename(box.at("other"), box.at("low"))
        os.pwrite(old, b"OLD", 0)
        os.pwrite(new, b"NEW", 0)
        assert contents(box.at("low")) == b"NEWer"
        assert os.pread(old, 100, 0) == b"OLDer data"


def test_attributes_follow_what_the_kernel_writes(box: Sandbox) -> None:
    with box.mount(), opened(box.at("low"), os.O_RDWR | os.O_APPEND) as fd:
        before = os.stat(box.at("low"))
        os.write(fd, b"!" * PAGE)
        after = os.stat(box.at("low"))
        assert after.st_size == before.st_size + PAGE
        assert after.st_mtime_ns > before.st_mtime_ns
        assert after.st_blocks > 0
        assert os.stat(box.in_upper("low")).st_mtime_ns == after.st_mtime_ns


def test_a_volatile_mount_passes_through_too(box: Sandbox) -> None:
    with box.mount("volatile"), opened(box.at("low"), os.O_RDWR) as fd:
        here = listed_at(box.target)
        assert here is not None
        assert here["transport"] == "direct, passthrough"
        os.pwrite(fd, b"x", 0)
        os.fsync(fd)


def test_an_overlay_below_is_served_without(box: Sandbox) -> None:
    """The kernel does not pass through to a file system that is itself stacked."""
    with box.kernel() as overlay:
        upper, work = os.path.join(overlay, "upper"), os.path.join(overlay, "work")
        os.mkdir(upper)
        os.mkdir(work)
        inner = Sandbox.__new__(Sandbox)
        inner.__dict__.update(box.__dict__)
        inner.upper, inner.work, inner.target = upper, work, box.new_dir("inner")
        with inner.mount(), opened(inner.at("low"), os.O_RDWR) as fd, opened(inner.at("low"), os.O_RDONLY) as reader:
            os.pwrite(fd, b"X", 0)
            assert os.pread(reader, 100, 0) == b"Xower data"


def test_random_io_beside_readers_of_lower_files(box: Sandbox) -> None:
    """As fsx: what was written is what is read, by whomever, through copy-up, truncation and mappings."""
    count, size = 8, 64 * PAGE
    chance = random.Random(5)
    lower = box.lower()
    models = [bytearray(chance.randbytes(size)) for _ in range(count)]
    for n, model in enumerate(models):
        lower.file(f"f{n}", bytes(model))
    wrong: list[str] = []
    with box.mount():
        done = threading.Event()

        def read_on(n: int) -> None:
            # Opened before the copy-up; every byte read must have been in the file at some time: sizes only.
            with opened(box.at(f"f{n}"), os.O_RDONLY) as fd:
                while not done.is_set():
                    try:
                        os.pread(fd, PAGE, chance.randrange(size))
                    except OSError as error:
                        wrong.append(f"reader of f{n}: {error}")
                        return

        readers = [threading.Thread(target=read_on, args=(n,)) for n in range(0, count, 2)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(600):
                n = chance.randrange(count)
                model, path = models[n], box.at(f"f{n}")
                offset = chance.randrange(size)
                what = chance.choice(("write", "write", "append", "truncate", "map", "read", "read"))
                if what == "read":
                    with opened(path, os.O_RDONLY) as fd:
                        if os.pread(fd, 3 * PAGE, offset) != bytes(model[offset : offset + 3 * PAGE]):
                            wrong.append(f"f{n} at {offset} after the other operations")
                            break
                elif what == "write":
                    data = chance.randbytes(chance.randrange(1, 3 * PAGE))
                    with opened(path, os.O_RDWR) as fd:
                        os.pwrite(fd, data, offset)
                    if offset > len(model):
                        model.extend(bytes(offset - len(model)))
                    model[offset : offset + len(data)] = data
                elif what == "append":
                    data = chance.randbytes(100)
                    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
                        os.write(fd, data)
                    model.extend(data)
                elif what == "truncate":
                    os.truncate(path, offset)
                    del model[offset:]
                    model.extend(bytes(offset - len(model)))
                elif len(model) > 10:
                    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, len(model)) as mapping:
                        at = chance.randrange(len(model) - 8)
                        mapping[at : at + 8] = b"mapped!!"
                        model[at : at + 8] = b"mapped!!"
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert not wrong
        for n, model in enumerate(models):
            assert contents(box.at(f"f{n}")) == bytes(model)
    for n, model in enumerate(models):
        path = box.in_upper(f"f{n}")
        if os.path.exists(path):
            assert contents(path) == bytes(model)
