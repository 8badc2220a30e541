"""The process of a container: what the image says of it, and what a person says instead."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from unionfs.engines.images.model import ImageConfig
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.users import User
from unionfs.errors import RunError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Process:
    """What is started.

    Attributes:
        args: the program and its arguments.
        env: ``NAME=value`` each, every name once.
        cwd: an absolute path in the container.
    """

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User

    @property
    def search(self) -> str:
        """Where the program is looked for."""
        return _values(self.env).get("PATH", DEFAULT_PATH)


def arguments(config: ImageConfig, options: RunOptions) -> tuple[str, ...]:
    """The program and its arguments. As in Docker an entrypoint of one empty text is none.

    Raises:
        RunError: neither the image nor the person says what to run.
    """
    entrypoint = config.entrypoint if options.entrypoint is None else (options.entrypoint,)
    cmd = config.cmd if options.entrypoint is None else ()
    args = (*(entrypoint if entrypoint != ("",) else ()), *(options.command or cmd))
    if not args:
        raise RunError("the image does not say what to run; write a command after it")
    return args


def make_process(config: ImageConfig, options: RunOptions, user: User, hostname: str) -> Process:
    """Put together what is started as ``user``.

    Raises:
        RunError: there is nothing to run, or the working directory is no absolute path.
    """
    defaults = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={hostname}", f"HOME={user.home}"]
    if options.terminal:
        defaults.append("TERM=xterm")
    env = tuple(f"{name}={value}" for name, value in _values([*defaults, *config.env, *options.env]).items())
    cwd = options.workdir or config.working_dir or "/"
    if not cwd.startswith("/"):
        raise RunError(f"working directory {cwd[:200]}: must be an absolute path in the container")
    return Process(arguments(config, options), env, posixpath.normpath(cwd), user)


def _values(env: Iterable[str]) -> dict[str, str]:
    """By name; the last one of a name counts. What is no ``NAME=value`` says nothing."""
    pairs = (word.partition("=") for word in env)
    return {name: value for name, equals, value in pairs if name and equals}
