"""Running the programs of this package as a caller does, and looking at what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.support.mounts import mount_program, servers_of, wait_until
from tests.support.sandbox import Sandbox

BIN = os.path.dirname(sys.executable)
# Waiting for the end of both pipes is the point: an engine does so too, and a server that keeps one hangs here.
TIMEOUT_S = 30.0

Done = subprocess.CompletedProcess[str]


def run(
    argv: Sequence[str], *, cwd: str | None = None, env: dict[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> Done:
    """Run ``argv`` to its end, and to the end of its stdout and stderr."""
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=cwd,
        env=None if env is None else os.environ | env,
        pass_fds=pass_fds,
    )


def unionfs_mount(*words: str, cwd: str | None = None, pass_fds: Sequence[int] = ()) -> Done:
    """The mount program."""
    return run([mount_program(), *words], cwd=cwd, pass_fds=pass_fds)


def unionfs(*words: str) -> Done:
    """The command for people."""
    return run([os.path.join(BIN, "unionfs"), *words])


def listed() -> list[dict[str, Any]]:
    """What ``unionfs mounts --json`` says."""
    done = unionfs("mounts", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def listed_at(target: str) -> dict[str, Any] | None:
    """The listed mount on ``target``."""
    return next((mount for mount in listed() if mount["target"] == target), None)


def mounted_under(root: str) -> list[str]:
    """Mount points below ``root``."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        points = [line.split()[4] for line in lines]
    return [point for point in points if point.startswith(root + "/")]


def options_shown(target: str) -> set[str]:
    """The words of the mount table for ``target``: of the mount and of the file system."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        fields = next(line.split() for line in lines if line.split()[4] == target)
    return {*fields[5].split(","), *fields[-1].split(",")}


def assert_one_line(done: Done, name: str = "unionfs-mount", status: int = 1) -> str:
    """Check that the program failed as it should, and return what it said."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(name + ": ")
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def layer_options(box: Sandbox) -> str:
    """``lowerdir=..,upperdir=..,workdir=..`` of a sandbox, whose paths need no escapes."""
    return f"lowerdir={':'.join(box.lowers)},upperdir={box.upper},workdir={box.work}"


def server_of(target: str) -> int:
    """The one process that serves ``target``."""
    # A scan of /proc beside busy tests may miss a process once.
    assert wait_until(lambda: len(servers_of(target)) == 1, 5), servers_of(target)
    (pid,) = servers_of(target)
    return pid
