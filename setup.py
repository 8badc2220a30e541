"""Compiles the path of a request with mypyc when the package is built; all else is said in pyproject.toml.

mypyc makes C of the same modules that mypy checks, which takes some two minutes and shortens Python's part of each
request (measured by scripts/bench). ``UNIONFS_COMPILE=0`` leaves them as they are; both ways do the same.
"""

from __future__ import annotations

import os
from typing import cast

from setuptools import Extension, setup

# From reading a request to the system calls. Not: what runs once for each mount, what hypothesis or a person steps
# through, and what lives on Python's own classes (threads, ctypes).
_COMPILED = """
    direct/answers direct/attributes direct/connection direct/directories direct/files direct/listing direct/names
    direct/packed_attributes direct/passthrough direct/protocol direct/request direct/session direct/short_reads
    direct/transport
    allocation attributes backing_calls changes coldness copy_up copy_up_job copying directory_ahead early_pages
    expected_opens file_ahead inodes last_close layer_dir limited_tree listing lower_stack merged_view metadata need
    open_files origins overlay_format patience placing requests space_limit tree unsynced upper_dir
"""

extensions: list[Extension] = []
if os.environ.get("UNIONFS_COMPILE") != "0":
    from mypyc.build import mypycify

    made = mypycify(
        # What it imports need not be installed where it is built, and how strict mypy is has been settled elsewhere.
        ["--config-file=", "--ignore-missing-imports", *(f"unionfs/fuse_ops/{name}.py" for name in _COMPILED.split())],
        group_name="unionfs",
        opt_level="2",
        debug_level="0",
    )
    extensions = cast("list[Extension]", made)  # setuptools is imported, so that they are its own

setup(ext_modules=extensions)
