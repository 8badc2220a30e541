"""What one run of a workload gives: one sample for each of its rows in the table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What a row's figures are."""

    TIME = "ms"
    MEMORY = "MiB"
    LOAD = "% CPU"


class Group(Enum):
    """What a row is about; each group has a table and contestants of its own."""

    MOUNTS = "mounts"
    ROOTLESS = "rootless"
    IMAGES = "images"
    DRIVERS = "drivers"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a slug for the command line, the title for people, the unit, and the table."""

    name: str
    title: str
    unit: Unit = Unit.TIME
    group: Group = Group.MOUNTS


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured figure, in its row's unit.

    ``server_cpu_ms`` is what the servers of the mount used meanwhile, ``operations`` how often the workload did what
    it is named after, ``requests`` what the kernel asked the server, by name; None when nobody counted.
    """

    value: float
    operations: int = 1
    server_cpu_ms: float = 0.0
    requests: Counter[str] | None = None
