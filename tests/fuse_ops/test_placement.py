"""The server on its client's processor: when it goes there, and that it always comes back."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import servers_of
from tests.support.sandbox import Sandbox, needs_root
from tests.support.users import in_child
from unionfs.fuse_ops.speedups import placement
from unionfs.fuse_ops.speedups.placement import ClientAffinity
from unionfs.fuse_ops.transports.direct.connection import Connection

pytest_plugins = ["tests.support.sandbox"]
needs_root()

IN_A_ROW = 32


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether nothing else runs on this machine, as the server is told."""
    answers = [True]
    monkeypatch.setattr(ClientAffinity, "_machine_is_quiet", lambda self: answers[0])
    return answers


@pytest.fixture
def beside() -> Iterator[ClientAffinity]:
    before = os.sched_getaffinity(0)
    beside = ClientAffinity()
    yield beside
    beside.close()
    assert_ordinary()
    assert os.sched_getaffinity(0) == before


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    """One that waits on the first processor; it moves when it is written to."""
    first = min(os.sched_getaffinity(0))
    argv = ["taskset", "-c", str(first), "cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while processor_of(process.pid) != first or "cat" not in name_of(process.pid):
            time.sleep(0.001)
        yield process


@pytest.fixture
def client(program: subprocess.Popen[bytes]) -> int:
    return program.pid


def processor_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[36])


