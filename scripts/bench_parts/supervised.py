"""Mounts of ours through the supervisor: what they take, and what their memory is.

The processes are counted otherwise than those of the other peers: a server is there before its mount, and another
copy of the supervisor waits afterwards.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bench_parts import processes
from bench_parts.errors import BenchError, SkippedError
from bench_parts.peers import DIRECT, Peer
from bench_parts.rig import Rig
from bench_parts.samples import Row, Sample, Unit
from bench_parts.scale import MIB
from bench_parts.syscalls import cpu_ns, umount2

SUPERVISED_MOUNT: Final = Row("mount-supervised", "mount to first listing, with the supervisor")
SUPERVISED_MEMORY_EACH: Final = Row("memory-each-supervised", "memory of each further, supervised", Unit.MEMORY)

_START_S: Final = 30.0
_SETTLE_S: Final = 0.3
_SWITCH: Final = "UNIONFS_SUPERVISOR"


@dataclass(frozen=True, slots=True)
class SupervisedMountTime:
    """Mount and list the root directory, with a copy of the supervisor that is ready."""

    rows: tuple[Row, ...] = (SUPERVISED_MOUNT,)
    once: bool = False

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        with _supervisor(peer) as supervisor, _Mounts(rig, peer, supervisor) as mounts:
            mounts.add()  # reads the program and the layers' roots from the disk
            return {SUPERVISED_MOUNT.name: mounts.add()}


@dataclass(frozen=True, slots=True)
class SupervisedMemory:
    """The PSS of the supervisor, the copy that waits, and all servers while an image is mounted several times."""

    counts: tuple[int, ...]
    once: bool = True

    @property
    def rows(self) -> tuple[Row, ...]:
        named = ((count, f"{count} mount{'s' * (count > 1)}") for count in self.counts)
        rows = [Row(f"memory-{n}-supervised", f"memory of {name}, supervised", Unit.MEMORY) for n, name in named]
        return (*rows, SUPERVISED_MEMORY_EACH)

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        found: dict[int, float] = {}
        with _supervisor(peer) as supervisor, _Mounts(rig, peer, supervisor) as mounts:
            for count in range(1, max(self.counts) + 1):
                mounts.add()
                if count in self.counts:
                    time.sleep(_SETTLE_S)
                    found[count] = processes.pss_bytes({supervisor, *_children(supervisor)}) / MIB
        first, last = min(found), max(found)
        samples = {f"memory-{count}-supervised": Sample(value) for count, value in found.items()}
        samples[SUPERVISED_MEMORY_EACH.name] = Sample((found[last] - found[first]) / max(1, last - first))
        return samples


class _Mounts(contextlib.ExitStack):
    """Mounts of one image that are taken down together."""

    def __init__(self, rig: Rig, peer: Peer, supervisor: int) -> None:
        super().__init__()
        self._rig = rig
        self._peer = peer
        self._supervisor = supervisor

    def add(self) -> Sample:
        """One more mount, listed; the time for both."""
        at = self.enter_context(self._rig.directories())
        if not processes.wait_until(lambda: bool(_children(self._supervisor)), _START_S):
            raise BenchError("the supervisor keeps no server ready; run: unionfs serve supervisor")
        time.sleep(_SETTLE_S)  # the copy rehearses
        server = _children(self._supervisor)[-1]
        used = cpu_ns(server)
        started = time.perf_counter_ns()
        self._peer.mount(self._rig.stacks.debian, at, ())
        self.callback(self._take_down, at.target, server)
        os.listdir(at.target)
        taken = time.perf_counter_ns() - started
        used = cpu_ns(server) - used
        if used == 0:
            raise BenchError(f"the mount on {at.target} is not the supervisor's; was the code changed meanwhile?")
        return Sample(taken / 1e6, server_cpu_ms=used / 1e6)

    @staticmethod
    def _take_down(target: str, server: int) -> None:
        umount2(target)
        processes.wait_for_end({server}, _START_S)


@contextlib.contextmanager
def _supervisor(peer: Peer) -> Iterator[int]:
    """A supervisor that the peer's program uses; its process id."""
    if peer.name != DIRECT:
        raise SkippedError("the supervisor is for our direct transport")
    with tempfile.TemporaryDirectory(prefix="unionfs-bench-") as directory:
        path = os.path.join(directory, "supervisor.sock")
        program = os.path.join(os.path.dirname(sys.executable), "unionfs")
        process = subprocess.Popen(
            [program, "serve", "supervisor", "--socket", path], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = path
        try:
            if not processes.wait_until(lambda: os.path.exists(path) and bool(_children(process.pid)), _START_S):
                raise BenchError("the supervisor does not start; run: unionfs serve supervisor")
            yield process.pid
        finally:
            if before is None:
                del os.environ[_SWITCH]
            else:
                os.environ[_SWITCH] = before
            process.terminate()
            process.wait()


def _children(pid: int) -> list[int]:
    """The supervisor's copies, the one that was made last at the end."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]
