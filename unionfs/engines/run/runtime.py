"""The programs that make containers of configurations: crun and runc, which take the same command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass

from unionfs.errors import RunError

NAMES = ("crun", "runc")
"""In the order of choice: crun starts a container in half of the time."""

_UNIFIED = "/sys/fs/cgroup/unified"  # systemd's place for cgroup v2 beside v1
_COMMAND_S = 60.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """One of the programs.

    Attributes:
        name: ``crun`` or ``runc``.
        path: of the program.
        state: the directory in which it notes the container, for this container alone.
        rootless: we are root of a user namespace only, where cgroups are not ours.
        enter: the beginning of a command that runs the rest of it where the container was started.
    """

    name: str
    path: str
    state: str
    rootless: bool = False
    enter: tuple[str, ...] = ()

    def run_command(self, container_id: str, bundle: str, log: str, pid_file: str) -> list[str]:
        """The command that makes, runs and removes a container in the foreground.

        Args:
            container_id: its id.
            bundle: the directory of its ``config.json``.
            log: the file for the runtime's own errors, see :func:`failure`.
            pid_file: the file for the number of the container's process 1.
        """
        options = [f"--log={log}", "--log-format=json", "run", f"--bundle={bundle}", f"--pid-file={pid_file}"]
        return [*self._command(), *options, container_id]

    def exec_command(self, container_id: str, process: str, log: str) -> list[str]:
        """The command that runs one more process in a container, in the foreground.

        Args:
            container_id: its id.
            process: the file that describes it, as ``process`` of a configuration.
            log: see :meth:`run_command`.
        """
        options = [f"--log={log}", "--log-format=json", "exec", f"--process={process}"]
        return [*self._command(), *options, container_id]

    def kill(self, container_id: str, signal_name: str) -> None:
        """Send a signal to a container's process 1; nothing is said about one that has ended."""
        self._quietly("kill", container_id, signal_name)

    def delete(self, container_id: str) -> None:
        """End all processes of a container, and remove what the runtime knows of it. One that is gone is no error."""
        self._quietly("delete", "--force", container_id)

    def _command(self) -> list[str]:
        disabled = ["--cgroup-manager=disabled"] if self.rootless and self.name == "crun" else []
        return [*self.enter, self.path, f"--root={self.state}", *disabled]

    def _quietly(self, *arguments: str) -> None:
        subprocess.run(
            [*self._command(), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_S,
            check=False,
        )


def find_runtime(name: str, state: str, *, rootless: bool = False) -> Runtime:
    """The runtime of a name, or the best that works here.

    Args:
        name: ``crun``, ``runc`` or empty.
        state, rootless: see :class:`Runtime`.

    Raises:
        RunError: it is not installed, or cannot work on this machine.
    """
    if name and name not in NAMES:
        raise RunError(f"runtime {name[:50]} is not known; use one of {', '.join(NAMES)}")
    found = {one: path for one in ([name] if name else NAMES) if (path := _which(one)) is not None}
    if not found:
        raise RunError(f"the program {name or 'crun'} is missing; install it: apt install {name or 'crun'}")
    if "crun" in found and _crun_refuses_cgroups():
        if name:
            raise RunError(f"crun refuses this machine's mixture of cgroups v1 and v2 ({_UNIFIED}); use --runtime runc")
        del found["crun"]
        if not found:
            raise RunError("crun refuses this machine's mixture of cgroups v1 and v2; install runc: apt install runc")
    chosen, path = next(iter(found.items()))
    return Runtime(chosen, path, state, rootless)


def failure(log: str) -> str:
    """The last error that a runtime wrote to its log; empty if it wrote none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", "")).replace("\n", " ")
    return ""


def _which(name: str) -> str | None:
    # Debian puts runc into a directory that an ordinary user's PATH does not have.
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _crun_refuses_cgroups() -> bool:
    """crun: "cgroups in hybrid mode not supported, drop all controllers from cgroupv2"."""
    try:
        with open(os.path.join(_UNIFIED, "cgroup.controllers"), encoding="ascii") as file:
            return bool(file.read().strip())
    except OSError:
        return False
