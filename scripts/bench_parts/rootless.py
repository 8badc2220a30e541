"""The workloads once more in mounts that an ordinary user's engine would make: without any privilege on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from bench_parts.peers import Peer
from bench_parts.rig import Rig
from bench_parts.samples import Group, Row, Sample
from bench_parts.user_namespace import run_rootless
from bench_parts.workload import Timed

PREFIX: Final = "rootless-"


@dataclass(frozen=True, slots=True)
class Rootless:
    """A workload in a user namespace. The kernel's overlayfs keeps its marks in ``user.*`` attributes there."""

    privileged: Timed

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(
            replace(row, name=PREFIX + row.name, title=f"{row.title}, rootless", group=Group.ROOTLESS)
            for row in self.privileged.rows
        )

    @property
    def once(self) -> bool:
        return self.privileged.once

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        samples = run_rootless(lambda: dict(self.privileged.measure(rig, peer)))
        return {PREFIX + name: sample for name, sample in samples.items()}
