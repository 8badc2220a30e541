"""The store's process dies at every change it makes to the disk, or the power fails, and nothing is lost or half done.

What is checked after each death is in :mod:`tests.layers.crash_rig`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers.crash_rig import OPERATIONS

# The drivers over overlay2's layout share their steps, and each death takes them longer: there not at every step.
CASES = [
    *(("vfs", operation, 1) for operation in OPERATIONS),
    *(("overlay2", operation, 2 if operation in ("register", "remove") else 5) for operation in OPERATIONS),
    *(("unionfs", operation, 7) for operation in ("register", "create", "remove", "commit")),
]
POWER_CASES = [
    *(("vfs", operation) for operation in OPERATIONS),
    *((driver, operation) for driver in ("overlay2", "unionfs") for operation in ("register", "create", "remove")),
]


def run_rig(driver: str, operation: str, directory: Path, how: str) -> int:
    """How often it died."""
    # In a mount namespace of its own: no other process keeps its file systems busy, and nothing is left of them.
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            sys.executable,
            "-m",
            "tests.layers.crash_rig",
            driver,
            operation,
            directory,
            how,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split(" died ")[1].split()[0])


@pytest.mark.parametrize(("driver", "operation", "stride"), CASES)
def test_death_at_every_step(driver: str, operation: str, stride: int, tmp_path: Path) -> None:
    assert run_rig(driver, operation, tmp_path, str(stride)) >= 2


@pytest.mark.parametrize(("driver", "operation"), POWER_CASES)
def test_power_cut_at_every_sync(driver: str, operation: str, tmp_path: Path) -> None:
    assert run_rig(driver, operation, tmp_path, "power") >= (1 if operation == "reopen" else 2)
