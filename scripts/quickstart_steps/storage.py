"""Where the quickstart keeps its files: the cached root file system, and one directory for each run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quickstart_steps.errors import QuickstartError

_LOCK = ".lock"
_CONTENTS = ".contents"
_KEPT = ".kept"


def default_directory() -> str:
    """The system's cache for root, the user's own for everybody else.

    Not root's home: what is built here has the owners of a whole root file system, and homes are backed up.
    """
    if os.geteuid() == 0 and not in_user_namespace():
        return "/var/cache/unionfs"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "unionfs")


def in_user_namespace() -> bool:
    """Whether ids here are not the machine's own."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return re.fullmatch(r"\s*0\s+0\s+4294967295\s*", file.read()) is None


class Storage:
    """The quickstart's directory."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        try:
            os.makedirs(self._runs, mode=0o755, exist_ok=True)
        except OSError as error:
            raise QuickstartError(
                f"cannot write to {self.directory}: {error.strerror}; name another directory with --cache"
            ) from error
        self._remove_abandoned_runs()

    @property
    def _runs(self) -> str:
        return os.path.join(self.directory, "runs")

    @contextmanager
    def run_directory(self, *, keep: bool) -> Iterator[str]:
        """A new directory for one run; removed afterwards unless ``keep``."""
        path = tempfile.mkdtemp(prefix="run-", dir=self._runs)
        os.chmod(path, 0o755)  # programs in the root file system run as its own users
        with _locked(os.path.join(path, _LOCK)):
            if keep:
                with open(os.path.join(path, _KEPT), "w", encoding="utf-8"):
                    pass
            try:
                yield path
            finally:
                if not keep:
                    remove_tree(path)

    def cached(self, name: str, make: Callable[[str], None], *, refresh: bool = False) -> str:
        """The cached directory ``name``; ``make`` is called with a path to create it at when it is not there.

        It appears under its name only when it is complete, so an interrupted ``make`` is started anew. One that is not
        as it was made is made again.
        """
        final = os.path.join(self.directory, name)
        with _locked(os.path.join(self.directory, f"{name}{_LOCK}")):
            partial, old = f"{final}.partial", f"{final}.old"
            for path in (partial, old):  # of one that was killed
                remove_tree(path)
            if refresh or not os.path.isdir(final) or self.contents(name) != _contents(final):
                try:
                    make(partial)
                    digest = _contents(partial)
                    if os.path.isdir(final):
                        os.rename(final, old)
                    os.rename(partial, final)
                    with open(f"{final}{_CONTENTS}", "w", encoding="ascii") as file:
                        file.write(digest)
                finally:
                    for path in (partial, old):
                        remove_tree(path)
        return final

    def contents(self, name: str) -> str:
        """A digest of what was made as the cached directory ``name``; empty where it is not known."""
        try:
            with open(os.path.join(self.directory, f"{name}{_CONTENTS}"), encoding="ascii") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def _remove_abandoned_runs(self) -> None:
        """Remove what runs that were killed left; a run that goes on holds its lock."""
        for entry in list(os.scandir(self._runs)):
            if os.path.exists(os.path.join(entry.path, _KEPT)):
                continue
            try:
                fd = os.open(os.path.join(entry.path, _LOCK), os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # it is being made or removed at this moment
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(entry.path)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)


def remove_tree(path: str) -> None:
    """Remove a directory tree if it is there, also one with directories that their owner may not write."""

    def make_writable(function: Callable[[str], object], failed: str, _: object) -> None:
        os.chmod(os.path.dirname(failed), 0o700)
        function(failed)

    if os.path.lexists(path):
        shutil.rmtree(path, onerror=make_writable)


def _contents(root: str) -> str:
    """A digest of the names, kinds, owners, sizes and times in a tree: what anybody who changes it changes too."""
    total = hashlib.sha256()
    for directory, directories, files in os.walk(os.fsencode(root)):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(directory, name)
            info = os.lstat(path)
            facts = f"{info.st_mode} {info.st_uid} {info.st_gid} {info.st_size} {info.st_mtime_ns}\0"
            total.update(os.path.relpath(path, os.fsencode(root)) + b"\0" + facts.encode())
    return total.hexdigest()


@contextmanager
def _locked(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
