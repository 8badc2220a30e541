"""Whether a container can run a command at all, found out before it is started.

A runtime reports some of these faults from inside of the container, where they look like the command's own failure.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable

from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import CommandNotExecutableError, CommandNotFoundError

_HEAD_BYTES = 256  # what the kernel reads of a script's first line (linux/binfmts.h: BINPRM_BUF_SIZE)
_BINFMT_MISC = "/proc/sys/fs/binfmt_misc"


def check_command(rootfs: RootFs, command: str, search: str, cwd: str, hidden: Iterable[str]) -> None:
    """Raise if the kernel would not start ``command`` in this container.

    Args:
        rootfs: the container's files, without what will be mounted over them.
        command: the program as it was given.
        search: the container's ``PATH``.
        cwd: its working directory, from which relative paths count.
        hidden: where something will be mounted; what is there is not ours to judge.

    Raises:
        CommandNotFoundError: it is not there, or what should interpret it is not.
        CommandNotExecutableError: it is there and cannot be executed.
    """
    if not command:
        raise CommandNotFoundError("command not found: its name is empty; write one")
    places = [command] if "/" in command else [f"{where or '.'}/{command}" for where in search.split(":")]
    covers = tuple(posixpath.normpath(where) for where in hidden)
    problem = ""
    for place in places:
        path = posixpath.normpath(posixpath.join(cwd, place))
        if any(path == cover or path.startswith(cover.rstrip("/") + "/") for cover in covers):
            return
        try:
            found = rootfs.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                problem = problem or f"{path}: {error.strerror}"
            continue
        if not stat.S_ISREG(found.st_mode):
            problem = problem or f"{path} is no program"
        elif not found.st_mode & 0o111:
            problem = problem or f"{path} has no x permission"
        else:
            _check_format(rootfs, path, covers)
            return
    if problem:
        raise CommandNotExecutableError(f"cannot execute {command[:200]}: {problem} in this image")
    where = "" if "/" in command else f" in PATH ({search})"
    raise CommandNotFoundError(f"command not found: {command[:200]}: it is not{where or ' there'} in this image")


def _check_format(rootfs: RootFs, path: str, covers: tuple[str, ...]) -> None:
    head = rootfs.read(path, _HEAD_BYTES)
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        interpreter = os.fsdecode(words[0]) if words else ""
        if interpreter.startswith("/") and not interpreter.startswith(covers) and not rootfs.exists(interpreter):
            raise CommandNotFoundError(f"command not found: {path} is a script for {interpreter}, not in this image")
    elif not head.startswith(b"\x7fELF") and not _has_formats():
        raise CommandNotExecutableError(f"cannot execute {path}: neither a program nor a script that starts with #!")


def _has_formats() -> bool:
    """Whether this machine was taught formats of programs beside its own (binfmt_misc)."""
    try:
        return bool(set(os.listdir(_BINFMT_MISC)) - {"register", "status"})
    except OSError:
        return False
