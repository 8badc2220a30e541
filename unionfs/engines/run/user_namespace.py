"""Lets an ordinary user run containers: the command goes on as root of a user namespace with the user's id ranges.

A PID and a mount namespace come with it. When the command ends, however it does, so does everything in them, servers
and mounts too: nothing of a container that an ordinary user runs can be left but its files.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from unionfs.engines.run.detached import pipe_to_pass
from unionfs.engines.run.foreground import supervise
from unionfs.errors import RunError
from unionfs.host.syscalls import end_with_parent, in_user_namespace

_INSIDE = "UNIONFS_IN_USER_NAMESPACE"
_UNSHARE = ("unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--pid", "--fork", "--kill-child")


def is_rootless() -> bool:
    """Whether we are root of a user namespace only."""
    return os.geteuid() == 0 and in_user_namespace()


def must_enter() -> bool:
    """Whether we are an ordinary user."""
    return os.geteuid() != 0


def run_inside(argv: Sequence[str]) -> int:
    """Run a command as root of a new user namespace; returns its exit status. Signals that we get are passed on.

    Args:
        argv: the command.

    Raises:
        RunError: this machine does not let the user have a user namespace.
    """
    _check()
    with supervise() as supervisor:

        def begin() -> None:
            # Killed with us, it kills what is in the namespace.
            end_with_parent(signal.SIGKILL)
            supervisor.restore_signals()

        def on_signal(number: signal.Signals, from_terminal: bool) -> None:
            # unshare itself does not listen; its one child is the command.
            if not from_terminal:
                with suppress(OSError, IndexError), open(f"/proc/{process.pid}/task/{process.pid}/children") as found:
                    os.kill(int(found.read().split()[0]), number)

        process = subprocess.Popen(
            [*_UNSHARE, "--mount-proc", *argv],
            env=os.environ | {_INSIDE: "1"},
            pass_fds=pipe_to_pass(),
            # Safe: no thread of ours is running.
            preexec_fn=begin,  # noqa: PLW1509
        )
        return supervisor.wait(process, on_signal)


def _check() -> None:
    if os.environ.get(_INSIDE):
        raise RunError(f"the user namespace of {getpass.getuser()} has no root; run as root: sudo unionfs run")
    if why := why_not_inside():
        raise RunError(why)


def why_not_inside() -> str:
    """Why this user cannot be root of a user namespace; empty if that works. For root, only programs are looked for."""
    for program, package in (("unshare", "util-linux"), ("newuidmap", "uidmap")):
        if shutil.which(program) is None:
            return f"the program {program} is missing; install it: apt install {package}"
    if os.geteuid() == 0:
        return ""
    user = getpass.getuser()
    for path in ("/etc/subuid", "/etc/subgid"):
        if not _has_range(path, user):
            return (
                f"user {user} has no id range in {path}; run: sudo usermod --add-subuids 200000-265535 --add-subgids "
                f"200000-265535 {user}"
            )
    trial = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        reason = trial.stderr.strip().replace("\n", "; ")
        return f"this machine does not let user {user} make a user namespace ({reason}); run as root"
    return ""


def _has_range(path: str, user: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            owners = {line.split(":")[0] for line in file}
    except OSError:
        return False
    return user in owners or str(os.getuid()) in owners
