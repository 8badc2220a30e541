"""The file systems that are compared, and how each is told to mount a stack of layers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bench_parts.errors import BenchError
from bench_parts.stacks import Stack
from bench_parts.syscalls import mount
from bench_parts.user_namespace import is_rootless
from unionfs.fuse_ops.options import SPEEDUPS
from unionfs.fuse_ops.session.option_text import escape_value, format_layers

KERNEL: Final = "kernel"
FUSE_OVERLAYFS: Final = "fuse-overlayfs"
UNIONFS_FUSE: Final = "unionfs-fuse"
DIRECT: Final = "ours direct"
PYFUSE3: Final = "ours pyfuse3"
ALL_SPEEDUPS: Final = "all"

_MOUNT_TIMEOUT_S = 60
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Directories:
    """What a writable mount needs besides its layers."""

    upper: str
    work: str
    target: str


class Peer(Protocol):
    """One of the file systems."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def version(self) -> str:
        """What it says about itself, for the record."""

    @property
    def is_ours(self) -> bool:
        """Whether options of a workload that are for us alone are given to it."""

    def mount(self, stack: Stack, at: Directories, options: Sequence[str]) -> None:
        """Mount, and return when the mount can be used."""


@dataclass(frozen=True, slots=True)
class KernelOverlay:
    """The kernel's overlayfs with its defaults, mounted by mount(2) itself.

    In a user namespace it needs ``userxattr``, since nobody may write ``trusted.*`` attributes there.
    """

    name: str = KERNEL
    is_ours: bool = False

    @property
    def version(self) -> str:
        return f"Linux {os.uname().release}"

    def mount(self, stack: Stack, at: Directories, options: Sequence[str]) -> None:
        # 120 paths fit into a page only when they are short, so they are relative.
        before = os.getcwd()
        base = os.path.commonpath([os.path.dirname(layer) for layer in stack.layers])
        os.chdir(base)
        try:
            layers = format_layers(os.path.relpath(layer, base) for layer in stack.layers)
            data = f"lowerdir={layers},upperdir={escape_value(at.upper)},workdir={escape_value(at.work)}"
            if is_rootless():
                data += ",userxattr"
            if len(data) >= _PAGE_BYTES:
                raise BenchError(f"the names of {len(stack.layers)} layers are too long for mount(2)")
            mount("overlay", at.target, "overlay", 0, data)
        finally:
            os.chdir(before)


@dataclass(frozen=True, slots=True)
class MountProgram:
    """A program that is called as fuse-overlayfs is: that one, others like it, and ours."""

    name: str
    program: str
    options: tuple[str, ...] = ()
    is_ours: bool = False

    @property
    def version(self) -> str:
        done = subprocess.run(
            [self.program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        first = (done.stdout or done.stderr).splitlines()[:1]
        return first[0] if first else self.program

    def mount(self, stack: Stack, at: Directories, options: Sequence[str]) -> None:
        words = [
            f"lowerdir={format_layers(stack.layers)}",
            f"upperdir={escape_value(at.upper)}",
            f"workdir={escape_value(at.work)}",
            *self.options,
            *options,
        ]
        _run([self.program, "-o", ",".join(words), at.target])


@dataclass(frozen=True, slots=True)
class UnionfsFuse:
    """unionfs-fuse, which is told the branches in an argument of its own."""

    program: str
    name: str = UNIONFS_FUSE
    is_ours: bool = False

    @property
    def version(self) -> str:
        done = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        first = (done.stdout or done.stderr).splitlines()[:1]
        return first[0] if first else self.program

    def mount(self, stack: Stack, at: Directories, options: Sequence[str]) -> None:
        branches = ":".join([f"{at.upper}=RW", *(f"{layer}=RO" for layer in stack.layers)])
        _run([self.program, "-o", "cow,allow_other,use_ino,suid", branches, at.target])


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MOUNT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise BenchError(f"{argv[0]} cannot mount (status {done.returncode}): {said or 'it said nothing'}")


def find_peers(programs: Sequence[str], transport: str, without: Sequence[str] = ()) -> tuple[list[Peer], list[str]]:
    """The file systems to compare, and a line for each that is left out.

    Args:
        programs: the path of one to use in the place of Debian's fuse-overlayfs, and ``NAME=PATH`` of further ones.
        transport: ``direct``, ``pyfuse3`` or ``both``: which of ours.
        without: speed-ups, each of which ours is measured without once more; :data:`ALL_SPEEDUPS` means all at once.
    """
    peers: list[Peer] = [KernelOverlay()]
    missing: list[str] = []
    named = dict(_named_program(text) for text in programs)
    if len(named) < len(programs):
        raise BenchError("two programs after --peer have the same name; write --peer NAME=PATH for each further one")
    if FUSE_OVERLAYFS in named:
        peers.append(MountProgram(FUSE_OVERLAYFS, named.pop(FUSE_OVERLAYFS)))
    elif (found := shutil.which(FUSE_OVERLAYFS)) is not None:
        peers.append(MountProgram(FUSE_OVERLAYFS, found))
    else:
        missing.append("fuse-overlayfs is not installed and left out; run scripts/setup --bench, or give --peer PATH")
    # By its path: our own command `unionfs` may come first in PATH.
    if os.access(program := "/usr/bin/unionfs-fuse", os.X_OK):
        peers.append(UnionfsFuse(program))
    else:
        missing.append("unionfs-fuse is not installed and left out; run: apt-get install unionfs-fuse")
    ours = os.path.join(os.path.dirname(sys.executable), "unionfs-mount")
    if not os.access(ours, os.X_OK):
        raise BenchError(f"there is no {ours}; run scripts/setup")
    for name, word in ((DIRECT, "direct"), (PYFUSE3, "pyfuse3")):
        if transport in (word, "both"):
            peers.append(MountProgram(name, ours, (f"transport={word}",), is_ours=True))
    word = "pyfuse3" if transport == "pyfuse3" else "direct"
    for name in dict.fromkeys(without):
        rest = SPEEDUPS - (SPEEDUPS if name == ALL_SPEEDUPS else {name})
        options = (f"transport={word}", f"speedups={'+'.join(sorted(rest)) or 'off'}")
        peers.append(MountProgram(f"without {name}", ours, options, is_ours=True))
    peers += [MountProgram(name, program) for name, program in named.items()]
    return peers, missing


def _named_program(text: str) -> tuple[str, str]:
    """What ``--peer`` says: a name, and the whole path of a program."""
    name, equals, path = text.rpartition("=")
    found = shutil.which(path)
    if found is None:
        raise BenchError(f"there is no program {path}; give the path of one after --peer")
    if equals and name in ("", KERNEL, UNIONFS_FUSE, DIRECT, PYFUSE3):
        raise BenchError(f"--peer {text}: choose another name than {name or 'none'}")
    return name or FUSE_OVERLAYFS, os.path.abspath(found)
