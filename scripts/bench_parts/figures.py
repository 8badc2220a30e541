"""Turns results into the cells of tables: the same text for a terminal and for the documents."""

from __future__ import annotations

from dataclasses import dataclass

from bench_parts import driver_calls
from bench_parts.peers import DIRECT, FUSE_OVERLAYFS, KERNEL, PYFUSE3, UNIONFS_FUSE
from bench_parts.registering import REGISTER
from bench_parts.registrars import OURS
from bench_parts.results import Results, geometric_mean
from bench_parts.samples import Group, Unit
from bench_parts.targets import GEOMETRIC_MEAN_LIMIT, against_fuse, mean_against_fuse, verdicts

_NONE = "-"
_USUAL = (KERNEL, FUSE_OVERLAYFS, UNIONFS_FUSE, DIRECT, PYFUSE3)
_OF_GROUP = {Group.MOUNTS: "", Group.ROOTLESS: " of rootless mounts"}


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the heads of the columns, and the rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def medians(results: Results, group: Group = Group.MOUNTS) -> Table:
    """The medians of mounts, our ratios, and the verdicts."""
    results = results.only(group)
    ours = results.ours
    heads = ["workload", *(peer for peer in results.peers)]
    compared = [reference for reference in (FUSE_OVERLAYFS, KERNEL) if ours and reference in results.peers]
    heads += [f"{ours} / {reference}" for reference in compared]
    if FUSE_OVERLAYFS in compared:
        heads.append("server CPU")
    found = verdicts(results, group)
    rows = []
    for row in results.rows.values():
        cells = [f"{row.title}, {row.unit.value}" if row.unit is not Unit.TIME else row.title]
        for peer in results.peers:
            cells.append(_figure(results, row.name, peer))
        for reference in compared:
            ratio = results.ratio(row.name, ours or "", reference)
            cells.append(_ratio(ratio))
        if FUSE_OVERLAYFS in compared:
            cells.append(_ratio(results.cpu_ratio(row.name, ours or "", FUSE_OVERLAYFS)))
        said = [verdict.text for verdict in found.get(row.name, []) if not verdict.passed]
        cells.append("; ".join(said) or ("PASS" if row.name in found else _NONE))
        rows.append(tuple(cells))
    return Table(f"Medians{_OF_GROUP[group]}, in ms unless something else is said", (*heads, "target"), tuple(rows))


def server_costs(results: Results, group: Group = Group.MOUNTS) -> Table:
    """For an operation of each workload: microseconds of wall time and of server CPU time, and requests."""
    results = results.only(group)
    servers = [peer for peer in results.peers if peer != KERNEL]
    counted = any(cell.requests is not None for cell in results.cells.values())
    rows = []
    for row in results.rows.values():
        if row.unit is not Unit.TIME:
            continue
        cells = [row.title]
        for peer in servers:
            cell = results.cells.get((row.name, peer))
            if cell is None or cell.median is None or cell.server_cpu_us is None:
                cells.append(_NONE)
                continue
            parts = [_short(1000 * cell.median / cell.operations), _short(cell.server_cpu_us)]
            if counted:
                parts.append(_NONE if cell.requests_each is None else f"{cell.requests_each:.2f}")
            cells.append(" / ".join(parts))
        rows.append(tuple(cells))
    what = "wall time, server CPU time (µs)" + (", requests" if counted else "")
    return Table(f"For one operation{_OF_GROUP[group]}: {what}", ("workload", *servers), tuple(rows))


def variants(results: Results) -> Table:
    """Our mounts without a speed-up, and further programs: wall time and server CPU time in terms of our mount's."""
    results = results.only(Group.MOUNTS)
    ours = results.ours
    names = [peer for peer in results.peers if peer not in _USUAL] if ours else []
    rows = []
    for row in results.rows.values() if names else ():
        if row.unit is Unit.TIME:
            cells = [
                f"{_ratio(results.ratio(row.name, peer, ours or ''))} / "
                f"{_ratio(results.cpu_ratio(row.name, peer, ours or ''))}"
                for peer in names
            ]
            rows.append((row.title, *cells))
    if rows:
        timed = [row.name for row in results.rows.values() if row.unit is Unit.TIME]
        means = [
            " / ".join(
                _ratio(geometric_mean(value for name in timed if (value := of(name, peer, ours or "")) is not None))
                for of in (results.ratio, results.cpu_ratio)
            )
            for peer in names
        ]
        rows.append(("geometric mean", *means))
    return Table(f"In terms of {ours}: wall time / server CPU time", ("workload", *names), tuple(rows))


