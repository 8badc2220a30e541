"""Runs a program as a part of a workload; what it says is kept for the case that it fails."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence


def run_program(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run it to its end; raises OSError with its last line when it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{argv[0]} ended with status {done.returncode}: {said[-1] if said else 'it said nothing'}")
