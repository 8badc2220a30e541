"""What the figures have to be (docs/performance.md, "Reading it"), and whether they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from bench_parts.mount_workloads import IDLE, MEMORY_EACH, MOUNT
from bench_parts.peers import FUSE_OVERLAYFS, KERNEL
from bench_parts.results import Results, geometric_mean
from bench_parts.rootless import PREFIX
from bench_parts.samples import Group, Unit
from bench_parts.supervised import SUPERVISED_MEMORY_EACH, SUPERVISED_MOUNT

GEOMETRIC_MEAN_LIMIT: Final = 0.5


class Against(Enum):
    """What a figure of ours is held against."""

    FUSE = FUSE_OVERLAYFS
    KERNEL = KERNEL
    OUR_ROW = "ours"  # another row of ours
    NOTHING = ""  # the figure itself, in its unit


@dataclass(frozen=True, slots=True)
class Target:
    """The ratio, or the figure itself, of ``row`` may be at most ``limit``."""

    point: int
    row: str
    against: Against
    limit: float
    other_row: str = ""

    @property
    def text(self) -> str:
        """What is asked, in a few characters."""
        if self.against is Against.NOTHING:
            return f"≤ {self.limit:g}"
        return f"≤ {self.limit:g} x {self.other_row or self.against.value}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was found, and whether that is enough; nothing found is no verdict."""

    target: Target
    value: float

    @property
    def passed(self) -> bool:
        return self.value <= self.target.limit

    @property
    def text(self) -> str:
        """PASS, or FAIL with what was found."""
        return "PASS" if self.passed else f"FAIL {self.value:.2f} ({self.target.text})"


# Starting, and copy-up of a large file, are the two exceptions of point 1. A row in which only our options differ is
# not another workload.
_NOT_AGAINST_FUSE: Final = frozenset({"mount", "mount-cycle", "mount-supervised", "copy-up", "chown-metacopy"})

_KERNEL_LIMITS: Final = {
    "random-read": 1.3,
    "random-write": 1.3,
    "read-large": 1.3,
    "write-large": 1.3,
    "fdatasync": 1.3,
    "sqlite": 1.3,
    "stat-warm": 1.5,
    "find-warm": 1.5,
    "open-warm": 5.0,
    "find-cold": 2.5,
    "stat-cold": 2.5,
    "open-cold": 2.5,
    "untar": 3.0,
    "create-unlink": 3.0,
    "git": 3.0,
    "rm": 2.0,
    "chown": 2.0,
    "chown-metacopy": 0.3,
}

TARGETS: Final = (
    Target(1, "copy-up", Against.KERNEL, 1.1),
    *(Target(2, row, Against.KERNEL, limit) for row, limit in _KERNEL_LIMITS.items()),
    Target(3, "deep-find", Against.OUR_ROW, 1.2, "find-cold"),
    Target(3, "deep-stat", Against.OUR_ROW, 1.2, "stat-cold"),
    Target(3, "deep-find", Against.KERNEL, 1.0),
    Target(3, "deep-stat", Against.KERNEL, 1.0),
    Target(4, MOUNT.name, Against.NOTHING, 150.0),
    Target(4, SUPERVISED_MOUNT.name, Against.NOTHING, 15.0),
    Target(4, MEMORY_EACH.name, Against.NOTHING, 8.0),
    Target(4, SUPERVISED_MEMORY_EACH.name, Against.NOTHING, 8.0),
    Target(4, IDLE.name, Against.NOTHING, 0.05),
)


def against_fuse(results: Results, group: Group = Group.MOUNTS) -> Iterator[str]:
    """The rows that point 1 is about, or those of rootless mounts that are held against the same."""
    for row in results.rows.values():
        if row.group is group and row.unit is Unit.TIME and row.name.removeprefix(PREFIX) not in _NOT_AGAINST_FUSE:
            yield row.name


def verdicts(results: Results, group: Group = Group.MOUNTS) -> dict[str, list[Verdict]]:
    """The verdicts on our figures, by row. A target whose figures were not measured has none.

    No target is for rootless mounts; they, too, are to be not slower than fuse-overlayfs.
    """
    found: dict[str, list[Verdict]] = {}
    targets = [Target(1, row, Against.FUSE, 1.0) for row in against_fuse(results, group)]
    if group is Group.MOUNTS:
        targets += TARGETS
    for target in targets:
        value = _value(results, target)
        if value is not None:
            found.setdefault(target.row, []).append(Verdict(target, value))
    return found


def _value(results: Results, target: Target) -> float | None:
    ours = results.ours
    if ours is None:
        return None
    if target.against is Against.NOTHING:
        return results.median(target.row, ours)
    if target.against is Against.OUR_ROW:
        value, other = results.median(target.row, ours), results.median(target.other_row, ours)
        return value / other if value is not None and other else None
    return results.ratio(target.row, ours, target.against.value)


def mean_against_fuse(
    results: Results, peer: str, *, group: Group = Group.MOUNTS, exceptions: bool = False
) -> float | None:
    """The geometric mean of a peer's ratios against fuse-overlayfs, on the rows of :func:`against_fuse`.

    ``exceptions`` adds its two exceptions: starting, and copy-up.
    """
    rows = list(against_fuse(results, group))
    if exceptions:
        rows += [name for name in ("mount", "copy-up") if name in results.rows]
    ratios = (results.ratio(row, peer, FUSE_OVERLAYFS) for row in rows)
    return geometric_mean(ratio for ratio in ratios if ratio is not None)
