"""The table of docs/systems.md: what was tested where, in which version, with which result."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.e2e.systems.machine import REPOSITORY, SUITES
from tests.e2e.systems.subjects import SUBJECTS

DOCUMENT = REPOSITORY / "docs/systems.md"
_TITLES = ("system", "kernel", "Python", "what", "version", "result")
_TABLE = re.compile(r"^\| system \|.*?(?=^(?!\|)|\Z)", re.DOTALL | re.MULTILINE)


class Row(NamedTuple):
    """One line of the table."""

    system: str
    kernel: str
    python: str
    what: str
    version: str
    result: str


def rows(document: Path = DOCUMENT) -> list[Row]:
    """The rows that a document has."""
    found = _TABLE.search(document.read_text(encoding="utf-8"))
    assert found is not None, f"{document} has no table with the columns {', '.join(_TITLES)}"
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in found[0].splitlines()[2:]]


def write(new: Iterable[Row], document: Path = DOCUMENT) -> None:
    """Put rows into the table of a document, in the place of those for the same system and subject."""
    merged = {(row.system, row.what): row for row in [*rows(document), *new]}
    places = [(system, subject.name) for system in SUITES.values() for subject in SUBJECTS]
    lines = ["| " + " | ".join(_TITLES) + " |", "|---" * len(_TITLES) + "|"]
    lines += ["| " + " | ".join(merged[place]) + " |" for place in places if place in merged]
    text = document.read_text(encoding="utf-8")
    document.write_text(_TABLE.sub(lambda _: "\n".join(lines) + "\n", text), encoding="utf-8")
