"""What a request leaves to be done before it can be answered: work for a thread, and what follows it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import trio

from unionfs.host.processes import is_being_killed

T = TypeVar("T")

SHORT_WAIT_S: Final = 5e-3
"""A wait for the disk that takes longer is not a short one."""
LOOK_S: Final = 0.1
"""How often to look whether a program that waits has been killed."""
_THREADS_MAX: Final = 40  # as trio has it for everything else

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("unionfs")


class Waiter:
    """The program that waits for a request; its thread ``pid`` sent it, which is 0 where it cannot be seen.

    Attributes:
        may_leave: whether nothing has been changed for the request yet, so that it may end with EINTR.
        has_left: whether it has been answered so.
    """

    __slots__ = ("has_left", "may_leave", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.may_leave = False
        self.has_left = False

    def is_gone(self) -> bool:
        """Whether nobody is there to get an answer. A signal that the program handles is no reason to end a request."""
        return self.has_left or is_being_killed(self.pid)


class Copying:
    """A copy that is being made, for all those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self._waiters: list[Waiter] = []
        self._look_at = 0.0

    def wait(self, waiter: Waiter) -> None:
        """``waiter`` waits for the copy, too."""
        self._waiters.append(waiter)

    def is_wanted(self) -> bool:
        """Whether somebody waits for it still, or nobody has to. May be called often, and in any thread."""
        now = time.perf_counter()
        if now < self._look_at:
            return True
        self._look_at = now + LOOK_S
        return not self._waiters or any(not waiter.is_gone() for waiter in self._waiters)


class Job(Generic[T]):
    """Work for a thread, which knows no more than the descriptors that it was given, and what follows it.

    Args:
        run: the work. It may be done in any thread.
        finish: what follows in the thread that owns the tree, given what ``run`` returned. It returns the request's
            result, or a further job. Without it, what ``run`` returned is the result, in whatever thread that was.
        failed: called in the tree's thread when ``run`` raised, or was never called.
        then: what follows ``finish``, and returns in its place. It is left out when nobody waits for the request.
        short: whether ``run`` waits for the disk once or twice, and does not copy much.
        copying: the copy that it makes.
        after: the copy that it waits for.
        changes: whether the work changes what the kernel has to be told of by the answer.

    A transport decides where ``run`` is called; :func:`completed` and :func:`done_here` do the rest.
    """

    __slots__ = ("after", "changes", "copying", "failed", "finish", "run", "short", "then")

    def __init__(
        self,
        run: Callable[[], Any],
        finish: Callable[[Any], T | Job[T]] | None = None,
        *,
        failed: Callable[[], None] | None = None,
        then: Callable[[], T | Job[T]] | None = None,
        short: bool = False,
        copying: Copying | None = None,
        after: Copying | None = None,
        changes: bool = True,
    ) -> None:
        self.run = run
        self.finish = finish
        self.failed = failed
        self.then = then
        self.short = short
        self.copying = copying
        self.after = after
        self.changes = changes

    @property
    def answers_alone(self) -> bool:
        """Whether nothing of it needs the tree's thread."""
        return self.finish is None and self.failed is None and self.after is None


async def completed(
    outcome: T | Job[T], before_thread: Callable[[], None] = lambda: None, waiter: Waiter | None = None
) -> T:
    """The result of a request, of which threads do what is left to do. Raises what the work raises.

    ``before_thread`` is called each time before a thread may be started. Raises InterruptedError when ``waiter`` has
    been killed, as soon as nothing is left half done.
    """
    while isinstance(outcome, Job):
        job = outcome
        if waiter is not None and job.copying is not None:
            job.copying.wait(waiter)
        if job.after is not None:
            if waiter is not None:
                job.after.wait(waiter)
            while not job.after.done.is_set():
                with trio.move_on_after(LOOK_S):
                    await job.after.done.wait()
                _check(waiter)
        try:
            before_thread()
            if waiter is not None:
                waiter.may_leave = not job.changes
            result = await trio.to_thread.run_sync(job.run, limiter=_threads())
        except BaseException:
            if job.failed is not None:
                job.failed()
            raise
        if waiter is not None:
            waiter.may_leave = False
        if job.finish is None:
            found: T = result
            return found
        outcome = job.finish(result)
        if job.then is not None:
            _check(waiter)
            outcome = job.then()
    return outcome


def _threads() -> trio.CapacityLimiter:
    """The limit of threads for jobs. Not trio's own: all of those may wait for a mount that their program serves."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS_MAX)
        _limiter.set(limiter)
        return limiter


def _check(waiter: Waiter | None) -> None:
    if waiter is not None and waiter.is_gone():
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))


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
    outcome = job.finish(result)
    return outcome if job.then is None else job.then()
