"""What mounts themselves cost: the time until one can be used, the memory of many, the CPU time of an idle one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bench_parts import processes
from bench_parts.peers import Peer
from bench_parts.rig import Mounted, Rig
from bench_parts.samples import Row, Sample, Unit
from bench_parts.scale import MIB, Scale
from bench_parts.syscalls import cpu_ns, umount2

MOUNT = Row("mount", "mount to first listing")
MOUNT_CYCLE = Row("mount-cycle", "mount, first listing, unmount")
MEMORY_EACH = Row("memory-each", "memory of each further mount", Unit.MEMORY)
IDLE = Row("idle", "an idle mount", Unit.LOAD)
_SETTLE_S = 0.3


@dataclass(frozen=True, slots=True)
class MountTime:
    """Mount, list the root directory, unmount; the program and the layers have been used before."""

    rows: tuple[Row, ...] = (MOUNT, MOUNT_CYCLE)
    once: bool = False

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        self._cycle(rig, peer)  # reads the program and the layers' roots from the disk
        return self._cycle(rig, peer)

    @staticmethod
    def _cycle(rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        with rig.directories() as at:
            before = processes.running()
            try:
                started = time.perf_counter_ns()
                peer.mount(rig.stacks.debian, at, ())
                os.listdir(at.target)
                listed = time.perf_counter_ns()
                used = sum(map(cpu_ns, processes.running() - before)) / 1e6
                unmount_started = time.perf_counter_ns()
                umount2(at.target)
                ended = time.perf_counter_ns()
            finally:
                rig.take_down(at.target, processes.running() - before)
        to_listing = (listed - started) / 1e6
        cycle = to_listing + (ended - unmount_started) / 1e6
        return {
            MOUNT.name: Sample(to_listing, server_cpu_ms=used),
            MOUNT_CYCLE.name: Sample(cycle, server_cpu_ms=used),
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """The PSS of all servers while the same image is mounted several times, each with an upper of its own.

    The root directory of each has been listed. What the kernel keeps for a mount is not in it, so the kernel's own
    overlayfs has none.
    """

    counts: tuple[int, ...]
    once: bool = True

    @property
    def rows(self) -> tuple[Row, ...]:
        rows = [Row(f"memory-{n}", f"memory of {n} mount{'s' * (n > 1)}", Unit.MEMORY) for n in self.counts]
        return (*rows, MEMORY_EACH)

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        found: dict[int, float] = {}
        with contextlib.ExitStack() as stack:
            mounts: list[Mounted] = []
            for count in range(1, max(self.counts) + 1):
                at = stack.enter_context(rig.directories())
                mount = stack.enter_context(rig.mounted(peer, rig.stacks.debian, at))
                os.listdir(mount.target)
                mounts.append(mount)
                if count in self.counts:
                    time.sleep(_SETTLE_S)
                    found[count] = processes.pss_bytes({pid for m in mounts for pid in m.server_pids}) / MIB
        first, last = min(found), max(found)
        samples = {f"memory-{count}": Sample(value) for count, value in found.items()}
        samples[MEMORY_EACH.name] = Sample((found[last] - found[first]) / max(1, last - first))
        return samples


@dataclass(frozen=True, slots=True)
class Idle:
    """The CPU time of a server that is not asked anything, in percent of one processor."""

    rows: tuple[Row, ...] = (IDLE,)
    once: bool = True

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        with rig.directories() as at, rig.mounted(peer, rig.stacks.debian, at) as mount:
            os.listdir(mount.target)
            time.sleep(_SETTLE_S)
            sample = rig.timed(mount, lambda: _sleep(rig.scale))
        return {IDLE.name: Sample(100 * sample.server_cpu_ms / sample.value, server_cpu_ms=sample.server_cpu_ms)}


def _sleep(scale: Scale) -> int:
    time.sleep(scale.idle_s)
    return 1
