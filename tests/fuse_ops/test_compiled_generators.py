"""What is thrown into a compiled generator comes out of it, wherever it yields, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.compiled import compiled_sources, generators
from tests.support.trees import open_union
from unionfs.fuse_ops import quota
from unionfs.fuse_ops.tree.inodes import as_directory

if os.geteuid() != 0:
    pytest.skip("needs root for trusted attributes", allow_module_level=True)


class Rig:
    """A limited tree with a merged directory, and files for what is asked of files."""

    def __init__(self, path: Path) -> None:
        for name in ("low1/d", "low2/d", "upper/d", "work", "acl"):
            (path / name).mkdir(parents=True)
        (path / "low1/d/one").write_text("1")
        (path / "low2/d/two").write_text("2")
        (path / "upper/d/three").write_text("3")
        (path / "upper/plain").mkdir()
        (path / "upper/plain/file").write_text("3")
        self.tree = tree = open_union(path, "low1", "low2", quota_bytes=1 << 30)
        self.merged, self.plain = (as_directory(tree.lookup(tree.root, name)) for name in (b"d", b"plain"))
        self.upper_file = tree.lookup(self.merged, b"three")
        self.path_fd = os.open(path / "acl", os.O_RDONLY)
        os.setxattr(self.path_fd, "system.posix_acl_default", _acl())
        self.file_fd = os.open(path / "extents", os.O_RDWR | os.O_CREAT)
        self.memory_fd = os.memfd_create("unionfs-test")  # has no extents to tell
        for fd in (self.file_fd, self.memory_fd):
            for offset in (0, 1 << 20):
                os.pwrite(fd, b"x" * 4096, offset)
            os.fsync(fd)

    def close(self) -> None:
        for fd in (self.path_fd, self.file_fd, self.memory_fd):
            os.close(fd)
        self.tree.close()


def _acl() -> bytes:
    """A default ACL with one named user."""
    entries = [(0x01, 7, -1), (0x02, 5, 1000), (0x04, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
    return b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + owner.to_bytes(4, "little", signed=True)
        for tag, bits, owner in entries
    )


Made = Iterator[Any] | AbstractContextManager[Any]

# For each generator ways to make it that lead to all places where it yields.
MAKERS: dict[str, list[Callable[[Rig], Made]]] = {
    "_allocated": [
        lambda rig: quota._allocated(rig.file_fd, 0, 2 << 20),
        lambda rig: quota._allocated(rig.memory_fd, 0, 2 << 20),
    ],
    "_data": [lambda rig: quota._data(rig.file_fd, 0, 2 << 20)],
    "staging": [
        lambda rig: rig.tree.copy_up.require_writable().staging(rig.tree.view.upper_dir_fd(rig.plain)),
        lambda rig: rig.tree.copy_up.require_writable().staging(rig.path_fd),
    ],
}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def _yielding() -> dict[str, set[int]]:
    """The compiled generators, with the lines at which they yield."""
    return {name: lines for source in compiled_sources() for name, lines in generators(source).items()}


def test_there_is_a_way_to_make_each_of_them() -> None:
    assert set(_yielding()) == set(MAKERS)


def _generator(made: Made) -> Generator[Any, None, None]:
    """The generator itself, also of what contextlib has wrapped."""
    return cast("Generator[Any, None, None]", getattr(made, "gen", made))


def _advanced(make: Callable[[Rig], Made], rig: Rig, steps: int) -> Generator[Any, None, None]:
    generator = _generator(make(rig))
    for _ in range(steps):
        next(generator)
    return generator


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, makers in MAKERS.items() for number in range(len(makers))]
)
def test_what_is_thrown_in_comes_out(rig: Rig, name: str, number: int) -> None:
    make = MAKERS[name][number]
    length = sum(1 for _ in _generator(make(rig)))
    assert length
    for steps in range(1, length + 1):
        descriptors, left = os.listdir("/proc/self/fd"), os.listdir(rig.tree.copy_up.require_writable().work_fd)
        thrown = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        outer = KeyError("being handled meanwhile")
        try:
            raise outer
        except KeyError:
            generator = _advanced(make, rig, steps)
            assert sys.exc_info()[1] is outer, "while it waits, its caller's exception is another one"
            with pytest.raises(OSError) as raised:
                generator.throw(thrown)
            assert raised.value is thrown
            assert sys.exc_info()[1] is outer
            _advanced(make, rig, steps).close()
            assert sys.exc_info()[1] is outer
        assert sys.exc_info()[1] is None
        del raised, generator
        assert os.listdir("/proc/self/fd") == descriptors
        assert os.listdir(rig.tree.copy_up.require_writable().work_fd) == left


@pytest.mark.disk
@pytest.mark.parametrize("name", MAKERS)
def test_they_are_stopped_at_each_place_where_they_yield(rig: Rig, name: str) -> None:
    """What the other test does is only known where Python tells the line, which compiled code does not."""
    stopped: set[int] = set()
    for make in MAKERS[name]:
        generator = _generator(make(rig))
        if not hasattr(generator, "gi_frame"):
            return
        for _ in generator:
            stopped.add(generator.gi_frame.f_lineno)
    assert stopped == _yielding()[name]
