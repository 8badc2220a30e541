"""Whether a process is being killed."""

from __future__ import annotations

import os
import subprocess
import sys

from unionfs.host.process_state import is_being_killed


def test_who_is_being_killed() -> None:
    assert not is_being_killed(os.getpid())
    assert not is_being_killed(0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not is_being_killed(child.pid)
        child.kill()
    assert is_being_killed(child.pid)
