"""The public suite as the guide shows it: it passes for the driver of a few lines, and fails for one that is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def workplace(tmp_path: Path, repository: Path) -> Path:
    """A directory with the driver and the tests that docs/drivers.md shows."""
    text = (repository / "docs/drivers.md").read_text()
    (tests,) = re.findall(r'^```python title="test_copies.py"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    assert "$ pytest -q test_copies.py" in text
    (tmp_path / "test_copies.py").write_text(tests)
    shutil.copy(repository / "docs/examples/copies.py", tmp_path)
    return tmp_path


def run(workplace: Path, repository: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "test_copies.py", f"--basetemp={workplace}/temp", "-p", "no:xdist"]
    command += words
    environment = os.environ | {"PYTHONPATH": f"{repository}:{workplace}"}
    done = subprocess.run(
        command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    return done.returncode, done.stdout


def test_plain_copies_pass(workplace: Path, repository: Path) -> None:
    status, out = run(workplace, repository)
    assert status == 0, out
    found = re.search(r"(\d+) passed", out)
    assert found is not None
    assert int(found[1]) > 40
    assert "skipped" not in out


@pytest.mark.parametrize(
    ("right", "wrong", "fails"),
    [
        ('["cp", "-a", ', '["cp", "-r", ', "test_child_has_the_root_attributes_of_its_parent"),
        ("raise LayerExistsError(", "return  # (", "test_create_of_an_existing_id_is_an_error_and_changes_nothing"),
        ("new.chmod(0o755)", "new.chmod(0o700)", "test_driver_create_empty"),
    ],
)
def test_a_wrong_driver_fails(workplace: Path, repository: Path, right: str, wrong: str, fails: str) -> None:
    path = workplace / "copies.py"
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, wrong))
    status, out = run(workplace, repository)
    assert status == 1, out
    assert f"TestCopies::{fails}" in out


def test_a_test_that_does_not_apply_is_taken_out(workplace: Path, repository: Path) -> None:
    path = workplace / "test_copies.py"
    path.write_text(path.read_text() + "\n    test_driver_create_empty = None\n    test_file_getter = None\n")
    status, out = run(workplace, repository, "--collect-only")
    assert status == 0, out
    assert "test_driver_create_base" in out
    assert "test_driver_create_empty" not in out
    assert "test_file_getter" not in out
