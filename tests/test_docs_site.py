"""scripts/docs makes a site without a warning, with everything public in it."""

from __future__ import annotations

import html
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.test_public_names import PACKAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(__file__).resolve().parent.parent
    where = tmp_path_factory.mktemp("site") / "made"
    done = subprocess.run([root / "scripts/docs", where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return where


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "reference").glob("*/index.html"))
    for package in PACKAGES:
        for name in set(importlib.import_module(package).__all__) - {"__version__"}:
            # A module of the same name has its own path.
            found = [where for where in (f"{package}.{name}", f"{package}.{name}.{name}") if f'id="{where}"' in pages]
            assert len(found) == 1, f"{package}.{name}"


def test_docstrings_are_shown_as_markdown(site: Path) -> None:
    for path in (site / "reference").glob("*/index.html"):
        text = html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))
        found = re.search(r".*:(?:mod|class|func|meth|attr|data|exc):.*|^.*\S::$", text, re.MULTILINE)
        assert found is None, f"{path}: {found and found[0]}"


def test_pages_have_what_they_show(site: Path) -> None:
    assert "chroot" in (site / "library/index.html").read_text()  # the tool
    assert "LayerExistsError" in (site / "drivers/index.html").read_text()  # the driver
    assert 'href="library/' in (site / "index.html").read_text()
    assert "--8&lt;--" not in "".join(path.read_text() for path in site.glob("*/index.html"))
