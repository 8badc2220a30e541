"""Which tests take long: the list of them as marks, and what holds the list true.

``tests/slow.txt`` names the test functions that take longer than :data:`SLOW_S`, if only in one of their cases. They
get the mark ``slow``, which ``scripts/test --fast`` leaves out, as it does the groups that are long as a whole
(:data:`GROUPS`). The others, some thousands, are to take a minute together.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parent.parent / "slow.txt"
GROUPS = ("engine", "differential", "crash")
"""Marks of modules whose tests need no entry in the list: each is run on its own (``scripts/test --only``)."""
SLOW_S = 0.2


def function_of(nodeid: str) -> str:
    """The test's function, without the parameters of one case and what pytest-xdist adds."""
    return nodeid.partition("[")[0].partition("@")[0]


def listed() -> set[str]:
    """The functions in the list."""
    return {line for line in LIST.read_text().splitlines() if line}


class Durations:
    """A plugin of pytest.

    Args:
        limit_s: what a test without a mark may take, with its fixtures; None for no limit.
        note: write to the list which functions of this run are slow.
    """

    def __init__(self, limit_s: float | None, *, note: bool) -> None:
        self._limit_s = limit_s
        self._note = note
        self._spent_s: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)  # before -m is looked at
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        slow = listed()
        for item in items:
            if function_of(item.nodeid) in slow:
                item.add_marker(pytest.mark.slow)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self._limit_s is not None and not any(item.get_closest_marker(name) for name in ("slow", *GROUPS)):
            spent_s = self._add(report)
            if report.when == "teardown" and report.passed and spent_s > self._limit_s:
                report.outcome = "failed"
                report.longrepr = f"took {spent_s:.1f} s; make it shorter, or put its name in {LIST.name}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._note and not any(name in report.keywords for name in GROUPS):
            self._add(report)

    def pytest_sessionfinish(self) -> None:
        if self._note:
            run = {function_of(nodeid) for nodeid in self._spent_s}
            slow = {function_of(nodeid) for nodeid, spent_s in self._spent_s.items() if spent_s > SLOW_S}
            LIST.write_text("".join(f"{name}\n" for name in sorted(listed() - run | slow)))

    def _add(self, report: pytest.TestReport) -> float:
        spent_s = self._spent_s[report.nodeid] = self._spent_s.get(report.nodeid, 0.0) + report.duration
        return spent_s
