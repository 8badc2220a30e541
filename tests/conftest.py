"""What all tests share: which are slow, how long random tests search, a guard against mounts that are left behind."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.durations import Durations
from tests.support.sandbox import DISK

# A mount's speed is not ours alone, so no example is too slow; pytest-timeout ends a test that hangs.
_BASE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("dev", settings(_BASE, max_examples=50))
settings.register_profile("ci", settings(_BASE, max_examples=200))
settings.register_profile("long", settings(_BASE, max_examples=5000))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# A shell starts what runs in the background without ^C, and the programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unionfs")
    group.addoption("--limit-unmarked", type=float, help="fail tests without a mark that take more seconds")
    group.addoption("--note-slow", action="store_true", help="write to tests/slow.txt what takes longer than 0.2 s")


def pytest_configure(config: pytest.Config) -> None:
    # Those of a process of pytest-xdist reach the one that started it, which alone has them all.
    note = config.getoption("--note-slow") and not hasattr(config, "workerinput")
    config.pluginmanager.register(Durations(config.getoption("--limit-unmarked"), note=note))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """pytest's, and for tests with the mark ``disk`` one on a disk: ``/tmp`` may be in memory, as Debian 13 has it."""
    if request.node.get_closest_marker("disk") is None:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="unionfs-test-", dir=DISK) as name:
        yield Path(name)


def mount_points_below(directory: Path) -> list[str]:
    """The mount points of this mount namespace that lie in ``directory``."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape") for line in table]
    return [point for point in points if Path(point).is_relative_to(directory)]


@pytest.fixture(scope="session", autouse=True)
def no_mount_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run when a test leaves something mounted in its directory."""
    base = tmp_path_factory.getbasetemp().resolve()
    yield
    left = mount_points_below(base)
    assert not left, f"left mounted by a test: {', '.join(left)}"
