"""Many threads on the same and on different layers: nothing is lost, and nothing is left over."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drivers.rig import LAYERED, Rig
from tests.support.mounts import wait_until
from unionfs.errors import DriverError, LayerBusyError, LayerExistsError, LayerNotFoundError

THREADS = 32
SHARED = ("shared0", "shared1", "shared2", "shared3")


def run_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run ``work`` with each number at once; the first error is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def servers_below(root: str) -> list[str]:
    """The server processes whose command line names something below ``root``."""
    found = []
    for name in os.listdir("/proc"):
        try:
            command = Path("/proc", name, "cmdline").read_bytes() if name.isdigit() else b""
        except OSError:
            continue
        if os.fsencode(root) in command:
            found.append(name)
    return found


def check_nothing_left(rig: Rig, directories: list[str], fds: int) -> None:
    assert rig.mounts() == []
    assert wait_until(lambda: servers_below(rig.root) == [], 10)
    assert rig.names() == directories
    # The plugin's server closes its connections in threads of its own.
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, 10), os.listdir("/proc/self/fd")


def test_different_ids(rig: Rig) -> None:
    """Every thread has layers of its own: two of them, mounted and written, and one made from their difference."""
    rig.make_base()
    rig.driver.create("warm", "base")
    rig.driver.remove("warm")
    directories, fds = rig.names(), len(os.listdir("/proc/self/fd"))
    driver = rig.driver
    rounds = 1 if rig.kind == "unionfs" else 3

    def work(number: int) -> None:
        for turn in range(rounds):
            one, two = f"one-{number}-{turn}", f"two-{number}-{turn}"
            content = f"{number} {turn}".encode()
            driver.create_read_write(one, "base")
            root = driver.get(one)
            assert driver.get(one) == root
            Path(root, "mine").write_bytes(content)
            os.unlink(root + "/etc/group")
            driver.put(one)
            assert [str(c) for c in driver.changes(one, "base")] == ["C /etc", "D /etc/group", "A /mine"]
            driver.put(one)
            with driver.diff(one, "base") as stream:
                archive = stream.read()
            driver.create(two, "base")
            assert driver.apply_diff(two, "base", io.BytesIO(archive)) == len(content)
            assert [str(c) for c in driver.changes(two, one)] == []
            driver.remove(two)
            driver.remove(one)

    run_threads(work)
    check_nothing_left(rig, directories, fds)


def test_the_same_ids(rig: Rig) -> None:
    """Threads create, get, put and remove the same few layers; each call does it or says why not."""
    rig.make_base()
    rig.driver.create("warm", "base")
    rig.driver.remove("warm")
    directories, fds = rig.names(), len(os.listdir("/proc/self/fd"))
    driver = rig.driver
    rounds = 2 if rig.kind == "unionfs" else 8
    refused: tuple[type[DriverError], ...] = (LayerExistsError, LayerNotFoundError, LayerBusyError)
    if rig.kind == "plugin":
        refused = (DriverError,)  # it has only text, and what was refused may be different by the time we ask why

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except refused:
            pass

    def work(number: int) -> None:
        for turn in range(rounds):
            layer = SHARED[(number + turn) % len(SHARED)]
            attempt(lambda: driver.create_read_write(layer, "base"))  # noqa: B023
            attempt(lambda: driver.get(layer))  # noqa: B023
            driver.exists(layer)
            driver.put(layer)
            if number % 4 == turn % 4:
                attempt(lambda: driver.remove(layer))  # noqa: B023

    run_threads(work)
    for layer in SHARED:
        driver.remove(layer)
    check_nothing_left(rig, directories, fds)


def test_one_layer_is_mounted_once(layered_rig: Rig) -> None:
    layered_rig.make_base()
    driver = layered_rig.driver
    driver.create_read_write("x", "base")
    paths = []

    def work(number: int) -> None:
        paths.append(driver.get("x"))
        Path(paths[0], f"file{number}").write_bytes(b"1")

    run_threads(work)
    assert len(set(paths)) == 1
    assert layered_rig.mounts() == [paths[0]]
    assert len(servers_below(paths[0])) == (1 if layered_rig.kind == "unionfs" else 0)
    run_threads(lambda _: driver.put("x"), THREADS - 1)
    assert layered_rig.mounts() == [paths[0]]
    driver.put("x")
    assert layered_rig.mounts() == []
    assert len([c for c in driver.changes("x", "base") if c.path.startswith(b"/file")]) == THREADS


def test_one_id_is_created_once(rig: Rig) -> None:
    rig.make_base()
    won: list[int] = []

    def work(number: int) -> None:
        try:
            rig.driver.create("x", "base")
            won.append(number)
        except LayerExistsError:
            pass

    run_threads(work)
    assert len(won) == 1
    rig.driver.remove("x")
    rig.driver.remove("base")
    if rig.kind in LAYERED:
        assert os.listdir(rig.home + "/l") == []


@pytest.mark.parametrize("removed_first", [True, False])
def test_parent_removed_while_children_are_made(layered_rig: Rig, removed_first: bool) -> None:
    """Either the child exists and its parent does, or neither."""
    driver = layered_rig.driver
    for turn in range(10):
        driver.create(f"parent{turn}")

        def work(number: int, turn: int = turn) -> None:
            if (number == 0) == removed_first:
                try:
                    driver.remove(f"parent{turn}")
                except LayerBusyError:
                    pass
            else:
                try:
                    driver.create(f"child{turn}", f"parent{turn}")
                except LayerNotFoundError:
                    pass

        run_threads(work, 2)
        assert driver.exists(f"child{turn}") == driver.exists(f"parent{turn}")
        if driver.exists(f"child{turn}"):
            assert os.listdir(driver.get(f"child{turn}")) == []
            driver.put(f"child{turn}")
