"""A process is known by its number and its start time."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest

from unionfs.host.processes import file_size_limit, has_ended, open_process, process_start, shed_limits


def test_another_process_of_the_same_number_is_none() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        started = process_start(process.pid)
        assert started is not None
        assert open_process(process.pid, started - 1) is None
        pidfd = open_process(process.pid, started)
        assert pidfd is not None
        assert not has_ended(pidfd, 0)
        process.kill()
        assert has_ended(pidfd, 60)
        os.close(pidfd)
    assert process_start(process.pid) is None
    assert open_process(process.pid, started) is None


def test_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    started = process_start(os.getpid())
    assert started is not None
    assert open_process(os.getpid(), started + 1) is None
    assert open_process(1 << 30, 0) is None
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("privileged", [True, False])
def test_shed_limits(monkeypatch: pytest.MonkeyPatch, privileged: bool) -> None:
    """With CAP_SYS_RESOURCE, which root in a container may lack, hard limits are raised too."""
    none = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_FSIZE: (10, 20), resource.RLIMIT_NOFILE: (64, 1024), resource.RLIMIT_CPU: (5, none)}

    def set_limit(which: int, wanted: tuple[int, int]) -> None:
        hard = limits[which][1]
        if not privileged and hard != none and (wanted[1] == none or wanted[1] > hard):
            raise ValueError("not allowed to raise maximum limit")
        limits[which] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.setdefault(which, (none, none)))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    shed_limits()
    assert limits[resource.RLIMIT_CPU] == (none, none)
    assert limits[resource.RLIMIT_FSIZE] == ((none, none) if privileged else (20, 20))
    assert limits[resource.RLIMIT_NOFILE] == ((1 << 20, 1 << 20) if privileged else (1024, 1024))
    assert file_size_limit() == (None if privileged else 20)
    limits[resource.RLIMIT_NOFILE] = (64, 1 << 30)
    shed_limits()
    assert limits[resource.RLIMIT_NOFILE] == (1 << 30, 1 << 30)
