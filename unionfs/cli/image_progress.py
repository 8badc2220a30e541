"""Progress of an image's layers on a terminal: a bar each, with what is done to it and how fast."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from unionfs.cli.layer_output import human_size, short

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from unionfs.engines.images.install import Report


_OVER = ("exists", "done")


@contextmanager
def layer_bars() -> Iterator[Report]:
    """Bars on stderr if that is a terminal, nothing elsewhere; gives what is told about the layers."""
    if not sys.stderr.isatty():
        yield lambda layer, stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """How much is done of how much, and the rate while it goes on."""

        def render(self, task: Task) -> Text:
            if task.fields["stage"] in _OVER:
                return Text(human_size(int(task.total)) if task.fields["stage"] == "done" and task.total else "")
            done = human_size(int(task.completed))
            of = f" of {human_size(int(task.total))}" if task.total is not None else ""
            speed = task.speed
            return Text(done + of + (f", {human_size(int(speed))}/s" if speed else ""))

    columns = (TextColumn("{task.fields[layer]} {task.fields[stage]:<11}"), BarColumn(), Amount())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._known: dict[str, tuple[TaskID, str]] = {}

    def __call__(self, layer: str, stage: str, done: int, total: int | None) -> None:
        with self._lock:
            task, before = self._known.get(layer, (None, ""))
            if task is None:
                task = self._bars.add_task("", layer=short(layer), stage=stage, total=total)
            self._known[layer] = (task, stage)
        if stage in _OVER:
            done = total = total or 1
        if before and stage != before and stage not in _OVER:
            # Another thing is counted now, so the rate starts again.
            self._bars.reset(task, total=total)
        self._bars.update(task, completed=done, total=total, stage=stage)
