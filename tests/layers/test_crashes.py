"""The store's process dies at every change it makes to the disk, or the power fails, and nothing is lost or half done.

What is checked after each death is in :mod:`tests.layers.crash_rig`. With ``UNIONFS_TEST_EVERY_STEP=1`` all operations
die at all of their steps with all drivers, which takes some minutes. Without it the driver ``unionfs`` takes samples: a
death with a file system server takes long, and over the same layout ``overlay2`` takes the same steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.layers.crash_rig import OPERATIONS

pytestmark = [pytest.mark.crash]

EVERY_STEP = os.environ.get("UNIONFS_TEST_EVERY_STEP", "") not in ("", "0")
STRIDES = {"vfs": 1, "overlay2": 1, "unionfs": 1 if EVERY_STEP else 8}
CASES = [(driver, operation, stride) for driver, stride in STRIDES.items() for operation in OPERATIONS]
POWER_CASES = [
    (driver, operation)
    for driver in STRIDES
    for operation in OPERATIONS
    if EVERY_STEP or driver == "vfs" or operation in ("register", "create", "remove", "adopt")
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
        timeout=3000 if EVERY_STEP else 280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split(" died ")[1].split()[0])


@pytest.mark.timeout(3000 if EVERY_STEP else 280)
@pytest.mark.parametrize(("driver", "operation", "stride"), CASES)
def test_death_at_every_step(driver: str, operation: str, stride: int, tmp_path: Path) -> None:
    assert run_rig(driver, operation, tmp_path, str(stride)) >= (1 if stride > 1 else 2)


@pytest.mark.timeout(3000 if EVERY_STEP else 280)
@pytest.mark.parametrize(("driver", "operation"), POWER_CASES)
def test_power_cut_at_every_sync(driver: str, operation: str, tmp_path: Path) -> None:
    assert run_rig(driver, operation, tmp_path, "power") >= (1 if operation == "reopen" else 2)
