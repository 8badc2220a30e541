"""Writes the table of docs/systems.md when tests of this directory have been run."""

from __future__ import annotations

import pytest

from tests.e2e.systems.table import Row, write

_rows: list[Row] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what the test of a subject has recorded; the last one counts."""
    if report.when == "call":
        found = [value for name, value in report.user_properties if name == "row"]
        _rows.extend(Row(*value) for value in found[-1:])  # type: ignore[misc]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write it, once: where tests run at once, by the process that gathers their reports."""
    if not hasattr(session.config, "workerinput") and _rows:
        write(_rows)
