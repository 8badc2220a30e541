"""Workloads that look at a tree: walks, attributes, missing names, small files, tar, programs in a chroot.

The loops are Python's, with as little as possible between the system calls. What they cost themselves is the same for
every peer and is not taken off, so a ratio is nearer to 1 than the file systems alone are.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence

from bench_parts.errors import SkippedError
from bench_parts.programs import run_program
from bench_parts.rig import Mounted

_SEED = 5
_PIPE_BYTES = 1 << 20
_PARALLEL = 4
_PYTHON = "usr/bin/python3"
_IMPORTS = (
    "argparse asyncio concurrent.futures csv ctypes dataclasses datetime decimal difflib email.mime.text "
    "email.parser fractions http.client http.cookiejar http.server imaplib inspect json logging.config "
    "logging.handlers multiprocessing.pool optparse pathlib pdb pickle platform pprint smtplib socketserver sqlite3 "
    "ssl statistics tarfile tempfile typing unittest.mock urllib.request uuid wsgiref.simple_server "
    "xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipfile zoneinfo"
)
_IMPORTER = f"""
import importlib
for name in {_IMPORTS.split()!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
"""


def walk(root: str) -> int:
    """List every directory below ``root`` and stat every entry; returns how many there are."""
    seen = 0
    todo = [root]
    while todo:
        with os.scandir(todo.pop()) as listing:
            for entry in listing:
                seen += 1
                if stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                    todo.append(entry.path)
    return seen


def find_cold(mount: Mounted) -> Callable[[], int]:
    """Walk everything."""
    return lambda: walk(mount.target)


def find_warm(mount: Mounted) -> Callable[[], int]:
    """Walk everything a second time."""
    walk(mount.target)
    return lambda: walk(mount.target)


def find_parallel(mount: Mounted) -> Callable[[], int]:
    """Four processes walk everything at the same time."""
    entries = len(mount.stack.contents)

    def run() -> int:
        children = []
        for _ in range(_PARALLEL):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    walk(mount.target)
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
        # All are waited for before anything is said about one of them.
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        if any(ended):
            raise OSError("a walk failed")
        return _PARALLEL * entries

    return run


def stat_cold(mount: Mounted) -> Callable[[], int]:
    """lstat(2) of paths in random order."""
    paths = _sample(mount, list(mount.stack.contents))

    def run() -> int:
        for path in paths:
            os.lstat(path)
        return len(paths)

    return run


def stat_warm(mount: Mounted) -> Callable[[], int]:
    """The same a second time."""
    run = stat_cold(mount)
    run()
    return run


def missing_cold(mount: Mounted) -> Callable[[], int]:
    """lstat(2) of names that are nowhere, in directories all over the tree, each for the first time."""
    chosen = random.Random(_SEED).choices(mount.stack.directories or [""], k=mount.scale.paths)
    paths = [mount.path(os.path.join(directory, f"missing-{i}")) for i, directory in enumerate(chosen)]

    def run() -> int:
        for path in paths:
            try:
                os.lstat(path)
            except FileNotFoundError:
                pass
        return len(paths)

    return run


def missing_warm(mount: Mounted) -> Callable[[], int]:
    """The same names again, as a search path does it."""
    run = missing_cold(mount)
    run()
    return run


def open_cold(mount: Mounted) -> Callable[[], int]:
    """open, read and close small files in random order."""
    paths = _sample(mount, mount.stack.small_files)

    def run() -> int:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.read(fd, 16384)
            os.close(fd)
        return len(paths)

    return run


def open_warm(mount: Mounted) -> Callable[[], int]:
    """The same a second time."""
    run = open_cold(mount)
    run()
    return run


def tar(mount: Mounted) -> Callable[[], int]:
    """GNU tar reads everything, into a pipe: it reads no file when it sees /dev/null."""
    entries = len(mount.stack.contents)

    def run() -> int:
        argv = ["tar", "--create", "--one-file-system", "--numeric-owner", f"--directory={mount.target}", "."]
        buffer = bytearray(_PIPE_BYTES)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0, pipesize=_PIPE_BYTES) as process:
            assert process.stdout is not None
            while os.readv(process.stdout.fileno(), [buffer]):
                pass
        if process.returncode != 0:
            raise OSError(f"tar ended with status {process.returncode}")
        return entries

    return run


def python_cold(mount: Mounted) -> Callable[[], int]:
    """Python of the root file system starts and imports some fifty modules."""
    if _PYTHON not in mount.stack.contents:
        raise SkippedError(f"the root file system has no /{_PYTHON}")
    chroot = shutil.which("chroot", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if chroot is None:
        raise SkippedError("the program chroot is missing")
    argv = [chroot, mount.target, f"/{_PYTHON}", "-I", "-B", "-c", _IMPORTER]

    def run() -> int:
        run_program(argv, {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"})
        return 1

    return run


def python_warm(mount: Mounted) -> Callable[[], int]:
    """The same a second time."""
    run = python_cold(mount)
    run()
    return run


def _sample(mount: Mounted, names: Sequence[str]) -> list[str]:
    source = random.Random(_SEED)
    return [mount.path(name) for name in source.sample(names, min(len(names), mount.scale.paths))]
