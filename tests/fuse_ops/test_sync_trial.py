"""Where a client that syncs again and again is served: what takes less time when it is tried out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from unionfs.fuse_ops.speedups.sync_trial import SyncTrial

TRIAL = 4 * 9 + 1  # syncs, until each place was timed often enough


class Client:
    """Syncs again and again; how long one takes is said by ``took``, which is told where it is served."""

    def __init__(self, took: Callable[[bool], float]) -> None:
        self.trial = SyncTrial()
        self.took = took
        self.now = 1000.0

    def sync(self, count: int = 1) -> list[bool]:
        """Where it was served while it waited for each."""
        places = []
        for _ in range(count):
            self.trial.sync(self.now)
            places.append(self.trial.beside)
            self.now += self.took(self.trial.beside)
        return places


def test_it_begins_beside_the_client() -> None:
    assert SyncTrial().beside


@pytest.mark.parametrize("beside", [True, False])
def test_where_it_takes_less_time_it_stays(beside: bool) -> None:
    client = Client(lambda place: 1e-3 if place == beside else 1.1e-3)
    tried = client.sync(TRIAL - 1)
    assert tried.count(True) == pytest.approx(tried.count(False), abs=1)
    assert client.sync(500) == [beside] * 500


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_client_that_becomes_slower_or_faster_is_fair_to_both(beside: bool, factor: float) -> None:
    """As one does whose database grows."""
    number = itertools.count()
    client = Client(lambda place: (1e-3 if place == beside else 1.1e-3) * factor ** next(number))
    client.sync(TRIAL)
    assert client.trial.beside is beside


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("beside", [True, False])
def test_a_disk_that_is_fast_or_slow_for_a_moment_decides_nothing(at: int, factor: float, beside: bool) -> None:
    number = itertools.count()

    def took(place: bool) -> float:
        return (1e-3 if place == beside else 1.3e-3) * (factor if next(number) == 9 * at + 5 else 1)

    client = Client(took)
    client.sync(TRIAL)
    assert client.trial.beside is beside


def test_the_sync_that_moves_is_not_timed() -> None:
    """To move takes time, and is done only while trying."""
    before = True

    def took(place: bool) -> float:
        nonlocal before
        moved, before = place != before, place
        return 1.0 if moved and not place else 1e-3 if place else 0.9e-3

    client = Client(took)
    client.sync(TRIAL)
    assert client.trial.beside is False


def test_it_is_tried_again_after_a_while() -> None:
    shorter = True
    client = Client(lambda place: 1e-3 if place == shorter else 2e-3)
    client.sync(TRIAL)
    for shorter in (False, True, True, False):
        before = client.trial.beside
        assert client.sync(500) == [before] * 500
        assert set(client.sync(48)) == {True, False}
        assert client.trial.beside is shorter


def test_what_comes_between_is_not_timed() -> None:
    client = Client(lambda place: 1.1e-3 if place else 1e-3)
    for _ in range(1000):
        client.sync(5)
        client.now += 10 if not client.trial.beside else 1
        client.trial.interrupt()
    assert client.trial.beside, "nothing was timed to its end"
    client.sync(TRIAL)
    assert not client.trial.beside


def test_what_was_found_holds_when_the_client_comes_back() -> None:
    client = Client(lambda place: 2e-3 if place else 1e-3)
    client.sync(TRIAL)
    for _ in range(10):
        client.now += 10
        client.trial.interrupt()
        assert client.sync(20) == [False] * 20


def test_what_comes_between_does_not_put_off_the_next_trial() -> None:
    client = Client(lambda place: 2e-3 if place else 1e-3)
    client.sync(TRIAL)
    for _ in range(60):
        client.trial.interrupt()
        places = client.sync(9)
        if any(places):
            return
    raise AssertionError("it is never tried again")