def name_of(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read()


def assert_ordinary(pid: int = 0) -> None:
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER


def assert_beside(client: int) -> None:
    assert os.sched_getscheduler(0) == os.SCHED_IDLE
    assert os.sched_getaffinity(0) == {processor_of(client)}


def test_it_goes_there_after_many_requests(beside: ClientAffinity, client: int, quiet: list[bool]) -> None:
    for before in range(IN_A_ROW):
        beside.consider(client, before)
        assert not beside.active
        assert_ordinary()
    beside.consider(client, IN_A_ROW)
    assert beside.active
    assert_beside(client)


def test_the_privilege_is_asked_for_when_it_is_needed(
    client: int, quiet: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(placement, "_may_return", lambda: asked.append(True))  # None: no
    beside = ClientAffinity()
    try:
        for before in range(IN_A_ROW):
            beside.consider(client, before)
        assert asked == []
        for before in range(IN_A_ROW, 10 * IN_A_ROW):
            beside.consider(client, before)
        assert asked == [True]
    finally:
        beside.close()


class TestWithoutPrivilege:
    """Another thread goes there."""

    @pytest.fixture(autouse=True)
    def without_privilege(self, quiet: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "_may_return", lambda: False)

    def test_another_thread_serves_the_client(self, beside: ClientAffinity, client: int) -> None:
        def serve() -> bool:
            assert threading.current_thread() is not threading.main_thread()
            assert_beside(client)
            beside.leave()
            assert not beside.in_other_thread
            return len(seen) < 3

        seen: list[bool] = []
        while len(seen) < 4:
            assert not beside.in_other_thread
            beside.consider(client, IN_A_ROW)
            assert beside.in_other_thread
            assert_ordinary()
            seen.append(beside.run(serve))
        assert seen == [True, True, True, False]
        assert sum(thread.name == "unionfs-beside" for thread in threading.enumerate()) == 1
        beside.close()
        assert not any(thread.name == "unionfs-beside" for thread in threading.enumerate())

    def test_others_that_run_end_it(self, beside: ClientAffinity, client: int, quiet: list[bool]) -> None:
        beside.consider(client, IN_A_ROW)
        quiet[0] = False

        def serve() -> bool:
            number = IN_A_ROW
            while beside.active:
                number += 1
                beside.consider(client, number)
            return number < 2 * IN_A_ROW

        assert beside.run(serve)

    def test_threads_are_started_by_the_first_one(self, beside: ClientAffinity, client: int) -> None:
        beside.consider(client, IN_A_ROW)
        by: list[tuple[str, threading.Thread]] = []

        def serve() -> bool:
            beside.postpone(lambda: by.append(("postponed", threading.current_thread())))
            assert beside.active
            beside.outside(lambda: by.append(("outside", threading.current_thread())))
            assert not beside.active and not by
            return True

        assert beside.run(serve)
        assert by == [("postponed", threading.main_thread()), ("outside", threading.main_thread())]
        beside.postpone(by.clear)
        assert not by, "done at once by the thread whose it is"

    def test_what_goes_wrong_is_raised_here(self, beside: ClientAffinity, client: int) -> None:
        beside.consider(client, IN_A_ROW)
        done: list[bool] = []

        def fail() -> bool:
            beside.postpone(lambda: done.append(True))
            raise OSError(5, "as if /dev/fuse were gone")

        with pytest.raises(OSError, match="were gone"):
            beside.run(fail)
        assert done == [True]
        assert beside.run(lambda: True), "it can be used again"

    def test_a_signal_does_not_let_two_threads_run(self, beside: ClientAffinity, client: int) -> None:
        beside.consider(client, IN_A_ROW)
        main, ended = threading.main_thread().ident, []
        assert main is not None

        def serve() -> bool:
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.2)
            ended.append(True)
            return True

        def handler(number: int, frame: object) -> None:
            raise InterruptedError("a signal")

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with pytest.raises(InterruptedError):
                beside.run(serve)
            assert ended
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_another_client_ends_it(beside: ClientAffinity, client: int, quiet: list[bool]) -> None:
    beside.consider(client, IN_A_ROW)
    beside.consider(client + 1, 0)
    assert not beside.active
    assert_ordinary()


def test_others_that_run_end_it(beside: ClientAffinity, client: int, quiet: list[bool]) -> None:
    beside.consider(client, IN_A_ROW)
    quiet[0] = False
    beside.consider(client, IN_A_ROW + 7)
    assert beside.active  # not looked at yet
    beside.consider(client, IN_A_ROW + 8)
    assert beside.active and beside.in_doubt
    beside.consider(client, IN_A_ROW + 9)
    assert not beside.active and not beside.in_doubt
    assert_ordinary()
    beside.consider(client, 2 * IN_A_ROW)
    beside.consider(client, 2 * IN_A_ROW + 1)
    assert not beside.active and not beside.in_doubt
    quiet[0] = True
    beside.consider(client, 3 * IN_A_ROW)
    assert_beside(client)


def test_who_runs_for_a_moment_does_not_end_it(beside: ClientAffinity, client: int, quiet: list[bool]) -> None:
    quiet[0] = False
    beside.consider(client, IN_A_ROW)
    assert not beside.active
    quiet[0] = True
    beside.consider(client, IN_A_ROW + 1)
    assert_beside(client)
    quiet[0] = False
    beside.consider(client, IN_A_ROW + 8)
    quiet[0] = True
    beside.consider(client, IN_A_ROW + 9)
    assert_beside(client)
    quiet[0] = False
    beside.consider(client, IN_A_ROW + 10)
    assert not beside.in_doubt, "it is looked at before its time"


def test_a_client_that_moves_is_followed(
    beside: ClientAffinity, program: subprocess.Popen[bytes], quiet: list[bool]
) -> None:
    client = program.pid
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    beside.consider(client, IN_A_ROW)
    os.sched_setaffinity(client, {allowed[1]})
    assert program.stdin is not None
    deadline = time.monotonic() + 10
    while processor_of(client) != allowed[1]:
        assert time.monotonic() < deadline
        program.stdin.write(b"go")
        program.stdin.flush()
        time.sleep(0.001)
    beside.consider(client, IN_A_ROW + 8)
    assert os.sched_getaffinity(0) == {allowed[0]}
    for _ in range(8):
        beside.slept()
    beside.consider(client, IN_A_ROW + 16)
    assert_beside(client)


@pytest.mark.parametrize("call", ["open", "pread"])
def test_where_nothing_says_what_runs_it_stays_away(
    beside: ClientAffinity, client: int, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def hidden(*args: object) -> None:
        raise PermissionError(13, "not to be seen")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, hidden)
        for number in range(IN_A_ROW, 4 * IN_A_ROW):
            beside.consider(client, number)
            assert not beside.active


def test_a_client_that_ended(beside: ClientAffinity, quiet: list[bool]) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    beside.consider(process.pid, IN_A_ROW)
    assert not beside.active


@pytest.mark.parametrize("refused", ["sched_setscheduler", "sched_setaffinity"])
def test_nothing_half_done_where_it_is_refused(
    beside: ClientAffinity, client: int, quiet: list[bool], monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    before = os.sched_getaffinity(0)

    def refuse(*args: object) -> None:
        raise PermissionError(1, "not here")

    with monkeypatch.context() as patch:
        patch.setattr(os, refused, refuse)
        beside.consider(client, IN_A_ROW)
    assert not beside.active
    assert os.sched_getaffinity(0) == before
    if refused == "sched_setaffinity":
        assert_ordinary()
    beside.consider(client, 2 * IN_A_ROW)
    assert not beside.active  # it is not tried again


class TestPrivilege:
    def test_root_may_come_back(self) -> None:
        assert placement._may_return()

    def test_not_without(self) -> None:
        def ask() -> bool:
            os.setresuid(65534, 65534, 65534)
            return placement._may_return()

        assert in_child(ask) is False

    def test_not_with_the_privilege_of_a_user_namespace(self) -> None:
        code = "from unionfs.fuse_ops.speedups import placement as b; print(b._may_return())"
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "False\n"

    def test_with_a_limit_that_allows_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))

        def ask() -> bool:
            os.setresuid(65534, 65534, 65534)
            return placement._may_return()

        assert in_child(ask)

    def test_another_policy_is_left_alone(self, client: int, quiet: list[bool]) -> None:
        def ask() -> int:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            beside = ClientAffinity()
            beside.consider(client, IN_A_ROW)
            return os.sched_getscheduler(0)

        assert in_child(ask) == os.SCHED_BATCH


