"""The contract of a workload, and the kind that most are: something is done in a mount, and it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from bench_parts.peers import Peer
from bench_parts.rig import Mounted, Rig
from bench_parts.samples import Row, Sample


class Contestant(Protocol):
    """Who is measured: a file system that is mounted, or a program that takes an image in."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def version(self) -> str:
        """What it says about itself, for the record."""


AnyPeer_contra = TypeVar("AnyPeer_contra", bound=Contestant, contravariant=True)


class Workload(Protocol[AnyPeer_contra]):
    """Something to measure with every peer."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The lines of the table that it fills."""

    @property
    def once(self) -> bool:
        """Whether one round is enough, because the figure does not vary or takes long to get."""

    def measure(self, rig: Rig, peer: AnyPeer_contra) -> Mapping[str, Sample]:
        """Do it once. Returns a sample for each row, by the row's name."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What ``setup`` returns is timed, in a fresh mount.

    Without ``cold``, ``setup`` works in the mount: what it reads is remembered and what it writes is on disk when the
    clock starts. With it, ``setup`` runs before: only the names in the mount can be used. All caches are emptied then,
    the stack is mounted, and the clock starts.
    """

    name: str
    title: str
    stack: str
    setup: Callable[[Mounted], Callable[[], int]]
    cold: bool = False
    options: tuple[str, ...] = ()
    """Mount options for ours; the peers are mounted as ever."""
    once: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        return (Row(self.name, self.title),)

    def measure(self, rig: Rig, peer: Peer) -> Mapping[str, Sample]:
        stack = rig.stacks[self.stack]
        with rig.directories() as at:
            if self.cold:
                run = self.setup(Mounted(at.target, stack, rig.scale, frozenset()))
                rig.drop_caches()
                with rig.mounted(peer, stack, at, self.options) as mount:
                    return {self.name: rig.timed(mount, run)}
            with rig.mounted(peer, stack, at, self.options) as mount:
                run = self.setup(mount)
                rig.settle()
                return {self.name: rig.timed(mount, run)}
