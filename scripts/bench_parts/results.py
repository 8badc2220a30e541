"""What a whole run found: the samples of every row and peer, their medians and ratios, as JSON and back."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench_parts.errors import BenchError
from bench_parts.peers import DIRECT, PYFUSE3
from bench_parts.samples import Group, Row, Sample, Unit

_FORMAT = 1
_COMPARABLE_US = 5000  # of a whole sample: what a scheduler's tick is to it does not matter


@dataclass(slots=True)
class Cell:
    """One row with one peer. Without samples, ``reason`` says why."""

    samples: list[Sample] = field(default_factory=list)
    requests: Counter[str] | None = None
    reason: str = ""

    @property
    def median(self) -> float | None:
        """The median of the figures."""
        return statistics.median(sample.value for sample in self.samples) if self.samples else None

    @property
    def operations(self) -> int:
        """How many operations one sample is about."""
        return max(1, self.samples[0].operations) if self.samples else 1

    @property
    def server_cpu_us(self) -> float | None:
        """Microseconds of server CPU time for an operation, the median."""
        if not self.samples:
            return None
        return 1000 * statistics.median(sample.server_cpu_ms / max(1, sample.operations) for sample in self.samples)

    @property
    def requests_each(self) -> float | None:
        """Requests to the server for an operation."""
        return None if self.requests is None else self.requests.total() / self.operations


@dataclass(slots=True)
class Results:
    """Everything that a run found."""

    machine: dict[str, str] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    """Name to version, in the order of the tables."""
    rows: dict[str, Row] = field(default_factory=dict)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def cell(self, row: str, peer: str) -> Cell:
        """The cell of a row and a peer, made when it is not there."""
        return self.cells.setdefault((row, peer), Cell())

    def median(self, row: str, peer: str) -> float | None:
        """The median of a row with a peer, or None when it was not measured."""
        cell = self.cells.get((row, peer))
        return None if cell is None else cell.median

    def ratio(self, row: str, peer: str, reference: str) -> float | None:
        """The median with ``peer`` in terms of the one with ``reference``; None when there is none to compare with."""
        value, other = self.median(row, peer), self.median(row, reference)
        if value is None or not other:
            return None
        return value / other

    def cpu_ratio(self, row: str, peer: str, reference: str) -> float | None:
        """As :meth:`ratio`, of the servers' CPU time; None also where it is too little to be compared."""
        cell, other = self.cells.get((row, peer)), self.cells.get((row, reference))
        if cell is None or other is None or not cell.server_cpu_us or not other.server_cpu_us:
            return None
        if other.server_cpu_us * other.operations < _COMPARABLE_US:
            return None
        return cell.server_cpu_us / other.server_cpu_us

    def only(self, group: Group) -> Results:
        """What is about this group: its rows, and who took part in them."""
        rows = {name: row for name, row in self.rows.items() if row.group is group}
        cells = {(row, peer): cell for (row, peer), cell in self.cells.items() if row in rows}
        there = {peer for _, peer in cells}
        return Results(self.machine, {name: self.peers[name] for name in self.peers if name in there}, rows, cells)

    @property
    def ours(self) -> str | None:
        """The peer that the targets are about: the transport that a mount chooses by itself, if it was measured."""
        return next((name for name in (DIRECT, PYFUSE3) if name in self.peers), None)

    def to_json(self) -> str:
        """All of it, with the medians for those who only read; see docs/performance.md."""
        return json.dumps(
            {
                "format": _FORMAT,
                "machine": self.machine,
                "peers": self.peers,
                "rows": [
                    {
                        "name": row.name,
                        "title": row.title,
                        "unit": row.unit.value,
                        "group": row.group.value,
                        "peers": {
                            peer: self._cell_to_json(self.cells[row.name, peer])
                            for peer in self.peers
                            if (row.name, peer) in self.cells
                        },
                    }
                    for row in self.rows.values()
                ],
            },
            indent=1,
        )

    @staticmethod
    def _cell_to_json(cell: Cell) -> dict[str, Any]:
        return {
            "median": cell.median,
            "operations": cell.operations,
            "values": [round(sample.value, 4) for sample in cell.samples],
            "server_cpu_ms": [round(sample.server_cpu_ms, 4) for sample in cell.samples],
            "requests": None if cell.requests is None else dict(cell.requests),
            "reason": cell.reason,
        }


def from_json(text: str) -> Results:
    """What :meth:`Results.to_json` wrote."""
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise BenchError(f"results of format {data['format']}, and this program reads {_FORMAT}; run it again")
        results = Results(machine=data["machine"], peers=data["peers"])
        for row in data["rows"]:
            group = Group(row.get("group", Group.MOUNTS.value))  # older files have only that one
            results.rows[row["name"]] = Row(row["name"], row["title"], Unit(row["unit"]), group)
            for peer, cell in row["peers"].items():
                samples = [
                    Sample(value, cell["operations"], cpu)
                    for value, cpu in zip(cell["values"], cell["server_cpu_ms"], strict=True)
                ]
                requests = None if cell["requests"] is None else Counter(cell["requests"])
                results.cells[row["name"], peer] = Cell(samples, requests, cell["reason"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"this is not a file that --json wrote ({type(error).__name__}: {error})") from error
    return results


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logarithms = [math.log(value) for value in values if value > 0]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None
