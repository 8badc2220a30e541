"""Where workloads are measured: fresh mounts of a stack with each peer, empty caches, and the clock."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench_parts import processes
from bench_parts.errors import BenchError, LayersGoneError
from bench_parts.peers import Directories, Peer
from bench_parts.requests import RequestCounter
from bench_parts.samples import Sample
from bench_parts.scale import Scale
from bench_parts.stacks import Stack, Stacks
from bench_parts.syscalls import MNT_DETACH, cpu_ns, spread_subdirectories, umount2, unmount_below
from quickstart_steps.storage import remove_tree

_BUSY_S = 5.0
_SERVER_END_S = 60.0
# A server that does not answer is killed, so that whoever waits for it gets an error.
_WATCHDOG_S = 600.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount in place: where, what is in it, and who serves it."""

    target: str
    stack: Stack
    scale: Scale
    server_pids: frozenset[int]

    def path(self, name: str) -> str:
        """A path of the stack in this mount."""
        return os.path.join(self.target, name)


class Rig:
    """Makes mounts in ``directory``, and measures what is done in them."""

    def __init__(self, directory: str, stacks: Stacks, scale: Scale) -> None:
        self.stacks = stacks
        self.scale = scale
        self.counter: RequestCounter | None = None
        """When set, requests are counted, and times are not to be trusted."""
        self._directory = directory
        # An ext4 without a journal does not use an inode again within a minute, and looks for others in vain
        # meanwhile: whoever comes next would pay for thousands that were just removed, if his files were near them.
        spread_subdirectories(directory)

    def _fresh_name(self) -> str:
        # ext4 places a directory by its name, and a child process of ours does not know which were used.
        return os.path.join(self._directory, os.urandom(4).hex())

    @contextlib.contextmanager
    def directories(self) -> Iterator[Directories]:
        """A fresh upper, work and target directory; removed afterwards."""
        base = self._fresh_name()
        made = Directories(*(os.path.join(base, name) for name in ("upper", "work", "merged")))
        for path in (made.upper, made.work, made.target):
            os.makedirs(path)
        try:
            yield made
        finally:
            if os.path.ismount(made.target):
                raise BenchError(f"{made.target} is still mounted; what is in {base} is kept")
            remove_tree(base)

    @contextlib.contextmanager
    def empty_directory(self) -> Iterator[str]:
        """A fresh directory of a short name. What is mounted in it is unmounted, and the files are removed."""
        path = self._fresh_name()
        os.mkdir(path)
        try:
            yield path
        finally:
            unmount_below(path)
            remove_tree(path)

    @contextlib.contextmanager
    def mounted(self, peer: Peer, stack: Stack, at: Directories, options: Sequence[str] = ()) -> Iterator[Mounted]:
        """``stack`` mounted by ``peer``; taken down again, and its servers ended."""
        if not os.path.isdir(stack.layers[-1]):
            raise LayersGoneError(f"{stack.layers[-1]} was removed while it was measured; run it again")
        before = processes.running()
        try:
            peer.mount(stack, at, options if peer.is_ours else ())
            # Our process namespace holds nobody else, so what is new serves this mount.
            pids = frozenset(processes.running() - before)
            watchdog = threading.Timer(_WATCHDOG_S, _kill, [pids])
            watchdog.daemon = True
            watchdog.start()
            try:
                yield Mounted(at.target, stack, self.scale, pids)
            finally:
                watchdog.cancel()
        finally:
            self.take_down(at.target, processes.running() - before)

    def take_down(self, target: str, pids: set[int]) -> None:
        """Unmount, if it is mounted, and see the servers end."""

        def unmounted() -> bool:
            try:
                umount2(target)
            except OSError:
                return not os.path.ismount(target) and not _is_dead_mount(target)
            return True

        if not processes.wait_until(unmounted, _BUSY_S):
            with contextlib.suppress(OSError):
                umount2(target, MNT_DETACH)
        if not processes.wait_for_end(pids, _SERVER_END_S):
            print(f"bench: the server of {target} did not end after its mount and was killed", file=sys.stderr)

    def drop_caches(self) -> None:
        """Forget what the kernel remembers of files, names and attributes; what is not on disk yet is written."""
        if not self.scale.empties_caches:
            return
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")

    def settle(self) -> None:
        """Write what has been prepared to the disk, so that this does not go on while something is measured."""
        if self.scale.empties_caches:
            os.sync()

    def timed(self, mount: Mounted, run: Callable[[], int]) -> Sample:
        """Measure ``run``, which returns how many operations it did."""
        requests: Counter[str] | None = None
        with contextlib.ExitStack() as stack:
            if self.counter is not None and mount.server_pids:
                requests = Counter()
                stack.enter_context(self.counter.counting(mount.target, requests))
            gc.collect()
            gc.disable()
            stack.callback(gc.enable)
            used = sum(map(cpu_ns, mount.server_pids))
            started = time.perf_counter_ns()
            operations = run()
            taken = time.perf_counter_ns() - started
            used = sum(map(cpu_ns, mount.server_pids)) - used
        return Sample(taken / 1e6, operations, used / 1e6, requests)


def _is_dead_mount(target: str) -> bool:
    try:
        os.stat(target)
    except OSError:
        return True
    return False


def _kill(pids: frozenset[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
