"""A supervisor for tests, on a socket of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from tests.support.mounts import is_running, wait_until

END_S = 30.0


def parent_of(pid: int) -> int:
    """The process id of the parent."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


class Supervisor:
    """One that runs.

    Attributes:
        path: its socket.
        process: the supervisor itself.
    """

    def __init__(self, path: str, process: subprocess.Popen[str]) -> None:
        self.path = path
        self.process = process

    def copies(self) -> list[int]:
        """Its children: the servers, and the copy that waits."""
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children = [int(word) for word in file.read().split()]
        # While it starts, it has other children for a moment: what its libraries run to learn about the machine.
        return [child for child in children if _session_of(child) == child]

    def serves(self, server: int) -> bool:
        """Whether the process is one of its copies."""
        return parent_of(server) == self.process.pid

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(END_S)


@contextlib.contextmanager
def running_supervisor(
    directory: str, *words: str, program: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Supervisor]:
    """``unionfs serve supervisor`` with ``words``, its socket in ``directory``, which is made."""
    os.makedirs(directory, mode=0o755, exist_ok=True)
    path = os.path.join(directory, "s.sock")
    command = program or [os.path.join(os.path.dirname(sys.executable), "unionfs"), "serve", "supervisor"]
    process = subprocess.Popen(
        [*command, "--socket", path, *words] if not program else [*command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=None if environment is None else os.environ | environment,
    )
    supervisor = Supervisor(path, process)
    try:
        # A socket exists before anybody listens on it; the copy that waits is made afterwards.
        ready = wait_until(lambda: process.poll() is not None or bool(supervisor.copies()), END_S)
        assert ready
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield supervisor
    finally:
        copies = supervisor.copies() if process.poll() is None else []
        if process.poll() is None:
            process.terminate()
        process.wait(END_S)
        if process.stderr:
            process.stderr.close()
        ended = wait_until(lambda: not any(is_running(pid) for pid in copies), END_S)
        for pid in filter(is_running, copies):
            os.kill(pid, signal.SIGKILL)
        assert ended, "copies of the supervisor are left"
