"""Work in threads that ends when the task that waits for it is cancelled, and a run of trio that a program can call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import outcome
import trio

_Result = TypeVar("_Result")


async def in_thread(work: Callable[[], _Result], stop: Callable[[], None]) -> _Result:
    """The result of ``work``, which runs in a thread.

    Args:
        work: what to do.
        stop: makes ``work`` fail soon; called when the task is cancelled. The thread is waited for all the same.
    """
    finished = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not finished:
                    stop()

        nursery.start_soon(watch)
        # Captured, so that an error of the work leaves the nursery as it is and not in a group.
        result: outcome.Outcome[_Result] = await outcome.acapture(trio.to_thread.run_sync, work)
        finished = True
        nursery.cancel_scope.cancel()
    # What was stopped failed because of that.
    await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()


def run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    """Run ``work`` to its end, from a program without trio.

    Of several errors at the same time one is raised: who asked for one thing is told one reason.

    Raises:
        KeyboardInterrupt: the user ended it, and everything is undone.
        SystemExit: likewise, with SIGTERM or SIGHUP; the status is a shell's, 128 and the signal's number.
    """
    results: list[_Result] = []

    async def main() -> None:
        # The main task gets the interrupt, so it must be one that can be woken at any time.
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                results.append(await work())
                nursery.cancel_scope.cancel()

            if threading.current_thread() is threading.main_thread():  # only that one gets signals
                nursery.start_soon(_end_on_signals)
            nursery.start_soon(one)

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise _most_telling(group) from None
    return results[0]


async def _end_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as numbers:
        async for number in numbers:
            raise SystemExit(128 + number)


def _most_telling(error: BaseException) -> BaseException:
    leaves: list[BaseException] = []
    todo: list[BaseException] = [error]
    while todo:
        current = todo.pop(0)
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions
        else:
            leaves.append(current)
    interrupts = [one for one in leaves if not isinstance(one, Exception) and not isinstance(one, trio.Cancelled)]
    return (interrupts or leaves)[0]
