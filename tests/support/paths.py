"""How long the paths are that a piece of code gives the kernel to look up: what a walk costs that no clock shows."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from unionfs.host import syscalls


class Steps:
    """Counts path components.

    Attributes:
        count: how many the kernel was asked to go through.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: object) -> None:
        if isinstance(path, (str, bytes)):
            self.count += os.fsencode(path).count(b"/") + 1


_active: list[Steps] = []


def _audited(event: str, arguments: tuple[Any, ...]) -> None:
    if _active and event == "open":
        _active[-1].add(arguments[0])


sys.addaudithook(_audited)  # it cannot be taken away again


@contextmanager
def counted_steps() -> Iterator[Steps]:
    """Count what os.open and openat2(2) look up in this block."""
    steps = Steps()
    call = syscalls._syscall

    def syscall(*arguments: Any) -> int:
        steps.add(next((a.value for a in arguments if isinstance(a, ctypes.c_char_p)), None))
        return int(call(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "_syscall", syscall)
        _active.append(steps)
        try:
            yield steps
        finally:
            _active.pop()


def assert_linear(run: Callable[[int], object], depth: int) -> None:
    """Fail if ``run(4 * depth)`` has the kernel go through more than eight times the components of ``run(depth)``."""
    counts = []
    for size in (depth, 4 * depth):
        with counted_steps() as steps:
            run(size)
        counts.append(steps.count)
    assert counts[0]
    assert counts[1] <= 8 * counts[0], f"{counts[0]} steps at depth {depth}, {counts[1]} at {4 * depth}"
