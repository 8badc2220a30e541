"""What a person may say about a container that is to be run, checked before anything is made."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from unionfs.errors import RunError
from unionfs.fuse_ops.session.option_text import parse_size

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?\Z")  # 64 is the kernel's limit
_LEAST_MEMORY_BYTES = 6 << 20  # Docker's; a runtime itself needs some
_LEAST_CPUS = 0.01  # the kernel's least quota is 1 ms of a period of 100 ms
VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}\Z")
"""Docker's rule (daemon/names, ``RestrictedNamePattern``), and the length of a file's name."""
# nosuid and nodev are always in force.
_TMPFS_OPTION = re.compile(
    r"((size|nr_inodes|nr_blocks|mode|uid|gid)=[0-9]+[kmg%]?|ro|rw|noexec|exec|nosuid|nodev|noatime|nodiratime|relatime)\Z",
    re.I,
)
# What is written for other machines: labels of SELinux, under which our containers are not confined; Docker Desktop's
# promises of how soon changes are seen; Docker's way to leave a named volume empty; how mounts go on, which is so here.
_VOLUME_NO_OPTIONS = frozenset(("z", "Z", "cached", "consistent", "delegated", "nocopy", "rslave"))


class Volume(BaseModel):
    """A directory or file of the host shown in the container.

    Attributes:
        source: its absolute path on the host; of a named volume it is known once there is a container.
        destination: its absolute path in the container.
        name: of a named volume.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    destination: str
    read_only: bool = False
    name: str = ""


