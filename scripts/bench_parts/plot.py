"""Draws the ratios against fuse-overlayfs as a picture for the documents."""

from __future__ import annotations

from bench_parts.errors import BenchError
from bench_parts.peers import FUSE_OVERLAYFS, KERNEL
from bench_parts.results import Results
from bench_parts.samples import Unit

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def draw(results: Results, path: str) -> None:
    """Write a PNG with a bar for every time and peer; fuse-overlayfs, or else the kernel, is 1."""
    reference = next((name for name in (FUSE_OVERLAYFS, KERNEL) if name in results.peers), None)
    if reference is None:
        raise BenchError("there is nothing to compare with, so there is no plot")
    peers = [peer for peer in results.peers if peer != reference]
    rows = [
        row
        for row in results.rows.values()
        if row.unit is Unit.TIME and any(results.ratio(row.name, peer, reference) for peer in peers)
    ]
    ratios = {peer: [results.ratio(row.name, peer, reference) for row in rows] for peer in peers}
    known = [ratio for values in ratios.values() for ratio in values if ratio]
    if not known:
        raise BenchError("no workload was measured with two peers, so there is no plot")
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BenchError(f"the plot needs matplotlib ({error}); run scripts/setup --bench") from error
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.36 * len(rows)), layout="constrained")
    height = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        places = [index + (number - (len(peers) - 1) / 2) * height for index in range(len(rows))]
        lengths = [ratio or float("nan") for ratio in ratios[peer]]
        # From 1 to the ratio: what is faster goes to the left.
        axes.barh(places, [length - 1 for length in lengths], height, 1.0, label=peer, color=_COLOURS[number % 5])
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
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise BenchError(f"cannot write the plot to {path}: {error.strerror}; name another file") from error
    finally:
        pyplot.close(figure)
