"""The library's public names: they are there, they are found by tools, and nobody pays for those not used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = (
    "unionfs",
    "unionfs.fuse_ops",
    "unionfs.archive",
    "unionfs.drivers",
    "unionfs.layers",
    "unionfs.testing",
    "unionfs.engines.images",
    "unionfs.engines.images.registry",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_can_be_imported(package: str) -> None:
    """In a process of its own: here they may have been imported already, as modules of the same name too."""
    program = f"import {package} as p\nfor n in p.__all__: print(n, type(getattr(p, n)).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert " module" not in done.stdout
    assert len(done.stdout.splitlines()) == len(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_what_type_checkers_see(package: str, repository: Path) -> None:
    tree = ast.parse((repository / package.replace(".", "/") / "__init__.py").read_text())
    bound = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    bound |= {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)} | {"__version__"}
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert set(module.__all__) <= bound


def test_a_name_that_is_not_there() -> None:
    module = importlib.import_module("unionfs.drivers")
    with pytest.raises(AttributeError, match=r"unionfs\.drivers.*nothing"):
        module.nothing  # noqa: B018
    assert "default_registry" in dir(module)


def test_the_reference_has_every_public_package(repository: Path) -> None:
    pages = "".join(path.read_text() for path in (repository / "docs/reference").glob("*.md"))
    shown = {line.removeprefix("::: ") for line in pages.splitlines() if line.startswith(":::")}
    # The last is a function that shares its name with its module.
    assert shown == {*PACKAGES, "unionfs.errors", "unionfs.layers.fsck.fsck"}
    guide = (repository / "docs/library.md").read_text()
    assert all(f"| `{package}` |" in guide for package in PACKAGES if not package.endswith(".registry"))


def test_the_packages_import_nothing_before_they_are_asked() -> None:
    """A mount program imports some of them, for each container."""
    program = """
import sys
before = set(sys.modules)
import unionfs.fuse_ops, unionfs.archive, unionfs.drivers
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unionfs", "unionfs.archive", "unionfs.drivers", "unionfs.fuse_ops"]
