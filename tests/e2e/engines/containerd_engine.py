"""Debian's containerd with ctr in a private root, on its own overlayfs snapshotter or on ours as a proxy plugin."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.engines.private import Cell, CommandFailedError, private_cell
from tests.e2e.engines.scenario import Fault, Part

OURS = "unionfs"
STOCK = "overlayfs"
MERGED: tuple[Fault, ...] = (("*", "whiteout/dir/old"), ("*", "whiteout/moved/old"), ("diff", "? whiteout/moved/old"))
"""A directory that a layer hides and makes again is merged with the hidden one. That is how
containerd's applier writes whiteouts for an overlay, on its own storage and where it unpacks into ours directly."""
FAULTS: tuple[Fault, ...] = (
    *MERGED,
    # A name of a lower file that has several is changed alone.
    ("*", "links/a"),
    ("*", "links/far/c"),
    ("diff", "C links/far*"),
)
"""Where containerd's own storage is wrong."""
PARTS: frozenset[Part] = frozenset({"diff", "commit", "save", "restart"})
"""What ctr can do. It does not build, copy or export trees."""

_START_S = 60.0
_CONFIG = """\
version = {version}
root = "{root}/lib"
state = "{root}/run"
disabled_plugins = [{disabled}]

[grpc]
  address = "{root}/c.sock"

[ttrpc]
  address = "{root}/c.sock.ttrpc"

[debug]
  level = "warn"

[proxy_plugins.unionfs]
  type = "snapshot"
  address = "{root}/s.sock"
  capabilities = ["remap-ids"]

[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "unionfs"

[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"

{more}
"""


