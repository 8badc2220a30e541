"""Copying data with its holes, between file systems that can and cannot help."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfs.overlay.copying import at_path, copy_attributes, copy_data, copy_times, copy_xattrs
from unionfs.overlay.format import OverlayXattrs

MIB = 1 << 20


@contextmanager
def files(source: Path, target: Path) -> Iterator[tuple[int, int]]:
    fds = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.truncate(300 * MIB)
        file.seek(100 * MIB)
        file.write(b"data")
    with files(source, target) as fds:
        copy_data(*fds, 300 * MIB)
    st = os.stat(target)
    assert st.st_size == 300 * MIB
    assert st.st_blocks * 512 <= 64 * 1024
    with open(target, "rb") as file:
        file.seek(100 * MIB - 1)
        assert file.read(6) == b"\0data\0"


def test_only_what_will_remain_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(5 * MIB))
    with files(source, target) as fds:
        copy_data(*fds, 3)
    assert target.read_bytes() == source.read_bytes()[:3]
    assert os.stat(target).st_blocks <= 16


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.EINVAL, 0])
def test_reads_and_writes_where_the_kernel_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    calls = []

    def refuse(*args: object) -> int:
        calls.append(args)
        if answer:
            raise OSError(answer, "no")
        return 0

    monkeypatch.setattr("unionfs.overlay.copying.os.copy_file_range", refuse)
    monkeypatch.setattr("unionfs.overlay.copying.syscalls.reflink", refuse_reflink)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(2 * MIB + 7))
    with files(source, target) as fds:
        copy_data(*fds, 2 * MIB + 7)
    assert calls
    assert target.read_bytes() == source.read_bytes()


def refuse_reflink(*fds: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "no")


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("unionfs.overlay.copying.os.copy_file_range", full)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x")
    with files(source, target) as fds, pytest.raises(OSError, match="full"):
        copy_data(*fds, 1)


@pytest.mark.parametrize("by_name", [False, True])
def test_attributes_of_a_name_and_of_a_descriptor(tmp_path: Path, *, by_name: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.touch()
    os.setxattr(source, "user.kept", b"value")
    os.setxattr(source, "user.overlay.origin", b"ours")
    os.chmod(source, 0o6715)
    os.utime(source, ns=(1_000_000_001, 2_000_000_002))
    original = os.stat(source)
    with files(source, target) as (source_fd, target_fd):
        directory = os.open(tmp_path, os.O_PATH)
        read = (directory, b"source") if by_name else (source_fd, b"")
        write = (directory, b"target") if by_name else (target_fd, b"")
        copy_xattrs(at_path(*read), at_path(*write), OverlayXattrs(user=True))
        copy_attributes(*write, original)
        copy_times(*write, original)
        os.close(directory)
    copy = os.stat(target)
    assert (copy.st_mode, copy.st_uid, copy.st_gid) == (original.st_mode, original.st_uid, original.st_gid)
    assert (copy.st_atime_ns, copy.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert os.listxattr(target) == ["user.kept"]


PIECES = st.lists(st.tuples(st.integers(0, 64), st.binary(min_size=1, max_size=50)), max_size=8)


@settings(max_examples=50, deadline=None)
@given(pieces=PIECES, size=st.integers(0, 300_000))
def test_any_mix_of_data_and_holes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes]], size: int
) -> None:
    directory = tmp_path_factory.mktemp("copy")
    source, target = directory / "source", directory / "target"
    with open(source, "wb") as file:
        file.truncate(size)
        for page, data in pieces:
            file.seek(page * 4096)
            file.write(data)
    whole = source.stat().st_size
    for wanted in {whole, whole // 2}:
        with files(source, target) as fds:
            copy_data(*fds, wanted)
        assert target.read_bytes() == source.read_bytes()[:wanted]
