"""Workloads that read and write data: large files, random access, what waits for the disk, SQLite."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Callable

from bench_parts.generated import LARGE
from bench_parts.rig import Mounted
from bench_parts.scale import MIB

_BLOCK = 4096
_SEED = 6


def read_large(mount: Mounted) -> Callable[[], int]:
    """Read a large file of a lower layer from its beginning to its end."""

    def run() -> int:
        buffer = bytearray(MIB)
        fd = os.open(mount.path(LARGE), os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)
        return mount.scale.large_bytes // MIB

    return run


def copy_up_large(mount: Mounted) -> Callable[[], int]:
    """Change one byte of a large file of a lower layer."""

    def run() -> int:
        fd = os.open(mount.path(LARGE), os.O_WRONLY)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
        return 1

    return run


def random_read(mount: Mounted) -> Callable[[], int]:
    """pread(2) of 4 KiB at random places of a file of the upper layer."""
    path, offsets = _random_file(mount)

    def run() -> int:
        fd = os.open(path, os.O_RDONLY)
        for offset in offsets:
            os.pread(fd, _BLOCK, offset)
        os.close(fd)
        return len(offsets)

    run()
    return run


def random_write(mount: Mounted) -> Callable[[], int]:
    """pwrite(2) of 4 KiB at random places of a file of the upper layer."""
    path, offsets = _random_file(mount)
    block = b"y" * _BLOCK

    def run() -> int:
        fd = os.open(path, os.O_RDWR)
        for offset in offsets:
            os.pwrite(fd, block, offset)
        os.close(fd)
        return len(offsets)

    return run


def write_large(mount: Mounted) -> Callable[[], int]:
    """Write a new large file, 1 MiB at a time, and close it; it need not reach the disk."""
    block = random.Random(_SEED).randbytes(MIB)

    def run() -> int:
        fd = os.open(mount.path("written"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        count = mount.scale.large_bytes // MIB
        for _ in range(count):
            os.write(fd, block)
        os.close(fd)
        return count

    return run


def fdatasync(mount: Mounted) -> Callable[[], int]:
    """Write 4 KiB into a file of the upper layer and wait for the disk, again and again."""
    path = mount.path("synced")
    block = b"z" * _BLOCK
    with open(path, "wb") as file:
        file.write(bytes(MIB))
        os.fsync(file.fileno())

    def run() -> int:
        fd = os.open(path, os.O_WRONLY)
        for number in range(mount.scale.syncs):
            os.pwrite(fd, block, number * _BLOCK % MIB)
            os.fdatasync(fd)
        os.close(fd)
        return mount.scale.syncs

    return run


def sqlite_commits(mount: Mounted) -> Callable[[], int]:
    """Commit single rows to an SQLite database with its default settings: rollback journal, all synced."""
    path = mount.path("database")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("create table rows (number integer primary key, text text)")

    def run() -> int:
        with contextlib.closing(sqlite3.connect(path)) as database:
            for number in range(mount.scale.commits):
                database.execute("insert into rows values (?, ?)", (number, "some text " * 10))
                database.commit()
        return mount.scale.commits

    return run


def _random_file(mount: Mounted) -> tuple[str, list[int]]:
    path = mount.path("random")
    size = mount.scale.random_file_bytes
    source = random.Random(_SEED)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(source.randbytes(MIB))
        os.fsync(file.fileno())
    return path, [source.randrange(size // _BLOCK) * _BLOCK for _ in range(mount.scale.random_operations)]
