"""Programs that are killed while they wait: they go at once, and nothing is done for them any more.

Over a fake kernel, by each transport, with copying that waits for as long as the test says.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel, FuseError, served
from tests.support.sandbox import needs_root
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import Opcode

needs_root()

_LARGE = 8 << 20  # more than is copied at once


@dataclass
class Slow:
    """A mount that copies nothing while ``stall`` is there."""

    kernel: FakeKernel
    root: Path
    direct: bool

    @property
    def stall(self) -> Path:
        return self.root / "stall"

    def open(self, name: str, program: subprocess.Popen[bytes]) -> int:
        """Let ``program`` open a lower file for writing; returns the request's number."""
        node = self.kernel.walk(name)
        self.kernel.pid = program.pid
        unique = self.kernel.send(Opcode.OPEN, node, p.OPEN_IN.pack(os.O_RDWR, 0))
        self.kernel.pid = os.getpid()
        return unique

    def answers(self, unique: int, within_s: float = 0.3) -> bool:
        """Whether a request is answered by now."""
        until = time.monotonic() + within_s
        while unique not in self.kernel.early and time.monotonic() < until:
            self.kernel.statfs()  # its answer comes with those that were sent before
            time.sleep(0.02)
        return unique in self.kernel.early

    def copies(self) -> list[str]:
        return sorted(path.name for top in ("upper", "work/work") for path in (self.root / top).iterdir())


@pytest.fixture(params=["direct", "pyfuse3"])
def slow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Slow]:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    for name in ("large", "other"):
        (tmp_path / "lower" / name).write_bytes(os.urandom(_LARGE))
    (tmp_path / "stall").touch()
    options = [f"{name}dir={tmp_path}/{name}" for name in ("lower", "upper", "work")]
    try:
        with served([*options, f"transport={request.param}"], stall=str(tmp_path / "stall")) as kernel:
            yield Slow(kernel, tmp_path, request.param == "direct")
            (tmp_path / "stall").unlink(missing_ok=True)
    finally:
        (tmp_path / "stall").unlink(missing_ok=True)


@contextmanager
def program() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def ended_by(kernel: FakeKernel, unique: int) -> int:
    with pytest.raises(FuseError) as caught:
        kernel.answer(unique)
    return caught.value.errno or 0


def test_a_killed_program_waits_for_no_copy(slow: Slow) -> None:
    with program() as child:
        unique = slow.open("large", child)
        assert not slow.answers(unique)
        child.kill()
        child.wait()
        slow.kernel.interrupt(unique)
        if slow.direct:
            assert ended_by(slow.kernel, unique) == errno.EINTR
        else:  # pyfuse3 does not say who got a signal: there the copying has to come so far as to look
            slow.stall.unlink()
            assert ended_by(slow.kernel, unique) == errno.EINTR
    slow.stall.unlink(missing_ok=True)
    handle = slow.kernel.open(slow.kernel.walk("large"), os.O_RDWR)
    slow.kernel.release(slow.kernel.walk("large"), handle)
    assert slow.copies() == ["large"]


def test_a_copy_that_nobody_waits_for_is_not_made(slow: Slow) -> None:
    with program() as child:
        unique = slow.open("large", child)
        assert not slow.answers(unique)
        child.kill()
        child.wait()
        slow.stall.unlink()
        assert ended_by(slow.kernel, unique) == errno.EINTR
    assert slow.copies() == []


def test_a_copy_is_made_for_whoever_is_left(slow: Slow) -> None:
    with program() as first, program() as second, program() as third:
        numbers = [slow.open("large", child) for child in (first, second, third)]
        assert not slow.answers(numbers[0])
        for child in (first, third):
            child.kill()
            child.wait()
        for unique in numbers:
            slow.kernel.interrupt(unique)
        assert ended_by(slow.kernel, numbers[2]) == errno.EINTR, "who waits for another's copy need not wait"
        assert not slow.answers(numbers[1])
        slow.stall.unlink()
        assert slow.kernel.answer(numbers[1])
        assert ended_by(slow.kernel, numbers[0]) == errno.EINTR
    assert slow.copies() == ["large"]


def test_a_signal_that_is_handled_ends_nothing(slow: Slow) -> None:
    """Nor does it hide the one that kills: the kernel tells of the first only."""
    with program() as child:
        unique = slow.open("large", child)
        slow.kernel.interrupt(unique)
        assert not slow.answers(unique)
        other = slow.open("other", child)
        slow.kernel.interrupt(other)
        assert not slow.answers(other)
        child.kill()
        child.wait()
        if not slow.direct:
            slow.stall.unlink()
        assert ended_by(slow.kernel, unique) == ended_by(slow.kernel, other) == errno.EINTR


def test_an_interrupted_request_that_nobody_knows(slow: Slow) -> None:
    slow.kernel.interrupt(1 << 40)
    assert slow.kernel.lookup(1, "large").node


def test_a_program_that_lives_gets_its_file(slow: Slow) -> None:
    with program() as child:
        unique = slow.open("large", child)
        slow.kernel.interrupt(unique)
        slow.stall.unlink()
        assert slow.kernel.answer(unique)
    assert slow.copies() == ["large"]
