"""The programs that take in an image, and how each is told to: ours, Docker, Podman and umoci."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bench_parts.errors import BenchError
from bench_parts.image import TAG, Image
from bench_parts.processes import wait_until

OURS: Final = "unionfs layer register"
_START_S = 60.0
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Effort:
    """What it took.

    Attributes:
        wall_ms: from the start of the command until it returned.
        cpu_ms: user and system time of all processes that took part.
    """

    wall_ms: float
    cpu_ms: float


class Registrar(Protocol):
    """One of the programs."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def version(self) -> str:
        """What it says about itself, for the record."""

    def ready(self, image: Image, directory: str) -> contextlib.AbstractContextManager[Callable[[], Effort]]:
        """What takes the image in, to be called once; all that it writes goes into ``directory``, which is empty."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program that does it by itself.

    ``arguments`` makes the words after the program.
    """

    name: str
    program: str
    arguments: Callable[[Image, str], Sequence[str]]

    @property
    def version(self) -> str:
        return _version(self.program)

    @contextlib.contextmanager
    def ready(self, image: Image, directory: str) -> Iterator[Callable[[], Effort]]:
        """See :class:`Registrar`."""
        argv = [self.program, *self.arguments(image, directory)]
        yield lambda: _effort(argv)


@dataclass(frozen=True, slots=True)
class DockerLoad:
    """``docker load``, with a daemon of its own that has been started before."""

    daemon: str
    program: str
    name: str = "docker load"

    @property
    def version(self) -> str:
        return _version(self.daemon)

    @contextlib.contextmanager
    def ready(self, image: Image, directory: str) -> Iterator[Callable[[], Effort]]:
        """See :class:`Registrar`."""
        # In the private /run/docker: the path of a socket has 108 bytes at most, and a directory may be anywhere.
        run = tempfile.mkdtemp(prefix="bench-", dir="/run/docker")
        client = [self.program, "-H", f"unix://{run}/socket"]
        argv = [self.daemon, "--data-root", f"{directory}/root", "--exec-root", f"{run}/exec", "--host"]
        argv += [f"unix://{run}/socket", "--pidfile", f"{run}/pid", "--storage-driver", "overlay2"]
        argv += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"]
        with open(os.path.join(directory, "log"), "wb") as log:
            daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:

            def is_up() -> bool:
                said = subprocess.run([*client, "version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
                return said.returncode == 0 or daemon.poll() is not None

            if not wait_until(is_up, _START_S) or daemon.poll() is not None:
                raise BenchError(f"dockerd did not start: {_last_line(os.path.join(directory, 'log'))}")
            yield lambda: _effort([*client, "load", "--quiet", "--input", image.archive], daemon.pid)
        finally:
            daemon.terminate()
            daemon.wait(_TIMEOUT_S)


def _effort(argv: Sequence[str], server: int = 0) -> Effort:
    """Run a command; with ``server``, the time that this process and its children use meanwhile counts too."""
    used = _children_cpu_ms() + _server_cpu_ms(server)
    started = time.perf_counter_ns()
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    wall = (time.perf_counter_ns() - started) / 1e6
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise BenchError(f"{argv[0]} failed (status {done.returncode}): {said or 'it said nothing'}")
    return Effort(wall, _children_cpu_ms() + _server_cpu_ms(server) - used)


def _children_cpu_ms() -> float:
    """The time of all children that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (usage.ru_utime + usage.ru_stime)


def _server_cpu_ms(pid: int) -> float:
    """The time of a process and of its children that have ended; 0 for no process. In clock ticks, 10 ms usually."""
    if not pid:
        return 0.0
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return 1000 * sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    first = (done.stdout or done.stderr).splitlines()[:1]
    return first[0] if first else program


def _last_line(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return ([line for line in file.read().splitlines() if line] or ["it said nothing"])[-1]


def find_registrars() -> tuple[list[Registrar], list[str]]:
    """The programs to compare, and a line for each that is left out."""
    ours = os.path.join(os.path.dirname(sys.executable), "unionfs")
    if not os.access(ours, os.X_OK):
        raise BenchError(f"there is no {ours}; run scripts/setup")
    found: list[Registrar] = [Command(OURS, ours, _our_arguments)]
    missing: list[str] = []
    # Debian's client by its path: another one, first in PATH, may want a newer daemon.
    client = "/usr/bin/docker" if os.access("/usr/bin/docker", os.X_OK) else shutil.which("docker")
    daemon = shutil.which("dockerd")
    if client and daemon:
        found.append(DockerLoad(daemon, client))
    else:
        missing.append("Docker is not installed and left out; run: apt-get install docker.io")
    for name, arguments in (("podman", _podman_arguments), ("umoci", _umoci_arguments)):
        if program := shutil.which(name):
            verb = "load" if name == "podman" else "unpack"
            found.append(Command(f"{name} {verb}", program, arguments))
        else:
            missing.append(f"{name} is not installed and left out; run: apt-get install {name}")
    return found, missing


def _our_arguments(image: Image, directory: str) -> list[str]:
    return ["layer", "register", "--root", os.path.join(directory, "root"), *image.layers]


def _podman_arguments(image: Image, directory: str) -> list[str]:
    run = tempfile.mkdtemp(prefix="bench-", dir="/run/containers")  # private here; it takes 50 characters at most
    options = [f"--root={directory}/root", f"--runroot={run}", f"--tmpdir={run}/tmp"]
    options += ["--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--events-backend=none"]
    return [*options, "load", "--quiet", "--input", image.archive]


def _umoci_arguments(image: Image, directory: str) -> list[str]:
    return ["unpack", "--image", f"{image.layout}:{TAG}", os.path.join(directory, "bundle")]
