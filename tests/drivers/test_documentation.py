"""docs/drivers.md: the tests it names exist, and every row of docs/design/contract.md for drivers has one."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def test_tests_that_the_tables_name_exist(repository: Path) -> None:
    text = (repository / "docs" / "drivers.md").read_text()
    suite = "".join(path.read_text() for path in (repository / "unionfs/testing").glob("*.py"))
    drivers = suite + "".join(path.read_text() for path in TESTS.glob("drivers/test_*.py"))
    named = 0
    for line in text.splitlines():
        modules = ""
        for module, function in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::)?(test_\w+)?`", line):
            if module:
                modules += (TESTS / (module if "/" in module else f"drivers/{module}")).read_text()
                if module == "test_conformance.py":
                    modules += suite
            if function:
                assert f"def {function}(" in (modules or drivers), f"{function} in: {line}"
            named += bool(module or function)
    assert named > 120


def test_every_row_of_the_specification_has_a_line(repository: Path) -> None:
    text = (repository / "docs" / "drivers.md").read_text()
    cells = re.findall(r"^\| ((?:\d+(?:, )?)+) \|", text, re.MULTILINE)
    rows = [int(number) for cell in cells for number in cell.split(", ")]
    assert sorted(rows) == list(range(1, 83))
