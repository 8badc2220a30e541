"""Writes the results into docs/performance.md, between two marks, and the plot beside it."""

from __future__ import annotations

import os

from bench_parts import figures, plot
from bench_parts.errors import BenchError
from bench_parts.results import Results

BEGIN = "<!-- scripts/bench --write-docs: begin; what stands between the marks is replaced -->"
END = "<!-- scripts/bench --write-docs: end -->"
PLOT = "performance.png"


def write(results: Results, document: str) -> None:
    """Replace what stands between the marks in ``document``."""
    with open(document, encoding="utf-8") as file:
        text = file.read()
    before, found, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise BenchError(f"{document} lacks the line '{END if found else BEGIN}'; put it where the figures belong")
    plot.draw(results, os.path.join(os.path.dirname(document), PLOT))
    new = f"{document}.new"
    with open(new, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n\n{section(results)}\n{END}{after}")
    os.replace(new, document)


def section(results: Results) -> str:
    """The results as Markdown."""
    lines = ["; ".join(f"{name}: {value}" for name, value in results.machine.items()) + ".", ""]
    lines += [f"- {name}: {version}" for name, version in results.peers.items()]
    lines += ["", f"![Times relative to fuse-overlayfs]({PLOT})", ""]
    for table in figures.tables(results):
        lines += [f"{table.title}:", ""]
        lines.append("| " + " | ".join(table.heads) + " |")
        lines.append("|" + "|".join(["---", *["---:"] * (len(table.heads) - 1)]) + "|")
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        lines.append("")
    lines += [f"- {line}" for line in figures.summary(results)]
    return "\n".join(lines) + "\n"
