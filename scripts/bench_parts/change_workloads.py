"""Workloads that change a tree: unpacking, deleting, changing owners, creating, git."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from bench_parts.generated import TREE
from bench_parts.programs import run_program
from bench_parts.rig import Mounted

_GIT = ("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")
_GIT_ENVIRONMENT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}


def untar(mount: Mounted) -> Callable[[], int]:
    """GNU tar unpacks thousands of small files; the archive is in memory."""
    with open(mount.stack.archive, "rb") as file:
        while file.read(1 << 20):
            pass
    argv = ["tar", "--extract", f"--file={mount.stack.archive}", f"--directory={mount.target}"]
    return lambda: _program(argv, mount.scale.tree_files)


def remove(mount: Mounted) -> Callable[[], int]:
    """rm -rf of a tree that lies in lower layers."""
    return lambda: _program(["rm", "-rf", mount.path(TREE)], mount.scale.tree_files)


def change_owner(mount: Mounted) -> Callable[[], int]:
    """chown -R of a tree that lies in lower layers."""
    return lambda: _program(["chown", "-R", "1000:1000", mount.path(TREE)], mount.scale.tree_files)


def create_unlink(mount: Mounted) -> Callable[[], int]:
    """Create empty files in one directory, then unlink them all."""
    directory = mount.path("created")
    os.mkdir(directory)
    paths = [os.path.join(directory, f"f{number}") for number in range(mount.scale.tree_files)]

    def run() -> int:
        for path in paths:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        for path in paths:
            os.unlink(path)
        return len(paths)

    return run


def git(mount: Mounted) -> Callable[[], int]:
    """git init, add, commit and status of a tree that lies in lower layers."""
    here = (*_GIT, "-C", mount.path(TREE))

    def run() -> int:
        for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all"), ("status", "--short")):
            _program([*here, *words], 1)
        return mount.scale.tree_files

    return run


def _program(argv: Sequence[str], operations: int) -> int:
    run_program(argv, os.environ | _GIT_ENVIRONMENT)
    return operations
