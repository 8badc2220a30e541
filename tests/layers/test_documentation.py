"""docs/layer-store.md: its example runs, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.layers.archives import archive, member
from unionfs.layers import open_store

TESTS = Path(__file__).resolve().parent


def test_the_first_example_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "docs" / "layer-store.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    assert "/tmp/layers" in example
    (tmp_path / "layer.tar.gz").write_bytes(archive([member("etc/hello", "world")]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example.replace("/tmp/layers", str(tmp_path / "layers")), names)
    try:
        assert Path(str(names["path"]), "etc", "hello").read_text() == "world"
    finally:
        names["store"].cleanup()  # type: ignore[attr-defined]
        names["store"].close()  # type: ignore[attr-defined]
    with open_store(tmp_path / "layers") as store:
        assert list(store.rw_layers()) == ["my-container"]


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
