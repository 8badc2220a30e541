"""How much each workload does: a full run, a quick one, and one that only shows that everything works."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of all workloads. Rounds can be changed on the command line, the rest belongs together."""

    name: str
    rounds: int
    paths: int
    """Files that are looked up or opened."""
    tree_files: int
    """Files of the generated tree: rm, chown, git, untar, create."""
    large_bytes: int
    random_file_bytes: int
    random_operations: int
    syncs: int
    commits: int
    memory_mounts: tuple[int, ...]
    idle_s: float
    deep_layers: int
    empties_caches: bool = True
    """Whether the whole machine's caches are emptied before what is cold, and its disk is waited for otherwise."""
    driver_layers: int = 100
    driver_files: int = 10_000
    """Of all the layers that the graph drivers have."""


FULL = Scale("full", 5, 4000, 3000, 256 * MIB, 64 * MIB, 20_000, 200, 100, (1, 10, 100), 10.0, 120)
QUICK = Scale("quick", 2, 1000, 500, 32 * MIB, 8 * MIB, 4000, 30, 20, (1, 3, 10), 2.0, 120)
TINY = Scale(
    "tiny", 1, 20, 20, MIB, MIB, 50, 3, 2, (1, 2), 0.2, 8, empties_caches=False, driver_layers=5, driver_files=100
)

SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
