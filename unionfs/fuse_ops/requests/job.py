"""What a request leaves to be done before it can be answered: work for a thread, and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")


class Job(Generic[T]):
    """Work for a thread, which knows no more than the descriptors that it was given, and what follows it.

    Args:
        run: the work. It may be done in any thread.
        finish: what follows in the thread that owns the tree, given what ``run`` returned. It returns the request's
            result, or a further job. Without it, what ``run`` returned is the result, in whatever thread that was.
        failed: called in the tree's thread when ``run`` raised, or was never called.
        short: whether ``run`` waits for the disk once or twice, and does not copy much.
        after: the work begins when this is set.

    A transport decides where ``run`` is called; :func:`completed` and :func:`done_here` do the rest.
    """

    __slots__ = ("after", "failed", "finish", "run", "short")

    def __init__(
        self,
        run: Callable[[], Any],
        finish: Callable[[Any], T | Job[T]] | None = None,
        *,
        failed: Callable[[], None] | None = None,
        short: bool = False,
        after: trio.Event | None = None,
    ) -> None:
        self.run = run
        self.finish = finish
        self.failed = failed
        self.short = short
        self.after = after

    @property
    def answers_alone(self) -> bool:
        """Whether nothing of it needs the tree's thread."""
        return self.finish is None and self.failed is None and self.after is None


async def completed(outcome: T | Job[T], before_thread: Callable[[], None] = lambda: None) -> T:
    """The result of a request, of which threads do what is left to do. Raises what the work raises.

    ``before_thread`` is called each time before a thread may be started.
    """
    while isinstance(outcome, Job):
        job = outcome
        if job.after is not None:
            await job.after.wait()
        try:
            before_thread()
            result = await trio.to_thread.run_sync(job.run)
        except BaseException:
            if job.failed is not None:
                job.failed()
            raise
        if job.finish is None:
            found: T = result
            return found
        outcome = job.finish(result)
    return outcome


def done_here(job: Job[T]) -> T | Job[T]:
    """Do the work of ``job`` in this thread, the tree's, and what follows it."""
    try:
        result = job.run()
    except BaseException:
        if job.failed is not None:
            job.failed()
        raise
    if job.finish is None:
        found: T = result
        return found
    return job.finish(result)