def images(results: Results) -> Table:
    """The medians of taking an image in, and our ratio to the fastest of the others."""
    results = results.only(Group.IMAGES)
    others = [peer for peer in results.peers if peer != OURS]
    rows = []
    for row in results.rows.values():
        cells = [row.title, *(_figure(results, row.name, peer) for peer in results.peers)]
        ratios = [ratio for peer in others if (ratio := results.ratio(row.name, OURS, peer)) is not None]
        cells.append(f"{max(ratios):.2f}" if ratios else _NONE)
        limited = row.name == REGISTER.name and ratios
        cells.append(("PASS" if max(ratios) <= 1 else f"FAIL {max(ratios):.2f} (≤ 1)") if limited else _NONE)
        rows.append(tuple(cells))
    heads = ("taking an image in", *results.peers, "ours / fastest", "target")
    return Table("Medians of taking an image in, in ms", heads, tuple(rows))


def drivers(results: Results) -> Table:
    """The medians of the calls of the graph drivers, and our ratio."""
    results = results.only(Group.DRIVERS)
    rows = []
    for row in results.rows.values():
        ratio = results.ratio(row.name, driver_calls.OURS, driver_calls.OVERLAY2)
        cells = [row.title, *(_figure(results, row.name, peer) for peer in results.peers)]
        rows.append((*cells, _ratio(ratio)))
    heads = ("graph driver, many layers", *results.peers, "unionfs / overlay2")
    return Table("Medians of the calls of graph drivers, in ms", heads, tuple(rows))


def tables(results: Results) -> list[Table]:
    """Those that have something in them."""
    of_mounts = [of_group(results, group) for group in _OF_GROUP for of_group in (medians, server_costs)]
    made = (*of_mounts, variants(results), images(results), drivers(results))
    return [table for table in made if table.rows]


def summary(results: Results) -> list[str]:
    """The lines below the tables: geometric means, and what was left out and why."""
    lines = []
    for peer in results.peers:
        if peer == FUSE_OVERLAYFS or (mean := mean_against_fuse(results, peer)) is None:
            continue
        line = f"Geometric mean of {peer} / {FUSE_OVERLAYFS}: {mean:.2f}"
        if (with_all := mean_against_fuse(results, peer, exceptions=True)) is not None:
            line += f" ({with_all:.2f} with mounting and copy-up)"
        if peer == results.ours:
            line += f"; at most {GEOMETRIC_MEAN_LIMIT:g}: {'PASS' if mean <= GEOMETRIC_MEAN_LIMIT else 'FAIL'}"
        lines.append(line)
    every = [verdict for of_row in verdicts(results).values() for verdict in of_row]
    if every:
        lines.append(f"Targets reached by {results.ours}: {sum(v.passed for v in every)} of {len(every)}")
    for peer in results.peers:
        mean = mean_against_fuse(results, peer, group=Group.ROOTLESS)
        if peer != FUSE_OVERLAYFS and mean is not None:
            lines.append(f"Geometric mean of {peer} / {FUSE_OVERLAYFS}, rootless: {mean:.2f}")
    cpu = [results.cpu_ratio(row, results.ours or "", FUSE_OVERLAYFS) for row in against_fuse(results)]
    if (mean := geometric_mean(ratio for ratio in cpu if ratio is not None)) is not None:
        lines.append(f"Geometric mean of the servers' CPU time, {results.ours} / {FUSE_OVERLAYFS}: {mean:.2f}")
    reasons: dict[str, dict[str, list[str]]] = {}
    for (row, peer), cell in results.cells.items():
        if cell.reason:
            reasons.setdefault(cell.reason, {}).setdefault(results.rows[row].title, []).append(peer)
    for reason, of_rows in reasons.items():
        peers = dict.fromkeys(peer for names in of_rows.values() for peer in names)
        lines.append(f"{'; '.join(of_rows)} ({', '.join(peers)}): {reason}")
    return lines


def _figure(results: Results, row: str, peer: str) -> str:
    cell = results.cells.get((row, peer))
    if cell is None or cell.median is None:
        return (cell.reason.partition(":")[0] if cell is not None else "") or _NONE
    return _short(cell.median)


def _ratio(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    """Three figures, which is more than can be trusted."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
