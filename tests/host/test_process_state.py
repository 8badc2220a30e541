"""Whether a process is being killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from unionfs.host.processes import CAP_SYS_ADMIN, has_capability, is_being_killed


def test_who_is_being_killed() -> None:
    assert not is_being_killed(os.getpid())
    assert not is_being_killed(0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not is_being_killed(child.pid)
        child.kill()
    assert is_being_killed(child.pid)


def test_a_process_that_proc_does_not_show_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(path: str, mode: str = "r") -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", hidden)
    assert not is_being_killed(os.getpid())
    assert not is_being_killed(1)


def test_capabilities() -> None:
    assert has_capability(CAP_SYS_ADMIN) == has_capability(CAP_SYS_ADMIN, os.getpid())
    assert not has_capability(63)
    assert not has_capability(CAP_SYS_ADMIN, 0)
    code = "from unionfs.host.processes import *; print(has_capability(CAP_SYS_ADMIN), has_capability(CAP_SYS_NICE))"
    for words, expected in (
        ([], "True True\n"),
        (["setpriv", "--bounding-set=-sys_admin"], "False True\n"),
        (["unshare", "--user", "--map-root-user"], "False False\n"),
    ):
        done = subprocess.run([*words, sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout == expected
