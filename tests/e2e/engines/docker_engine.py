"""Debian's dockerd in a private root, on a storage driver of its own or on ours through the plugin."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.engines.command_line import CommandLineEngine
from tests.e2e.engines.private import CommandFailedError, private_cell
from tests.e2e.engines.scenario import EVERYTHING, Fault, Part

PLUGIN = "ufs"
"""The plugin's name; another one than that of a driver, so that neither can be taken for the other."""
FAULTS: tuple[Fault, ...] = (
    # A directory that a layer hides and makes again is merged with the hidden one.
    ("*", "*whiteout/dir/old"),
    ("*", "*whiteout/moved/old"),
    # Who writes to one name of an image's file parts it from the other names.
    ("c*", "links/a"),
    ("c*", "links/far/c"),
    ("export", "links/far/c"),
    ("diff", "C links/far*"),
    # How a layer says that something is gone; what it says is compared in the trees.
    ("*, layer *", "*.wh.*"),
)
"""Where Docker's own storage is wrong, or says the same in other words."""
_START_S = 60.0


@dataclass
class DockerEngine(CommandLineEngine):
    """dockerd with everything below ``cell.root``; containers live on when it ends (``--live-restore``)."""

    storage_driver: str = "overlay2"
    """What dockerd's ``--storage-driver`` says."""
    plugin_driver: str | None = None
    """Our driver behind the plugin; None where no plugin is used."""
    plugin_options: tuple[str, ...] = ()
    daemon_options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ("--network", "none")
    build_options: tuple[str, ...] = ("-q", "--network", "none")
    _daemon: subprocess.Popen[bytes] | None = None
    _plugin: subprocess.Popen[bytes] | None = None
    _logs: dict[str, Path] = field(default_factory=dict)

    def start_all(self) -> None:
        """Start the plugin, where there is one, and the engine."""
        if self.plugin_driver is not None:
            self.start_plugin()
        self.start_engine()

    def stop_all(self) -> None:
        """End both as an operator would, and see that they end well."""
        for daemon in (self._daemon, self._plugin):
            if daemon is not None:
                assert self.cell.stop(daemon) == 0, self.logs()
        self._daemon = self._plugin = None

    def start_plugin(self) -> None:
        """Start our plugin."""
        assert self.plugin_driver is not None
        words = ["unionfs", "serve", "docker-plugin", "--name", PLUGIN, "--driver", self.plugin_driver]
        self._plugin = self.cell.start(*words, *self.plugin_options, log=self._log("plugin"))

    def stop_plugin(self, signal_number: int = signal.SIGTERM) -> int:
        """End our plugin alone; its exit status."""
        assert self._plugin is not None
        return self.cell.stop(self._plugin, signal_number)

    def start_engine(self) -> None:
        """Start dockerd and wait until it answers."""
        root = self.cell.root
        words: list[str | Path] = [
            "dockerd",
            "--data-root",
            root / "root",
            "--exec-root",
            root / "exec",
            "-p",
            root / "docker.pid",
        ]
        words += ["-H", f"unix://{root}/docker.sock", "--storage-driver", self.storage_driver, "--experimental"]
        words += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore", *self.daemon_options]
        self._daemon = self.cell.start(*words, log=self._log("dockerd"))
        end = time.monotonic() + _START_S
        while True:
            try:
                self("info", "-f", "{{.Driver}}")
                return
            except CommandFailedError:
                assert self._daemon.poll() is None and time.monotonic() < end, self.logs()
                time.sleep(0.1)

    def kill_engine(self) -> None:
        """dockerd dies; its containers do not."""
        assert self._daemon is not None
        self.cell.stop(self._daemon, signal.SIGKILL)

    def restart(self) -> None:
        """dockerd dies and comes back; our plugin is replaced beneath it, then dies and comes back."""
        running = self("ps", "-q").split()
        self.kill_engine()
        self.start_engine()
        assert self("ps", "-q").split() == running
        if self.plugin_driver is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                assert self.stop_plugin(number) in (0, -signal.SIGKILL)
                self.start_plugin()
                for container in running:
                    self("cp", f"{container}:/etc/passwd", "-")
        assert self("ps", "-q").split() == running

    def remove_all(self) -> None:
        """Remove all containers and images, and BuildKit's layers."""
        super().remove_all()
        self("builder", "prune", "-a", "-f")

    @property
    def home(self) -> Path:
        """Where the storage driver keeps its layers."""
        # With remapped users it is a directory of their own in the data root.
        return Path(self("info", "-f", "{{.DockerRootDir}}").strip()) / self.storage_driver

    def leftovers(self) -> list[str]:
        """Layers in the driver's home, and what the engine's layer store lists."""
        home = self.home
        found = [f"{home.name}/{name}" for name in os.listdir(home)]
        layerdb = home.parent / "image" / home.name / "layerdb"
        for directory in (home / "l", home / "dir", layerdb / "sha256", layerdb / "mounts"):
            with suppress(FileNotFoundError):
                found += [f"{directory.name}/{name}" for name in os.listdir(directory)]
        return sorted(set(found) - {f"{home.name}/{name}" for name in ("l", "dir", "backingFsBlockDev")})

    def logs(self) -> str:
        """The end of what the daemons wrote."""
        return "\n".join(f"{name}: {path.read_text(errors='replace')[-3000:]}" for name, path in self._logs.items())

    def plugin_log(self) -> list[str]:
        """The lines that our plugin wrote."""
        return self._logs["plugin"].read_text().splitlines()

    def _log(self, name: str) -> Path:
        return self._logs.setdefault(name, self.cell.root / f"{name}.log")


@contextmanager
def docker_engine(
    *,
    plugin_driver: str | None = None,
    storage_driver: str = "overlay2",
    parts: frozenset[Part] = EVERYTHING,
    path: Sequence[Path] = (),
    plugin_options: tuple[str, ...] = (),
    daemon_options: tuple[str, ...] = (),
) -> Iterator[DockerEngine]:
    """dockerd, running; at the end it is stopped, and nothing may be left of it.

    Args:
        plugin_driver: use our plugin with this driver, instead of ``storage_driver``.
        storage_driver: dockerd's own.
        parts: of the scenario.
        path: directories that dockerd finds programs in first.
        plugin_options: more for ``unionfs serve docker-plugin``.
        daemon_options: more for dockerd.
    """
    with private_cell(path=path) as cell:
        engine = DockerEngine(
            name=f"docker on {plugin_driver or storage_driver}",
            cell=cell,
            program=("/usr/bin/docker", "-H", f"unix://{cell.root}/docker.sock"),
            environment={"DOCKER_BUILDKIT": "0"},
            parts=parts,
            faults=() if plugin_driver else FAULTS,
            storage_driver=PLUGIN if plugin_driver else storage_driver,
            plugin_driver=plugin_driver,
            plugin_options=plugin_options,
            daemon_options=daemon_options,
        )
        try:
            engine.start_all()
            yield engine
        except BaseException as error:
            error.add_note(engine.logs())
            raise
        engine.stop_all()
        # dockerd mounts its root on itself, to make it a shared mount, and leaves that with --live-restore.
        cell.shell('! mountpoint -q "$1" || umount "$1"', cell.root / "root")
        cell.assert_quiet()
