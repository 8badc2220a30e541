"""The drivers in a user namespace, where nothing may be marked with trusted xattrs and no device be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.drivers.rig import INITS


@pytest.mark.disk
@pytest.mark.parametrize("kind", INITS)
def test_in_a_user_namespace(kind: str, tmp_path: Path, repository: Path) -> None:
    command = ["unshare", "-U", "--map-root-user", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
    program = [sys.executable, "-m", "tests.drivers.in_userns", kind, str(tmp_path / "home")]
    done = subprocess.run(
        [*command, *program], cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["done", "true"] if kind == "overlay2" else ["done"])
