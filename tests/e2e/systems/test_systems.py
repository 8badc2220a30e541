"""Every subject in every system; ``scripts/test --systems`` runs it and writes the table of docs/systems.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _pytest.mark import ParameterSet

from tests.e2e.systems.machine import PATH, SOURCE, SUITES, FailedInMachineError, Machine, machine
from tests.e2e.systems.subjects import SUBJECTS, Subject
from tests.e2e.systems.table import Row

pytestmark = [pytest.mark.engine, pytest.mark.timeout(7200)]


def _cases() -> list[ParameterSet]:
    cases = []
    for suite in SUITES:
        for subject in SUBJECTS:
            # Those of a group share a machine, and are run in their order by one worker.
            marks = [pytest.mark.xdist_group(f"{suite}, {'compiled' if subject.compiled else 'not compiled'}")]
            if suite in subject.in_ci:
                marks.append(pytest.mark.ci)
            cases.append(pytest.param(suite, subject, id=f"{suite}: {subject.name}", marks=marks))
    return cases


@pytest.fixture(scope="module")
def machines() -> Iterator[Callable[[str], Machine]]:
    """Machines by their suite, started when they are asked for the first time; one at a time."""
    with ExitStack() as stack:
        running: list[Machine] = []

        def start(suite: str) -> Machine:
            if not running or running[0].suite != suite:
                stack.pop_all().close()
                running[:] = [stack.enter_context(machine(suite))]
            return running[0]

        yield start


@pytest.mark.parametrize(("suite", "subject"), _cases())
def test_system(
    suite: str,
    subject: Subject,
    machines: Callable[[str], Machine],
    record_property: Callable[[str, object], None],
) -> None:
    box = machines(suite)
    kernel = box.shell("uname -r").strip()
    python = box.shell("/usr/bin/python3 -c 'import platform; print(platform.python_version())'").strip()

    def show(version: str, result: str) -> None:
        record_property("row", tuple(Row(SUITES[suite], kernel, python, subject.name, version, result)))

    if why := subject.absent.get(suite):
        box.shell(subject.lacks)  # else it has come to this system, and is to be tested
        show("", f"not run: {why}")
        return
    show("", "FAILED")
    box.set_up(compiled=subject.compiled)
    version = box.shell(subject.version).strip()
    show(version, "FAILED")
    if subject.script:
        box.shell(subject.script, timeout_s=subject.timeout_s)
        show(version, "passed")
    else:
        show(version, _pytest(box, subject))


def _pytest(box: Machine, subject: Subject) -> str:
    """Run tests of ours in the machine; says how many passed. Raises FailedInMachineError with what they said."""
    report = box.directory / "disk/srv/report.xml"
    report.unlink(missing_ok=True)
    argv = [".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=/srv/report.xml"]
    done = box.run(
        *argv,
        *subject.tests,
        env={"PATH": f"{SOURCE}/.venv/bin:{PATH}", **subject.environment},
        timeout_s=subject.timeout_s,
        check=False,
    )
    counts = _counts(report)
    if done.returncode != 0:
        raise FailedInMachineError(f"{box.suite}: {subject.name}: {counts}\n{done.stdout[-20000:]}")
    assert counts["passed"] > 0, done.stdout[-4000:]
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    return f"passed: {counts['passed']} test{'s' * (counts['passed'] != 1)}{skipped}"


def _counts(report: Path) -> dict[str, int]:
    counts = {"passed": 0, "skipped": 0, "failed": 0}
    if report.exists():
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            name = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            counts[name] += 1
    return counts
