"""Everything can be imported, with the libraries that are there (``scripts/test --floors``: the oldest)."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import unionfs

MODULES = [module.name for module in pkgutil.walk_packages(unionfs.__path__, "unionfs.")]


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str) -> None:
    if not module.endswith(".__main__"):
        importlib.import_module(module)


@pytest.mark.parametrize("group", [[], ["image"], ["layer"], ["container"], ["serve"]], ids=" ".join)
def test_a_group_of_commands_shows_its_help(group: list[str]) -> None:
    """Called without a command: click does it in another way in each of its versions."""
    program = Path(sys.executable).parent / "unionfs"
    done = subprocess.run([program, *group], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"Usage: {' '.join(['unionfs', *group])} [OPTIONS] COMMAND [ARGS]...\n\n  ")
    assert "\\n" not in done.stderr
