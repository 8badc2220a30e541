"""Mounts the root file system under a fresh writable layer, ready to run programs in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quickstart_steps.errors import QuickstartError
from quickstart_steps.progress import step
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import in_user_namespace

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True, slots=True)
class Union:
    """The directories of one mount."""

    lower: str
    upper: str
    work: str
    target: str

    @classmethod
    def create(cls, lower: str, directory: str) -> Union:
        """Make a fresh upper, work directory and mount point in ``directory``."""
        union = cls(lower, *(os.path.join(directory, name) for name in ("upper", "work", "merged")))
        for path in (union.upper, union.work, union.target):
            os.mkdir(path, 0o755)
        return union

    @property
    def mount_command(self) -> list[str]:
        """What mounts it."""
        layers = ["--lower", self.lower, "--upper", self.upper, "--work", self.work]
        return [command_path("unionfs"), "mount", *layers, self.target]


def command_path(name: str) -> str:
    """One of our own commands: the one beside this interpreter, whatever PATH says."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    if not os.access(path, os.X_OK):
        raise QuickstartError(f"{path} is missing; run scripts/setup")
    return path


@contextmanager
def mounted(union: Union, sandbox: Sandbox) -> Iterator[str]:
    """Mount ``union`` in the sandbox, with /proc and /dev in it; unmount it afterwards. Gives the mount point."""
    root = union.target
    # The record of a mount that nobody else sees goes where nobody else looks.
    environment = {"XDG_RUNTIME_DIR": os.path.dirname(root)}
    with step("Mounting"):
        if not in_user_namespace():
            sandbox.run(["mkdir", "-p", "/run/unionfs"])
            sandbox.run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=1m", "tmpfs", "/run/unionfs"])
        sandbox.run(union.mount_command, environment=environment, name="unionfs mount")
        # Over the directories of the root file system: what is mounted here is not in the upper layer.
        sandbox.run(["mkdir", "-p", f"{root}/proc", f"{root}/dev"])
        sandbox.run(["mount", "-t", "proc", "proc", f"{root}/proc"])
        sandbox.run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=1m", "tmpfs", f"{root}/dev"])
        for device in _DEVICES:
            sandbox.run(["touch", f"{root}/dev/{device}"])
            sandbox.run(["mount", "--bind", f"/dev/{device}", f"{root}/dev/{device}"])
    yield root
    # Not in a `finally`: after a failure the whole sandbox goes, and with it every mount.
    with step("Unmounting"):
        sandbox.run(["umount", "--recursive", f"{root}/dev"])
        sandbox.run(["umount", f"{root}/proc"])
        sandbox.run([command_path("unionfs"), "umount", root], environment=environment, name="unionfs umount")
