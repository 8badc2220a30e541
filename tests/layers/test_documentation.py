"""docs/layer-store.md: the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_tests_that_the_tables_name_exist(repository: Path) -> None:
    text = (repository / "docs" / "layer-store.md").read_text()
    named = 0
    for line in text.splitlines():
        for module, function in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", line):
            assert f"def {function or 'test_'}" in (TESTS / module).read_text(), line
            named += 1
        everything = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
        for function in re.findall(r"`(test_\w+)`", line):
            assert f"def {function}(" in everything, line
    assert named > 40


def test_every_row_of_the_specification_has_a_line(repository: Path) -> None:
    text = (repository / "docs" / "layer-store.md").read_text()
    rows = {
        int(number)
        for cell in re.findall(r"^\| ((?:\d+(?:, )?)+) \|", text, re.MULTILINE)
        for number in cell.split(", ")
    }
    assert rows == set(range(83, 121))