@dataclass
class ContainerdEngine:
    """The scenario's `Engine`, driven by ctr. Container ids are unique on this machine: control groups are shared."""

    name: str
    cell: Cell
    snapshotter: str
    unique: str
    """A name that nothing else on this machine has; the control group that all containers are in."""
    parts: frozenset[Part] = PARTS
    faults: tuple[Fault, ...] = ()
    snapshotter_options: tuple[str, ...] = ()
    config: str = ""
    """More for containerd's configuration."""
    cri: bool = False
    """Serve the kubelet's interface."""
    _containerd: subprocess.Popen[bytes] | None = None
    _server: subprocess.Popen[bytes] | None = None
    _serial: Iterator[int] = field(default_factory=itertools.count)
    _ids: dict[str, str] = field(default_factory=dict)
    _base: frozenset[str] = frozenset()

    def __call__(self, *words: str | Path, timeout_s: float = 180.0) -> str:
        """Run ctr; returns what it wrote. Raises CommandFailedError."""
        return self.raw(*words, timeout_s=timeout_s).decode(errors="surrogateescape")

    def raw(self, *words: str | Path, timeout_s: float = 180.0) -> bytes:
        """As a call, but the bytes."""
        program = ("ctr", "--address", f"{self.cell.root}/c.sock", "--namespace", self.namespace)
        return self.cell.run(*program, *words, timeout_s=timeout_s).stdout

    @property
    def namespace(self) -> str:
        """containerd's."""
        return "k8s.io" if self.cri else self.unique

    # Servers

    def start_all(self) -> None:
        """Start the snapshotter, where it is ours, and containerd."""
        if self.snapshotter == OURS:
            self.start_snapshotter()
        self.start_containerd()

    def stop_all(self) -> None:
        """End both as an operator would."""
        for daemon in (self._containerd, self._server):
            if daemon is not None:
                assert self.cell.stop(daemon) == 0, self.logs()
        self._containerd = self._server = None

    def start_snapshotter(self) -> None:
        """Start ours and wait until it answers."""
        root = self.cell.root
        words = ["unionfs", "serve", "snapshotter", "--root", f"{root}/snap", "--socket", f"{root}/s.sock"]
        said = self._log("snapshotter")
        before = said.read_text().count("serving") if said.exists() else 0
        server = self._server = self.cell.start(*words, *self.snapshotter_options, log=said)
        self._wait(lambda: said.read_text().count("serving") > before, server)

    def stop_snapshotter(self, signal_number: int = signal.SIGTERM) -> int:
        """End ours alone; its exit status."""
        assert self._server is not None
        return self.cell.stop(self._server, signal_number)

    def start_containerd(self) -> None:
        """Start containerd and wait until it answers."""
        root = self.cell.root
        disabled = ["io.containerd.internal.v1.opt"]
        if not self.cri:
            parts = ("cri.v1.images", "cri.v1.runtime") if config_version() == 3 else ()
            disabled += [f"io.containerd.{name}" for name in ("grpc.v1.cri", *parts)]
        config = _CONFIG.format(root=root, version=config_version(), disabled=str(disabled)[1:-1], more=self.config)
        (root / "config.toml").write_text(config)
        daemon = self._containerd = self.cell.start(
            "containerd", "-c", root / "config.toml", log=self._log("containerd")
        )

        self._wait(lambda: self._works("version"), daemon)

    def kill_containerd(self) -> None:
        """containerd dies; shims and containers do not."""
        assert self._containerd is not None
        self.cell.stop(self._containerd, signal.SIGKILL)

    def restart(self) -> None:
        """containerd dies and comes back; our snapshotter is replaced beneath it, then dies and comes back."""
        running = self.running()
        assert running
        self.kill_containerd()
        self.start_containerd()
        assert self.running() == running
        if self.snapshotter == OURS:
            for number in (signal.SIGTERM, signal.SIGKILL):
                assert (self.stop_snapshotter(number) == 0) is (number == signal.SIGTERM)
                self.start_snapshotter()
                self.wait_for_snapshotter()
        assert self.running() == running

    def wait_for_snapshotter(self) -> None:
        """Wait until containerd has connected to ours again; it tries every three seconds."""
        assert self._server is not None
        self._wait(lambda: self._works("snapshots", "--snapshotter", OURS, "ls"), self._server)

    def _works(self, *words: str) -> bool:
        try:
            self(*words)
        except CommandFailedError:
            return False
        return True

    def _wait(self, condition: Callable[[], bool], daemon: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _START_S
        while not condition():
            assert daemon.poll() is None and time.monotonic() < end, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        """The end of what the servers wrote."""
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in self.cell.root.glob("*.log")
        )

    def _log(self, name: str) -> Path:
        return self.cell.root / f"{name}.log"

    # Images and containers

    @staticmethod
    def ref(image: str) -> str:
        """The name that ctr has for an image: the whole one."""
        return f"docker.io/library/{image if ':' in image else image + ':latest'}"

    def load(self, archive: Path) -> None:
        """Load an image from a docker-archive."""
        # An archive in the test run's own directory can be read here too: only some directories are hidden.
        self("images", "import", "--snapshotter", self.snapshotter, archive)

    def images(self) -> list[str]:
        """The names of all images."""
        return self("images", "ls", "-q").split()

    def containers(self) -> list[str]:
        """The ids of all containers."""
        return self("containers", "ls", "-q").split()

    def running(self) -> list[str]:
        """The ids of the containers that run."""
        lines = [line.split() for line in self("tasks", "ls").splitlines()[1:]]
        return sorted(words[0] for words in lines if words[2] == "RUNNING")

    def new_id(self, name: str) -> str:
        """An id for a container, unique on this machine."""
        return f"{self.unique}-{name}-{next(self._serial)}"

    def run(self, image: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """Run a command in a new container that is removed afterwards; returns its output."""
        words = ("run", "--rm", "--snapshotter", self.snapshotter, *options)
        return self(*words, self.ref(image), self.new_id("run"), *command)

    def start(self, image: str, name: str, options: tuple[str, ...] = ()) -> str:
        """Start a container that sleeps; returns its id."""
        container = self._ids[name] = self.new_id(name)
        words = ("run", "-d", "--snapshotter", self.snapshotter, *options)
        self(*words, self.ref(image), container, "/bin/sleep", "100000")
        return container

    def execute(self, name: str, *command: str) -> str:
        """Run a command in a running container; returns its output."""
        return self("tasks", "exec", "--exec-id", f"e{next(self._serial)}", self._ids[name], *command)

    def diff(self, name: str) -> list[str]:
        """The changes of a container, told from the layer that ctr makes of it."""
        with tarfile.open(fileobj=io.BytesIO(self.raw_diff(name)), errors="surrogateescape") as layer:
            paths = [member.name.removeprefix("/").rstrip("/") for member in layer]
        base = self.run_listing(name)
        lines = []
        for path in paths:
            directory, _, last = path.rpartition("/")
            if last.startswith(".wh."):
                hidden = last.removeprefix(".wh.")
                lines.append(f"D {directory}/{hidden}" if directory else f"D {hidden}")
            elif path:
                lines.append(f"{'C' if path in base else 'A'} {path}")
        return lines

    def raw_diff(self, name: str) -> bytes:
        """The layer that ctr makes of a container's changes, as a tar."""
        words = ("snapshots", "--snapshotter", self.snapshotter, "diff")
        media_type = "application/vnd.oci.image.layer.v1.tar"
        return self.raw(*words, "--media-type", media_type, self._ids[name])

    def run_listing(self, name: str) -> frozenset[str]:
        """The paths in the image of a container."""
        image = self("containers", "ls", f"id=={self._ids[name]}").splitlines()[1].split()[1]
        script = "cd / && find . -xdev"
        words = ("run", "--rm", "--snapshotter", self.snapshotter, image, self.new_id("list"), "/bin/sh", "-c", script)
        return frozenset(line.removeprefix("./") for line in self(*words).splitlines())

    def commit(self, name: str, image: str) -> None:
        """Make an image of a container: its image's layers and one more, put together here, since ctr cannot."""
        source = self("containers", "ls", f"id=={self._ids[name]}").splitlines()[1].split()[1]
        layer = self.raw_diff(name)
        whole = self.cell.root / "tmp" / f"{image}.tar"
        self("images", "export", whole, source)
        with tarfile.open(whole) as tar:
            contents = {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
        # containerd 2 does not always write Docker's index.
        manifest = json.loads(contents["index.json"])
        while "manifests" in manifest:
            manifest = _exported(contents, manifest["manifests"][0])
        config = _exported(contents, manifest["config"])
        layers = [*(contents[_blob(found)] for found in manifest["layers"]), layer]
        write_archive(whole, f"{image}:latest", layers, config)
        self.load(whole)

    def save(self, image: str, archive: Path) -> None:
        """Write an image as an archive that has Docker's index."""
        self("images", "export", archive, self.ref(image))

    def remove_all(self) -> None:
        """Remove all containers and images."""
        for container in self.containers():
            with suppress(CommandFailedError):  # it may not run
                self("tasks", "rm", "-f", container)
            self("containers", "rm", container)
        found = self.images()
        if found:
            self("images", "rm", "--sync", *found)

    def snapshots(self) -> list[str]:
        """The names of all snapshots."""
        lines = self("snapshots", "--snapshotter", self.snapshotter, "ls").splitlines()[1:]
        return [line.split("  ")[0] for line in lines]

    @property
    def directories(self) -> Path:
        """Where the snapshots' files are."""
        if self.snapshotter == OURS:
            return self.cell.root / "snap/snapshots"
        return self.cell.root / f"lib/io.containerd.snapshotter.v1.{STOCK}/snapshots"

    def leftovers(self) -> list[str]:
        """Snapshots on disk and in containerd's list, and contents; containerd collects them some time later."""
        end = time.monotonic() + _START_S
        while True:
            found = [*os.listdir(self.directories), *self.snapshots(), *self("content", "ls", "-q").split()]
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.1)

    # What the scenario does not ask of this engine.

    def build(self, context: Path, image: str) -> None:
        """ctr cannot."""
        raise NotImplementedError

    def export(self, name: str, archive: Path) -> None:
        """ctr cannot."""
        raise NotImplementedError

    def copy_in(self, source: Path, name: str, target: str) -> None:
        """ctr cannot."""
        raise NotImplementedError

    def copy_out(self, name: str, source: str, target: Path) -> None:
        """ctr cannot."""
        raise NotImplementedError


def write_archive(archive: Path, tag: str, layers: list[bytes], config: dict[str, Any]) -> None:
    """Write a docker-archive of an image with these layers' archives, and otherwise the given configuration."""
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = {**config, "history": [], "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    files = {f"{number}.tar": layer for number, layer in enumerate(layers)}
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": list(files)}]
    files |= {"config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
    with tarfile.open(archive, "w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@functools.cache
def config_version() -> int:
    """The version of the configuration that this machine's containerd has sections for: 3 from containerd 2 on."""
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout
    return 3 if said.split()[2].removeprefix("v").startswith("2.") else 2


@contextmanager
def containerd_engine(
    snapshotter: str,
    *,
    options: tuple[str, ...] = (),
    faults: tuple[Fault, ...] = (),
    config: str = "",
    cri: bool = False,
) -> Iterator[ContainerdEngine]:
    """containerd, running; at the end it is stopped, and nothing may be left of it.

    Args:
        snapshotter: `OURS` or `STOCK`.
        options: more for ``unionfs serve snapshotter``.
        faults: where this storage is known to be wrong.
        config: more for containerd's configuration.
        cri: serve the kubelet's interface too.
    """
    with control_group() as unique, private_cell() as cell:
        engine = ContainerdEngine(
            name=f"containerd on {snapshotter}",
            cell=cell,
            snapshotter=snapshotter,
            unique=unique,
            faults=faults,
            snapshotter_options=options,
            config=config,
            cri=cri,
        )
        try:
            engine.start_all()
            yield engine
        except BaseException as error:
            error.add_note(engine.logs())
            raise
        engine.stop_all()
        cell.assert_quiet()


@contextmanager
def control_group() -> Iterator[str]:
    """A name for a control group that runc will make, and not remove when its containers are gone; we do."""
    unique = f"e2e{os.urandom(4).hex()}"
    yield unique
    # What is left in it when a test fails goes too. In each hierarchy of version 1, or in the only one of version 2.
    for top in (*Path("/sys/fs/cgroup").glob(unique), *Path("/sys/fs/cgroup").glob(f"*/{unique}")):
        for path in sorted(top.rglob("*/"), reverse=True):
            path.rmdir()
        top.rmdir()


def _blob(descriptor: dict[str, Any]) -> str:
    """Where an OCI layout has what is described."""
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


def _exported(contents: dict[str, bytes], descriptor: dict[str, Any]) -> Any:
    return json.loads(contents[_blob(descriptor)])