def look_up(box: Sandbox, names: range) -> None:
    for number in names:
        assert not os.path.lexists(box.at(f"missing-{number}"))


@pytest.fixture
def quiet_machine(tmp_path: Path) -> Iterator[None]:
    """What servers see in /proc/loadavg says that nothing else runs, whatever does."""
    said = tmp_path / "loadavg"
    said.write_text("0.00 0.00 0.00 1/100 1000\n")
    subprocess.run(["mount", "--bind", said, "/proc/loadavg"], check=True)  # test runs have a namespace of their own
    yield
    subprocess.run(["umount", "/proc/loadavg"], check=True)


def test_it_goes_to_a_program_that_is_alone(direct_box: Sandbox, quiet_machine: None) -> None:
    box = direct_box
    box.lower().file("f", "x")
    with box.mount():
        (server,) = servers_of(box.target)
        deadline = time.monotonic() + 60
        start = 0
        while os.sched_getscheduler(server) != os.SCHED_IDLE:
            assert time.monotonic() < deadline
            look_up(box, range(start, start + 100))
            start += 100
        assert len(os.sched_getaffinity(server)) == 1


def test_a_server_that_is_not_asked_is_an_ordinary_task(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("f", "x")
    with box.mount():
        (server,) = servers_of(box.target)
        look_up(box, range(1000))
        deadline = time.monotonic() + 10
        while os.sched_getscheduler(server) == os.SCHED_IDLE and time.monotonic() < deadline:
            time.sleep(0.005)
        assert_ordinary(server)
        assert os.sched_getaffinity(server) == os.sched_getaffinity(0)


def spin() -> None:
    while True:
        pass


def test_it_stays_ordinary_while_others_run(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("f", "x")
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    with box.mount():
        (server,) = servers_of(box.target)
        for other in others:
            other.start()
        try:
            seen = set()
            for start in range(0, 1000, 50):
                look_up(box, range(start, start + 50))
                seen.add(os.sched_getscheduler(server))
            assert seen == {os.SCHED_OTHER}
        finally:
            for other in others:
                other.kill()
                other.join()


def test_nobody_is_left_beside_when_the_connection_is_closed(client: int, quiet: list[bool]) -> None:
    before = os.sched_getaffinity(0)
    connection = Connection(ClientAffinity())
    connection.affinity.consider(client, IN_A_ROW)
    assert_beside(client)
    connection.close()
    assert_ordinary()
    assert os.sched_getaffinity(0) == before