class Tmpfs(BaseModel):
    """An empty file system in memory.

    Attributes:
        destination: its absolute path in the container.
        options: of the mount, such as ``size=64m``.
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    options: tuple[str, ...] = ()


class RunOptions(BaseModel):
    """Everything that is not the image's; kept with the container, which is started again with the same.

    Attributes:
        command: replaces the image's ``cmd``; empty leaves it.
        entrypoint: replaces the image's entrypoint and drops its ``cmd``; None leaves both, ``""`` is none.
        env: ``NAME=value`` each, over the image's.
        workdir, user: replace the image's; empty leaves them.
        hostname: empty for one made from the container's id.
        network: the host's, or an own one that has nothing but a loopback device.
        init: run the command under a small process 1 that reaps children and passes signals on.
        capabilities: names without ``CAP_``, such as ``NET_RAW``; None for the default ones.
        new_privileges: whether setuid programs and file capabilities give any.
        seccomp: refuse the system calls of :mod:`unionfs.engines.run.privileges`.
        memory_bytes, pids_limit: what all processes together may have; 0 for no limit.
        cpus: how many processors' time they may use; 0 for no limit.
    """

    model_config = ConfigDict(frozen=True)

    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    hostname: str = ""
    network: Literal["host", "none"] = "host"
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    read_only: bool = False
    interactive: bool = False
    terminal: bool = False
    init: bool = False
    capabilities: tuple[str, ...] | None = None
    new_privileges: bool = True
    seccomp: bool = True
    memory_bytes: int = 0
    cpus: float = 0.0
    pids_limit: int = 0

    @property
    def destinations(self) -> tuple[str, ...]:
        """Where something is shown in the container that is not in its image."""
        return (*(one.destination for one in self.volumes), *(one.destination for one in self.tmpfs))


def parse_volume(text: str) -> Volume:
    """The volume that ``SOURCE:DESTINATION[:OPTION,...]`` means; a relative source counts from the working directory.

    A source without a slash is the name of a volume.

    Raises:
        RunError: it is written differently, or there is no such source.
    """
    source, _, rest = text.partition(":")
    destination, colon, given = rest.partition(":")
    if not source or not destination or (colon and not given):
        raise RunError(f"volume {text[:200]}: write SOURCE:DESTINATION or SOURCE:DESTINATION:ro")
    options = set(given.split(",")) if given else set()
    if unknown := options - {"ro", "rw"} - _VOLUME_NO_OPTIONS:
        raise RunError(f"volume {text[:200]}: there is no option {min(unknown)!r}; use ro, rw or z")
    if {"ro", "rw"} <= options:
        raise RunError(f"volume {text[:200]}: choose one of ro and rw")
    shown = _destination(destination, f"volume {text[:200]}")
    if "/" not in source and source not in (".", ".."):
        check_volume_name(source)
        return Volume(source="", destination=shown, read_only="ro" in options, name=source)
    path = os.path.abspath(source)
    if not os.path.exists(path):
        raise RunError(f"volume {text[:200]}: there is no {path}; make it first")
    return Volume(source=path, destination=shown, read_only="ro" in options)


def check_volume_name(name: str) -> None:
    """Raises :class:`RunError` for what cannot be the name of a volume."""
    if VOLUME_NAME.match(name) is None:
        raise RunError(
            f"volume {name[:100]!r}: a name has letters, digits, '_', '.' and '-'; of a directory write its path"
        )


def check_limits(memory: str, cpus: float, pids: int) -> tuple[int, float, int]:
    """(bytes, processors, processes) that a person wants a container to be held to; 0 each for no limit.

    Raises:
        RunError: it is written differently.
        OptionError: ``memory`` is no size.
    """
    memory_bytes = parse_size(memory) if memory else 0
    if memory and memory_bytes < _LEAST_MEMORY_BYTES:
        raise RunError(f"--memory {memory}: no container can be started with less than 6m")
    if cpus and not _LEAST_CPUS <= cpus <= (os.cpu_count() or 1):
        raise RunError(f"--cpus {cpus:g}: this machine has {os.cpu_count()}, and {_LEAST_CPUS:g} is the least")
    return memory_bytes, cpus, max(pids, 0)


def parse_tmpfs(text: str) -> Tmpfs:
    """The file system that ``DESTINATION[:OPTION,...]`` means.

    Raises:
        RunError: it is written differently.
    """
    destination, _, given = text.partition(":")
    options = tuple(option for option in given.split(",") if option)
    for option in options:
        if _TMPFS_OPTION.match(option) is None:
            raise RunError(f"tmpfs {text[:200]}: there is no option {option}; use size=64m, mode=1777, ro or noexec")
    return Tmpfs(destination=_destination(destination, f"tmpfs {text[:200]}"), options=options)


def parse_hostname(text: str) -> str:
    """``text`` if it may be a host name.

    Raises:
        RunError: it may not.
    """
    if _HOSTNAME.match(text) is None:
        raise RunError(f"hostname {text[:100]}: use letters, digits, '-' and '.', 64 at most")
    return text


def parse_env(variables: Iterable[str], own: Mapping[str, str]) -> tuple[str, ...]:
    """``NAME=value`` as it is, ``NAME`` with the value that it has here, or left out where it has none.

    Args:
        variables: as they were given, the last one of a name counts.
        own: our environment.

    Raises:
        RunError: one without a name.
    """
    found = []
    for variable in variables:
        name, equals, _ = variable.partition("=")
        if not name or any(c.isspace() for c in name):
            raise RunError(f"environment {variable[:100]!r}: write NAME=value, or NAME to pass on what it is here")
        if equals:
            found.append(variable)
        elif name in own:
            found.append(f"{name}={own[name]}")
    return tuple(found)


def read_env_file(path: str) -> list[str]:
    """The variables of a file with one on each line; empty lines and those that begin with ``#`` are left out.

    Raises:
        RunError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\r\n").lstrip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RunError(f"environment file {path}: {reason}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _destination(text: str, what: str) -> str:
    path = posixpath.normpath(text)
    if not path.startswith("/") or path.strip("/") == "":
        raise RunError(f"{what}: {text or 'the destination'} must be an absolute path in the container, not its root")
    return "/" + path.lstrip("/")
