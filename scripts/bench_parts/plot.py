"""Draws the ratios against fuse-overlayfs as a picture for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench_parts.errors import BenchError
from bench_parts.peers import DIRECT, FUSE_OVERLAYFS, KERNEL, PYFUSE3, UNIONFS_FUSE
from bench_parts.results import Results
from bench_parts.samples import Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct also for those who do not see red and green apart (Okabe and Ito); a peer has the same in each picture.
_COLOURS = {
    KERNEL: "#000000",
    DIRECT: "#0072b2",
    PYFUSE3: "#56b4e9",
    UNIONFS_FUSE: "#e69f00",
}
_OTHER_COLOURS = ("#d55e00", "#cc79a7", "#009e73", "#f0e442", "#999999")
_MACHINE = {"date": "{}", "processor": "{}", "memory": "{}", "kernel": "Linux {}", "scale": "scale: {}"}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def colours_of(peers: Sequence[str]) -> dict[str, str]:
    """A colour for each, none twice.

    Raises:
        BenchError: there are more than can be told apart.
    """
    more = [peer for peer in peers if peer not in _COLOURS]
    if len(more) > len(_OTHER_COLOURS):
        raise BenchError(f"{len(peers)} peers are too many for one plot; choose some with --only")
    return {peer: _COLOURS[peer] for peer in peers if peer in _COLOURS} | dict(zip(more, _OTHER_COLOURS, strict=False))


def draw(results: Results, path: str) -> None:
    """Write :func:`figure_of` the results as a PNG."""
    figure = figure_of(results)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise BenchError(f"cannot write the plot to {path}: {error.strerror}; name another file") from error


def figure_of(results: Results) -> Figure:
    """A bar for every time and peer; fuse-overlayfs, or else the kernel, is 1."""
    reference = next((name for name in (FUSE_OVERLAYFS, KERNEL) if name in results.peers), None)
    if reference is None:
        raise BenchError("there is nothing to compare with, so there is no plot")
    others = [peer for peer in results.peers if peer != reference]
    rows = [
        row
        for row in results.rows.values()
        if row.unit is Unit.TIME and any(results.ratio(row.name, peer, reference) for peer in others)
    ]
    ratios = {peer: [results.ratio(row.name, peer, reference) for row in rows] for peer in others}
    peers = [peer for peer in others if any(ratios[peer])]
    known = [ratio for peer in peers for ratio in ratios[peer] if ratio]
    if not known:
        raise BenchError("no workload was measured with two peers, so there is no plot")
    colours = colours_of(peers)
    try:
        from matplotlib import figure as mpl_figure
    except ImportError as error:
        raise BenchError(f"the plot needs matplotlib ({error}); run scripts/setup --bench") from error
    figure = mpl_figure.Figure(figsize=(9, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        places = [index + (number - (len(peers) - 1) / 2) * height for index in range(len(rows))]
        lengths = [ratio or float("nan") for ratio in ratios[peer]]
        # From 1 to the ratio: what is faster goes to the left.
        axes.barh(places, [length - 1 for length in lengths], height, 1.0, label=peer, color=colours[peer])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(*known, 0.5) / 1.2, max(*known, 2.0) * 1.2)
    ticks = [tick for tick in _TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"time relative to {reference} (left of 1 is faster)")
    machine = [form.format(results.machine[key]) for key, form in _MACHINE.items() if key in results.machine]
    figure.suptitle(f"Union file systems: time relative to {reference}", fontsize="large")
    axes.set_title(", ".join(machine), fontsize="small")
    figure.legend(loc="outside lower center", ncols=len(peers), fontsize="small")
    return figure
