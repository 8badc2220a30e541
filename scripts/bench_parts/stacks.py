"""The stacks of layers that every peer mounts: a Debian in 5 and in 120 layers, and generated ones."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from bench_parts import generated
from bench_parts.errors import BenchError
from bench_parts.scale import Scale
from bench_parts.splitting import deep_split, image_split, write_layers
from quickstart_steps.apt_sources import machine_archives, transport_settings
from quickstart_steps.progress import step
from quickstart_steps.storage import Storage, remove_tree

SUITE = "bookworm"
_INCLUDED = "python3"  # for the workload that starts it
_SMALL_FILE_BYTES = 16384


@dataclass(frozen=True)
class Stack:
    """Layers, top first, and what is in them."""

    name: str
    layers: tuple[str, ...]
    archive: str = ""

    @cached_property
    def contents(self) -> dict[str, os.stat_result]:
        """Every path in the merged tree with its attributes, in the order of their names."""
        found: dict[str, os.stat_result] = {}
        for layer in self.layers:
            todo = [""]
            while todo:
                directory = todo.pop()
                for entry in os.scandir(os.path.join(layer, directory)):
                    path = os.path.join(directory, entry.name)
                    found.setdefault(path, entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(path)
        return dict(sorted(found.items()))

    @cached_property
    def directories(self) -> list[str]:
        """The paths of the directories."""
        return [path for path, info in self.contents.items() if stat.S_ISDIR(info.st_mode)]

    @cached_property
    def small_files(self) -> list[str]:
        """The paths of regular files that are read at once."""
        return [
            path
            for path, info in self.contents.items()
            if stat.S_ISREG(info.st_mode) and 0 < info.st_size <= _SMALL_FILE_BYTES
        ]


@dataclass(frozen=True, slots=True)
class Stacks:
    """All of them."""

    debian: Stack
    deep: Stack
    files: Stack
    title: str = field(default="")

    def __getitem__(self, name: str) -> Stack:
        return {"debian": self.debian, "deep": self.deep, "files": self.files}[name]


def prepare(storage: Storage, scale: Scale, rootfs: str | None, run_directory: str) -> Stacks:
    """Make the stacks, or find them in the cache; ``rootfs`` is split instead of a Debian when it is given."""
    depth = scale.deep_layers
    if rootfs is None:
        sources = machine_archives().lines(SUITE)
        digest = hashlib.sha256("\n".join([*sources, _INCLUDED]).encode()).hexdigest()[:8]
        title = f"Debian {SUITE} ({platform.machine()}, minimal, with {_INCLUDED})"
        name = f"bench-{SUITE}-{platform.machine()}-{digest}"
        root = storage.cached(name, lambda into: _build(into, title, sources))
        split = storage.cached(f"{name}-layers-{depth}", lambda into: _split(root, into, depth))
    else:
        title = rootfs
        split = os.path.join(run_directory, "layers")
        _split(os.path.realpath(rootfs), split, depth)
    files = storage.cached(f"bench-generated-{scale.name}-1", _with_step(f"Generating files ({scale.name})", scale))
    return Stacks(
        Stack("debian", _numbered(os.path.join(split, "image"))),
        Stack("deep", _numbered(os.path.join(split, "deep"))),
        Stack("files", generated.layers_in(files), os.path.join(files, generated.ARCHIVE)),
        title,
    )


def _with_step(title: str, scale: Scale) -> Callable[[str], None]:
    def make(into: str) -> None:
        with step(title):
            generated.make(into, scale)

    return make


def _split(root: str, into: str, depth: int) -> None:
    with step("Splitting the root file system into layers"):
        try:
            write_layers(root, image_split(root), os.path.join(into, "image"))
            write_layers(root, deep_split(root, depth), os.path.join(into, "deep"))
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchError(f"cannot split {root} into layers ({error}); give a readable directory") from error


def _numbered(directory: str) -> tuple[str, ...]:
    return tuple(os.path.join(directory, name) for name in sorted(os.listdir(directory), key=int))


def _build(into: str, title: str, sources: list[str]) -> None:
    if shutil.which("mmdebstrap") is None:
        raise BenchError("mmdebstrap is missing; run scripts/setup, or give a root file system with --rootfs")
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={_INCLUDED}"]
    argv += [f"--aptopt={setting}" for setting in transport_settings()]
    with step(f"Building {title}"):
        done = subprocess.run(
            [*argv, SUITE, into, *sources], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        remove_tree(into)
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
        raise BenchError(
            f"mmdebstrap could not build {title} ({' '.join(said)}); check the network and {sources[0].split()[2]}, "
            "or give a root file system with --rootfs"
        )
