"""Runs all workloads with all peers, interleaved, so that what else the machine does meets every peer alike."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from bench_parts.errors import BenchError, LayersGoneError, SkippedError
from bench_parts.requests import RequestCounter
from bench_parts.results import Results
from bench_parts.rig import Rig
from bench_parts.rootless import Rootless
from bench_parts.workload import Contestant, Timed, Workload
from quickstart_steps.progress import Step, step

AnyPeer = TypeVar("AnyPeer", bound=Contestant)


class Runner(Generic[AnyPeer]):
    """Fills ``results``; what is in there is right after every sample, also when the run is interrupted."""

    def __init__(
        self, rig: Rig, workloads: Sequence[Workload[AnyPeer]], peers: Sequence[AnyPeer], results: Results
    ) -> None:
        self._rig = rig
        self._workloads = workloads
        self._peers = peers
        self._results = results
        results.peers |= {peer.name: peer.version for peer in peers}
        results.rows |= {row.name: row for workload in workloads for row in workload.rows}

    def run(self, rounds: int) -> None:
        """Measure every workload ``rounds`` times with every peer."""
        for number in range(rounds):
            workloads = [w for w in self._workloads if number == 0 or not w.once]
            self._round(f"Round {number + 1} of {rounds}", workloads, number, self._measure)

    def count_requests(self, counter: RequestCounter) -> None:
        """Once more, without a clock, to count requests."""
        workloads = [w for w in self._workloads if isinstance(w, Timed | Rootless)]
        self._rig.counter = counter
        try:
            self._round("Counting requests", workloads, 0, self._count)
        finally:
            self._rig.counter = None

    def _round(
        self,
        title: str,
        workloads: Sequence[Workload[AnyPeer]],
        number: int,
        one: Callable[[Workload[AnyPeer], AnyPeer], None],
    ) -> None:
        with step(title, total=len(workloads) * len(self._peers)) as shown:
            for place, workload in enumerate(workloads):
                shown.detail(workload.rows[0].title)
                self._with_each_peer(workload, number + place, one, shown)

    def _with_each_peer(
        self,
        workload: Workload[AnyPeer],
        turn: int,
        one: Callable[[Workload[AnyPeer], AnyPeer], None],
        shown: Step,
    ) -> None:
        # Another one begins each time: the first finds the disk and the processor in another state.
        turn %= len(self._peers)
        for peer in (*self._peers[turn:], *self._peers[:turn]):
            try:
                one(workload, peer)
            except LayersGoneError:
                raise
            except (SkippedError, BenchError, OSError, subprocess.SubprocessError) as error:
                word = "skipped" if isinstance(error, SkippedError) else "failed"
                for row in workload.rows:
                    self._results.cell(row.name, peer.name).reason = " ".join([f"{word}:", *str(error).split()])
            shown.advance(1)

    def _measure(self, workload: Workload[AnyPeer], peer: AnyPeer) -> None:
        for name, sample in workload.measure(self._rig, peer).items():
            self._results.cell(name, peer.name).samples.append(sample)

    def _count(self, workload: Workload[AnyPeer], peer: AnyPeer) -> None:
        for name, sample in workload.measure(self._rig, peer).items():
            self._results.cell(name, peer.name).requests = sample.requests
