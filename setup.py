"""Compiles the path of a request with mypyc when the package is built; all else is said in pyproject.toml.

mypyc makes C of the same modules that mypy checks, which takes some two minutes and shortens Python's part of each
request (measured by scripts/bench). ``UNIONFS_COMPILE=0`` leaves them as they are; both ways do the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from setuptools import Extension, setup

# From reading a request to the system calls: these modules of ``unionfs``, and all of these packages.
_COMPILED = """
    fuse_ops/transports/direct fuse_ops/requests fuse_ops/speedups fuse_ops/union fuse_ops/copy_up fuse_ops/tree
    fuse_ops/quota fuse_ops/stack overlay
"""
# Not: what runs once for each mount, what hypothesis or a person steps through, and what lives on Python's own classes
# (threads, ctypes).
_NOT_COMPILED = """
    fuse_ops/requests/threads fuse_ops/speedups/placement fuse_ops/speedups/late_sync fuse_ops/union/renames
    fuse_ops/stack/workdir fuse_ops/stack/locations overlay/idmap
"""


def compiled_modules() -> list[str]:
    """The modules that are compiled, as paths below this directory."""
    package = Path(__file__).resolve().parent / "unionfs"
    left = {package / f"{name}.py" for name in _NOT_COMPILED.split()}
    named = [path for name in _COMPILED.split() for path in (package / f"{name}.py", *(package / name).rglob("*.py"))]
    found = {path for path in named if path.exists()}
    if missing := left - found:
        raise SystemExit(f"setup.py: not in a compiled package: {', '.join(map(str, sorted(missing)))}")
    return sorted(str(path.relative_to(package.parent)) for path in found - left if path.name != "__init__.py")


def extensions() -> list[Extension]:
    """The C extensions that setuptools builds; none with ``UNIONFS_COMPILE=0``."""
    if os.environ.get("UNIONFS_COMPILE") == "0":
        return []
    from mypyc.build import mypycify

    made = mypycify(
        # What it imports need not be installed where it is built, and how strict mypy is has been settled elsewhere.
        ["--config-file=", "--ignore-missing-imports", *compiled_modules()],
        group_name="unionfs",
        opt_level="2",
        debug_level="0",
    )
    return cast("list[Extension]", made)  # setuptools is imported, so that they are its own


if __name__ != "setup":  # the tests ask for the list alone
    setup(ext_modules=extensions())
