"""Podman and Buildah in a private root, as root and as an ordinary user, on our storage or on their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from tests.e2e.engines.command_line import CommandLineEngine
from tests.e2e.engines.private import REPOSITORY, USER, USER_ID, CommandFailedError, private_cell
from tests.e2e.engines.scenario import Fault
from tests.support.mounts import wait_until

Storage = Literal["unionfs", "stock"]
PROGRAM = REPOSITORY / ".venv/bin/unionfs-mount"

# Podman's own defaults ask for systemd, for limits that need CAP_SYS_RESOURCE and for a bridge; crun does not run on
# a machine with both kinds of control groups.
CONTAINERS_CONF = """\
[containers]
netns = "none"
default_ulimits = ["nofile=4096:4096", "nproc=16384:16384"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
"""

# Of containers/storage 1.43 on the kernel's overlayfs, in the terms of the scenario.
FAULTS: tuple[Fault, ...] = (
    # A directory that a layer hides and makes again is merged with the hidden one.
    ("*", "*whiteout/*/old"),
    # "podman diff" reads the upper directory: it leaves out what an opaque directory hides, a directory that only
    # its entries changed, and that a name is of another kind; or it calls that a deletion.
    ("diff", "[CD] d2*"),
    ("diff", "C data"),
    ("diff", "C modes"),
    ("diff", "[CD] turns/again"),
    # A write to one name of a hard-linked file of a layer parts it from the others. Ours keeps them together.
    ("*", "links/a"),
    ("*", "links/far/c"),
    ("diff", "C links/far*"),
    # Layers hide things by an opaque mark, not name by name: two ways of saying it, and the trees are compared.
    ("*, layer *", "*.wh.*"),
)
# Of "podman commit" and "build" with any mount program. They compare the two trees by what stat() tells of each name:
# where a file of a layer only got a further name, that name is all that is new, and becomes a file of its own.
LIMITS: tuple[Fault, ...] = (
    ("built-from-scratch*", "copied/a"),
    ("built-from-scratch*", "copied/hard"),
    ("built-from-scratch*", "linked"),
)


def storage_conf(graph_root: Path, run_root: str, storage: Storage, more: str = "", overlay: str = "") -> str:
    """The configuration of containers/storage: ours as docs/podman.md has it, or its own overlay driver.

    ``more`` and ``overlay`` are further lines for its sections ``storage.options`` and ``storage.options.overlay``.
    """
    program = f'mount_program = "{PROGRAM}"\n' if storage == "unionfs" else ""
    return (
        f'[storage]\ndriver = "overlay"\ngraphroot = "{graph_root}"\nrunroot = "{run_root}"\n'
        f"[storage.options]\n{more}[storage.options.overlay]\n{program}{overlay}"
    )


@dataclass
class Podman(CommandLineEngine):
    """Podman in a cell."""

    graph_root: Path = Path()

    @property
    def home(self) -> Path:
        """The layers' directory of the storage driver."""
        return self.graph_root / "overlay"

    def run(self, image: str, *command: str) -> str:
        """Run a command in a new container that is removed afterwards; returns its output.

        It is read from the log of the container's monitor. What "podman run" itself passes on was empty now and then
        when twenty ran at once, with Podman 4.3 on its own storage, though the command had ended well.
        """
        log = self.cell.root / "tmp" / f"{uuid4()}.log"
        self("run", "--rm", "--log-opt", f"path={log}", *self.run_options, image, *command)
        text = _standard_output(log.read_bytes())
        log.unlink()
        return text.decode(errors="surrogateescape")

    def restart(self) -> None:
        """There is no daemon. What comes nearest: the containers' processes are killed, and started again."""
        names = self("ps", "--format", "{{.Names}}").split()
        self("kill", "--signal", "KILL", *names)
        self("wait", *names)
        self("start", *names)

    def leftovers(self) -> list[str]:
        """Layers on disk and in the lists of containers/storage."""
        # What Podman 5.8 is about to remove is moved to "tempdirs" first.
        found = [name for name in os.listdir(self.home) if name not in ("l", "tempdirs") and not name.startswith(".")]
        for name in ("l", "tempdirs"):
            with contextlib.suppress(FileNotFoundError):
                found += os.listdir(self.home / name)
        for kind in ("layers", "images", "containers"):
            path = self.graph_root / f"overlay-{kind}/{kind}.json"
            if path.exists():
                found += [one["id"] for one in json.loads(path.read_text())]
        return found

    def layer_directory(self, name: str) -> Path:
        """The directory of a container's layer."""
        merged = self("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", name).strip()
        return Path(merged).parent

    def remove(self, name: str) -> None:
        """Remove a container, if there is one.

        On any storage, Podman 4.3 fails now and then to remove a container that it has committed after its end ("shm:
        device or resource busy"), and does it when told again.
        """
        with contextlib.suppress(CommandFailedError):
            self("rm", "-i", "-f", "-t", "0", name)
        self("rm", "-i", "-f", "-t", "0", name)

    def end(self) -> None:
        """Remove everything, end the process that keeps a user's namespace, and see that nothing is left."""
        self.remove_all()
        if self.user is not None:
            self("system", "migrate")
        self.cell.assert_quiet()


def _standard_output(log: bytes) -> bytes:
    """What was written to the standard output, from a log as Kubernetes has them.

    Each line is a time, the stream, F where a line ended there or P where it was only cut, and the text.
    """
    text = b""
    for line in io.BytesIO(log):
        _, stream, kind, rest = line.split(b" ", 3)
        if stream == b"stdout":
            text += rest if kind == b"F" else rest.removesuffix(b"\n")
    return text


@contextlib.contextmanager
def podman(
    storage: Storage,
    user: Literal["root", "rootless"],
    more: str = "",
    overlay: str = "",
    *,
    supervised: bool = False,
) -> Iterator[Podman]:
    """Podman with nothing in it; what it leaves behind at the end fails the test.

    Args:
        storage: ours or its own.
        user: whom it runs as.
        more: further lines for ``[storage.options]``.
        overlay: further lines for ``[storage.options.overlay]``.
        supervised: with our supervisor running, which keeps a server ready for the next mount.
    """
    with private_cell(etc={"containers.conf": CONTAINERS_CONF, "registries.conf": ""}) as cell:
        if user == "root":
            graph_root = cell.root / "store"
            (cell.root / "etc/storage.conf").write_text(
                storage_conf(graph_root, f"{cell.root}/run", storage, more, overlay)
            )
        else:
            graph_root = cell.root / "home/.local/share/containers/storage"
            home = cell.root / "home/.config/containers"
            home.mkdir(parents=True)
            (home / "storage.conf").write_text(
                storage_conf(graph_root, f"/run/user/{USER_ID}/containers", storage, more, overlay)
            )
            for path in (home, home.parent, home / "storage.conf"):
                os.chown(path, USER_ID, USER_ID)
        engine = Podman(
            f"podman {user} {storage}",
            cell,
            ("podman",),
            user=USER if user == "rootless" else None,
            faults=FAULTS if storage == "stock" else (),
            remove_options=("-f", "-t", "0"),
            build_options=("--network", "none", "--layers", "-q"),
            graph_root=graph_root,
        )
        if not supervised:
            yield engine
            engine.end()
            return
        log = cell.root / "tmp/supervisor.log"
        supervisor = cell.start("unionfs", "serve", "supervisor", log=log, user=engine.user)
        socket = f"/run/user/{USER_ID}/unionfs/supervisor.sock" if engine.user else "/run/unionfs/supervisor.sock"
        assert wait_until(lambda: cell.call(lambda: os.path.exists(socket)), 60), log.read_text()
        yield engine
        engine.remove_all()
        cell.stop(supervisor)
        engine.end()
