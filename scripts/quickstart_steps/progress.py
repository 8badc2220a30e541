"""Tells a person how far the quickstart is: a moving line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Step:
    """One running step; the code that does the work reports to it."""

    def detail(self, text: str) -> None:
        """Show what part of the step is being done."""

    def advance(self, amount: int) -> None:
        """Count ``amount`` units of the step's total as done."""


class _PlainStep(Step):
    def detail(self, text: str) -> None:
        print(f"    {text}", flush=True)


class _LiveStep(Step):
    def __init__(self, progress: Progress, task: TaskID, title: str) -> None:
        self._progress = progress
        self._task = task
        self._title = title

    def detail(self, text: str) -> None:
        self._progress.update(self._task, description=escape(f"{self._title}: {text}"))

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Step]:
    """Show that ``title`` is being done, and in the end how long it took.

    Args:
        title: what is being done, as a person would say it.
        total: how many units :meth:`Step.advance` will count, when that is known: a bar is drawn then.
    """
    started = time.monotonic()
    if sys.stdout.isatty():
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
        if total is not None:
            columns.append(TaskProgressColumn())
        with Progress(*columns, TimeElapsedColumn(), console=Console(), transient=True) as progress:
            yield _LiveStep(progress, progress.add_task(escape(title), total=total), title)
    else:
        print(f"{title} ...", flush=True)
        yield _PlainStep()
    print(f"{title}: done in {time.monotonic() - started:.1f} s", flush=True)
