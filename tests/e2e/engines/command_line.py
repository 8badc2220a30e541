"""An engine that is driven by a program with Docker's commands: Docker and Podman."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.engines.private import Cell
from tests.e2e.engines.scenario import EVERYTHING, Fault, Part

_BUILD_S = 240.0


@dataclass
class CommandLineEngine:
    """Docker's and Podman's common commands, as the scenario's `Engine`.

    What differs is in the fields, and in `restart` and `leftovers`, which a subclass defines.
    """

    name: str
    cell: Cell
    program: tuple[str, ...]
    """The client with its global options."""
    user: str | None = None
    """Who runs the client; None is root."""
    environment: Mapping[str, str] = field(default_factory=dict)
    run_options: tuple[str, ...] = ()
    build_options: tuple[str, ...] = ()
    remove_options: tuple[str, ...] = ("-f",)
    parts: frozenset[Part] = EVERYTHING
    faults: tuple[Fault, ...] = ()
    """Where its storage is known to be wrong; empty for ours."""

    def __call__(self, *words: str | Path, timeout_s: float = 120.0) -> str:
        """Run a command of the client; returns what it wrote. Raises CommandFailedError."""
        done = self.cell.run(*self.program, *words, user=self.user, env=self.environment, timeout_s=timeout_s)
        return done.stdout.decode(errors="surrogateescape")

    def load(self, archive: Path) -> None:
        """Load an image from a docker-archive."""
        self("load", "-q", "-i", archive)

    def images(self) -> list[str]:
        """The ids of all images."""
        return self("images", "-a", "-q").split()

    def containers(self) -> list[str]:
        """The ids of all containers."""
        return self("ps", "-a", "-q").split()

    def run(self, image: str, *command: str) -> str:
        """Run a command in a new container that is removed afterwards; returns its output."""
        return self("run", "--rm", *self.run_options, image, *command)

    def start(self, image: str, name: str, *options: str) -> str:
        """Start a container that sleeps; returns its id."""
        return self("run", "-d", "--name", name, *self.run_options, *options, image, "/bin/sleep", "100000").strip()

    def execute(self, name: str, *command: str) -> str:
        """Run a command in a running container; returns its output."""
        return self("exec", name, *command)

    def diff(self, name: str) -> list[str]:
        """The changes of a container, paths without their first slash."""
        return [line.replace(" /", " ", 1) for line in self("diff", name).splitlines()]

    def commit(self, name: str, image: str) -> None:
        """Make an image of a container."""
        self("commit", name, image)

    def build(self, context: Path, image: str) -> None:
        """Build an image from the Dockerfile of a directory, each step a layer."""
        self("build", *self.build_options, "-t", image, context, timeout_s=_BUILD_S)

    def save(self, image: str, archive: Path) -> None:
        """Write an image as a docker-archive."""
        self("save", "-o", archive, image)

    def export(self, name: str, archive: Path) -> None:
        """Write a container's tree as a tar."""
        self("export", "-o", archive, name)

    def copy_in(self, source: Path, name: str, target: str) -> None:
        """Copy from the machine into a container."""
        self("cp", source, f"{name}:{target}")

    def copy_out(self, name: str, source: str, target: Path) -> None:
        """Copy from a container to the machine."""
        self("cp", f"{name}:{source}", target)

    def restart(self) -> None:
        """End the engine, by force, with containers running, and start it again."""
        raise NotImplementedError

    def remove_all(self) -> None:
        """Remove all containers and images."""
        if found := self.containers():
            self("rm", *self.remove_options, *found)
        if found := self("images", "-q").split():
            self("rmi", "-f", *dict.fromkeys(found))

    def leftovers(self) -> list[str]:
        """Layers that are still on disk, as directories or in the engine's own lists."""
        raise NotImplementedError
