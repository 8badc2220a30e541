"""The layer store as a whole, from many threads and processes at once."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.layers.conftest import Workshop
from tests.layers.hammer import hammer
from unionfs.layers.fsck import fsck


def test_forwarders(shop: Workshop) -> None:
    """Row 119."""
    assert shop.store.driver_name == shop.driver
    assert dict(shop.store.driver_status())["Backing Filesystem"]


def test_many_threads(shop: Workshop) -> None:
    """16 threads register, get, release, create, mount and remove; the counts are right at the end."""
    hammer(shop.store, turns=4)


def test_many_processes_of_many_threads(driver: str, tmp_path: Path) -> None:
    """Issue 4, point 5: of 4 processes at the same moment one has the store, and the others are told which."""
    root = tmp_path / "root"
    command = [sys.executable, "-m", "tests.layers.hammer", str(root), driver]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
            for _ in range(4)
        ]
        for process in processes:
            stack.callback(process.kill)

        def answers(line: str) -> list[str]:
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            return said()

        def said() -> list[str]:
            return [process.stdout.readline().strip() for process in processes if process.stdout is not None]

        assert said() == ["ready"] * 4
        first = answers("open it\n")
        assert sorted(line.partition(" ")[0] for line in first) == ["open", *["refused"] * 3], first
        owner = processes[first.index("open")].pid
        for line in first:
            assert line == "open" or f"is in use by process {owner}; close it there" in line
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("hammer\n")
            process.stdin.flush()
        for process, line in zip(processes, first, strict=True):
            assert process.stdout is not None
            rest = process.stdout.read().split("\n")
            assert rest == [*(["open"] if line != "open" else []), "done", ""], rest
            assert process.wait() == 0
    shop = Workshop(root, driver)
    assert shop.store.map() == {}
    shop.assert_nothing_leaked()
    assert fsck(shop.store, deep=True) == []
    shop.store.close()
