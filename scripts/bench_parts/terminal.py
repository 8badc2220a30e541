"""Shows the results on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench_parts import figures
from bench_parts.results import Results

_WIDE = 200


def show(results: Results) -> None:
    """Print the tables and what is to be said about them."""
    # A file or a pipe has no width that a table would have to be folded into.
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    console.print(Text("; ".join(f"{name}: {value}" for name, value in results.machine.items())))
    for name, version in results.peers.items():
        console.print(Text(f"{name}: {version}"))
    for table in figures.tables(results):
        shown = RichTable(title=table.title, title_justify="left")
        for number, head in enumerate(table.heads):
            shown.add_column(head, justify="left" if number == 0 or head == "target" else "right", no_wrap=number == 0)
        for row in table.rows:
            shown.add_row(*(_coloured(cell) for cell in row))
        console.print(shown)
    for line in figures.summary(results):
        console.print(Text(line))


def _coloured(cell: str) -> Text:
    style = {"PASS": "green", "FAIL": "red"}.get(cell.partition(" ")[0], "")
    return Text(cell, style=style)
