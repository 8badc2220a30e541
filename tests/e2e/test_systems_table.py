"""The table of docs/systems.md: what it may show, and how it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.systems import table
from tests.e2e.systems.machine import SUITES
from tests.e2e.systems.subjects import SUBJECTS
from tests.e2e.systems.table import Row

HEAD = "before\n\n| system | kernel | Python | what | version | result |\n|---|---|---|---|---|---|\n"


def test_the_table_has_known_rows_in_their_order_and_none_that_failed() -> None:
    found = table.rows()
    places = [(system, subject.name) for system in SUITES.values() for subject in SUBJECTS]
    shown = [(row.system, row.what) for row in found]
    assert shown == [place for place in places if place in shown]
    assert [row for row in found if not row.result.startswith(("passed", "not run: "))] == []


def test_what_was_run_takes_the_place_of_what_was_known(tmp_path: Path) -> None:
    document = tmp_path / "systems.md"
    document.write_text(f"{HEAD}\nafter\n")
    first, second = (Row(SUITES["sid"], "6.1", "3.13", subject.name, "1", "passed") for subject in SUBJECTS[:2])
    table.write([second], document)
    table.write([first], document)
    assert table.rows(document) == [first, second]
    newer = second._replace(version="2", result="FAILED")
    table.write([newer], document)
    assert table.rows(document) == [first, newer]
    text = document.read_text()
    assert text.startswith(HEAD)
    assert text.endswith("\n\nafter\n")


def test_a_document_without_the_table_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "systems.md"
    document.write_text("nothing\n")
    with pytest.raises(AssertionError, match="has no table with the columns system, kernel"):
        table.write([], document)
