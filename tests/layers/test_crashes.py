"""The store's process dies at every change it makes to the disk, and the next one finds nothing lost or half done.

What is checked after each death is in :mod:`tests.layers.crash_rig`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.layers.crash_rig import OPERATIONS

# The drivers over overlay2's layout share their steps, and each death takes them longer: there every third or seventh.
CASES = [
    *(("vfs", operation, 1) for operation in OPERATIONS),
    *(("overlay2", operation, 1 if operation in ("register", "remove") else 3) for operation in OPERATIONS),
    *(("unionfs", operation, 7) for operation in ("register", "create", "remove", "commit")),
]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory: who only dies needs no disk."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "crash-test", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--recursive", tmp_path], check=True)


@pytest.mark.parametrize(("driver", "operation", "stride"), CASES)
def test_death_at_every_step(driver: str, operation: str, stride: int, memory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.layers.crash_rig", driver, operation, memory, str(stride)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    deaths = int(done.stdout.split(" died ")[1].split()[0])
    assert deaths >= 2, done.stdout
