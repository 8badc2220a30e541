"""The wait that looks again before it goes to sleep."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from unionfs.fuse_ops.transports.pyfuse3 import PatientWait, QuickLock

_SOON_S = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_what_is_there_is_found_without_a_turn_of_the_scheduler(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    others: list[bool] = []

    async def other() -> None:
        others.append(True)

    async def main() -> None:
        waits = PatientWait()
        os.write(writing, b"1")
        await waits.wait_readable(reading)  # begins a turn
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await waits.wait_readable(reading)
            assert not others

    trio.run(main)
    assert others


def test_others_get_their_turn_however_busy_it_is(pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def main() -> None:
        waits = PatientWait()
        os.write(writing, b"1")
        turn = trio.Event()
        with trio.fail_after(_SOON_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, turn.set)
                while not turn.is_set():
                    await waits.wait_readable(reading)

    trio.run(main)


def test_it_sleeps_until_something_comes(pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    async def main() -> None:
        waits = PatientWait()
        timer = threading.Timer(0.05, os.write, (writing, b"1"))
        timer.start()
        with trio.fail_after(_SOON_S):
            await waits.wait_readable(reading)
        assert os.read(reading, 1) == b"1"
        timer.join()

    trio.run(main)


def test_closing_wakes_it(pipe: tuple[int, int]) -> None:
    reading, _ = pipe

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def close() -> None:
                await trio.testing.wait_all_tasks_blocked()
                trio.lowlevel.notify_closing(reading)

            nursery.start_soon(close)
            with pytest.raises(trio.ClosedResourceError):
                await PatientWait().wait_readable(reading)

    trio.run(main)


def test_the_lock_is_held_by_one_task_at_a_time() -> None:
    inside = most = entered = 0

    async def main() -> None:
        lock = QuickLock()

        async def work() -> None:
            nonlocal inside, most, entered
            for _ in range(20):
                async with lock:
                    inside += 1
                    entered += 1
                    most = max(most, inside)
                    await trio.lowlevel.checkpoint()
                    inside -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(work)

    trio.run(main)
    assert (most, entered) == (1, 100)


def test_a_cancelled_waiter_does_not_take_the_lock() -> None:
    async def main() -> None:
        lock = QuickLock()
        async with lock:
            with trio.move_on_after(0.01) as scope:
                async with lock:
                    raise AssertionError("taken twice")
            assert scope.cancelled_caught
        async with lock:
            pass

    trio.run(main)
