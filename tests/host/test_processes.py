"""A process is known by its number and its start time."""

from __future__ import annotations

import os
import subprocess

from unionfs.host.processes import has_ended, open_process, process_start


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
