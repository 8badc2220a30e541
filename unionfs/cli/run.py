"""``unionfs run`` and ``unionfs container start``: containers without an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from unionfs.cli.layer_output import find_layer, printable, store_options, wait_for_store
from unionfs.engines.run.detached import in_background, is_in_background, tell_started
from unionfs.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    ImageNotFoundError,
    NotSupportedError,
    RunError,
    StoreNotFoundError,
    UnionfsError,
)

if TYPE_CHECKING:
    from unionfs.engines.images.model import ImageConfig
    from unionfs.engines.run.containers import Containers, Ready
    from unionfs.layers import LayerStore

# Docker's exit statuses for what is not the container's own end.
_FAILED = 125
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127

_runtime_option = click.option(
    "--runtime", metavar="NAME", envvar="UNIONFS_RUNTIME", default="", help="crun or runc. [default: what is there]"
)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--name", metavar="NAME", default="", help="[default: a random one]")
@click.option("--rm", "remove", is_flag=True, help="Remove the container when it ends.")
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background, and print its name.")
@click.option(
    "--pull",
    "when",
    type=click.Choice(["missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to fetch the image from its registry.",
)
@click.option("-i", "--interactive", is_flag=True, help="Pass on the standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal, which is ours; for shells: -it.")
@click.option(
    "-v",
    "--volume",
    "volumes",
    multiple=True,
    metavar="SRC:DST[:ro]",
    help="Show SRC of this host, or the volume of that name, as DST; z and Z are ignored.",
)
@click.option("--tmpfs", "tmpfs", multiple=True, metavar="DST[:OPTIONS]", help="Memory as DST; OPTIONS as size=64m.")
@click.option("--read-only", is_flag=True, help="Refuse changes, but in volumes and tmpfs.")
@click.option("-e", "--env", "env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable, or pass ours on.")
@click.option("--env-file", "env_files", multiple=True, metavar="FILE", help="Set the variables in FILE.")
@click.option("-w", "--workdir", metavar="DIR", default="", help="[default: the image's]")
@click.option("-u", "--user", metavar="USER[:GROUP]", default="", help="Names or numbers. [default: the image's]")
@click.option("--entrypoint", metavar="PROGRAM", default=None, help="Instead of the image's; empty for none.")
@click.option("--hostname", metavar="NAME", default="", help="[default: the start of the container's id]")
@click.option(
    "--network", type=click.Choice(["host", "none"]), default="host", help="none: only loopback. [default: host]"
)
@click.option("--init", is_flag=True, help="Run under a process 1 that passes signals on and reaps (catatonit).")
@click.option("--cap-add", multiple=True, metavar="NAME", help="Give root a capability, or ALL.")
@click.option("--cap-drop", multiple=True, metavar="NAME", help="Take a capability away, or ALL.")
@click.option("--no-new-privileges", is_flag=True, help="Setuid programs give none.")
@click.option("--no-seccomp", is_flag=True, help="Refuse no system call.")
@click.option("-m", "--memory", metavar="SIZE", default="", help="What its processes may have together, as 512m.")
@click.option("--cpus", type=float, metavar="N", default=0.0, help="How many processors' time they may use, as 1.5.")
@click.option("--pids-limit", type=int, metavar="N", default=0, help="How many processes it may have.")
@click.option("--layer", "is_layer", is_flag=True, help="IMAGE is a layer's chain id, or the start of one.")
@_runtime_option
@store_options
@click.argument("image", metavar="IMAGE")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND [ARG]...]")
def run(
    root: str | None,
    driver: str,
    image: str,
    command: Sequence[str],
    runtime: str,
    is_layer: bool,
    name: str,
    remove: bool,
    interactive: bool,
    tty: bool,
    volumes: Sequence[str],
    tmpfs: Sequence[str],
    read_only: bool,
    env: Sequence[str],
    env_files: Sequence[str],
    workdir: str,
    user: str,
    entrypoint: str | None,
    hostname: str,
    network: str,
    init: bool,
    cap_add: Sequence[str],
    cap_drop: Sequence[str],
    no_new_privileges: bool,
    no_seccomp: bool,
    detach: bool,
    when: str,
    memory: str,
    cpus: float,
    pids_limit: int,
) -> int:
    """Run a command in a new container of IMAGE, and wait for its end, unless it is to stay in the background (-d).

    Without a command the image's own is run. Exit status: the command's; 128 + N when signal N ended it; 125 when the
    container cannot be run, 126 when the command cannot be executed, 127 when there is no such command.
    """

    with exit_statuses() as ended:
        from unionfs.engines.run.options import (
            RunOptions,
            check_limits,
            parse_env,
            parse_hostname,
            parse_tmpfs,
            parse_volume,
            read_env_file,
        )
        from unionfs.engines.run.privileges import choose_capabilities
        from unionfs.engines.run.records import Record

        if detach and tty:
            raise RunError("a container in the background has no terminal; leave -t out, and use container exec -it")
        memory_bytes, cpus, pids_limit = check_limits(memory, cpus, pids_limit)
        options = RunOptions(
            command=tuple(command),
            entrypoint=entrypoint,
            env=parse_env([*(line for path in env_files for line in read_env_file(path)), *env], os.environ),
            workdir=workdir,
            user=user,
            hostname=parse_hostname(hostname) if hostname else "",
            network="none" if network == "none" else "host",
            volumes=tuple(parse_volume(text) for text in volumes),
            tmpfs=tuple(parse_tmpfs(text) for text in tmpfs),
            read_only=read_only,
            interactive=interactive,
            terminal=tty,
            init=init,
            capabilities=choose_capabilities(cap_add, cap_drop),
            new_privileges=not no_new_privileges,
            seccomp=not no_seccomp,
            memory_bytes=memory_bytes,
            cpus=cpus,
            pids_limit=pids_limit,
        )
        again = is_in_background() or "UNIONFS_IN_USER_NAMESPACE" in os.environ

        def prepare(store: LayerStore, containers: Containers) -> Ready:
            chain_id, config = _stands_on(store, image, is_layer)
            record = Record(name=name, image=image, config=config, options=options, remove=remove)
            return containers.prepare_new(record, chain_id, runtime)

        there = is_layer or again or _pulled(root, driver, image, when)
        ended.append(_run(root, driver, prepare, detach=detach) if there else _FAILED)
    return ended[0]


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background, and print its name.")
@_runtime_option
@store_options
@click.argument("name")
def start(root: str | None, driver: str, detach: bool, runtime: str, name: str) -> int:
    """Start a container of 'unionfs run' again, with the same options, and wait for its end, unless -d is given."""
    with exit_statuses() as ended:

        def prepare(_: LayerStore, containers: Containers) -> Ready:
            place = containers.find(name)
            if detach and place.record().options.terminal:
                raise RunError(f"container {name} was made with a terminal (-t), which there is none in the background")
            return containers.prepare(place, runtime)

        ended.append(_run(root, driver, prepare, detach=detach))
    return ended[0]


def _stands_on(store: LayerStore, image: str, is_layer: bool) -> tuple[str, ImageConfig]:
    """(chain id, configuration) of what the person named."""
    from unionfs.engines.images.model import ImageConfig
    from unionfs.engines.images.store import ImageStore
    from unionfs.engines.run.process import foreign_machine

    if is_layer:
        return find_layer(store, image).chain_id, ImageConfig.model_validate({})
    found = ImageStore(store).get(image)
    if warning := foreign_machine(found.platform):
        click.echo(f"unionfs: warning: {warning}", err=True)
    return found.chain_id, found.config


def _pulled(root: str | None, driver: str, image: str, when: str) -> bool:
    """Fetch the image if it is to be: by a command of its own, which an ordinary user has go on elsewhere.

    Returns:
        Whether it is there now; if not, the command has said why.
    """
    from unionfs.engines.images.store import ImageStore
    from unionfs.layers import open_store

    if when == "never":
        return True
    if when == "missing":
        # To look makes no store, which may be another user's, inside of a user namespace.
        with suppress(ImageNotFoundError, StoreNotFoundError, NotSupportedError):
            with open_store(root, driver, read_only=True) as store:
                ImageStore(store).get(image)
            return True
    words = [*(["--root", root] if root else []), *(["--driver", driver] if driver else []), "--", image]
    command = [sys.executable, "-m", "unionfs.cli.main", "image", "pull", *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False).returncode == 0


def _run(
    root: str | None, driver: str, prepare: Callable[[LayerStore, Containers], Ready], *, detach: bool = False
) -> int:
    """Prepare a container, run it and clean up, with the store open before and after."""
    if not detach:
        return _run_here(root, driver, prepare)

    def run_here() -> int:
        with exit_statuses() as ended:
            ended.append(_run_here(root, driver, prepare))
        return ended[0]

    return in_background(run_here)


def _run_here(root: str | None, driver: str, prepare: Callable[[LayerStore, Containers], Ready]) -> int:
    from unionfs.engines.run.containers import Containers, open_when_free
    from unionfs.engines.run.guard import Guard
    from unionfs.engines.run.user_namespace import is_rootless, must_enter, run_inside
    from unionfs.layers import open_store

    if must_enter():
        return run_inside([sys.executable, *sys.orig_argv[1:]])
    rootless = is_rootless()

    def clean_up() -> None:
        with open_when_free(root, driver) as store:
            Containers(store, rootless=rootless).sweep()

    with Guard(clean_up) as guard:
        try:
            opened = open_store(root, driver, wait=wait_for_store)
        except BaseException:
            guard.dismiss()  # it would wait for the store that the person has given up to wait for
            raise
        with opened as store:
            containers = Containers(store, rootless=rootless)
            containers.sweep()
            ready = prepare(store, containers)
        try:
            status = _run_ready(ready)
            ready.place.note_end(status)
            return status
        finally:
            # A second ^C must not keep us from it; what stops us for good leaves it to the guard.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
            with open_when_free(root, driver) as store:
                Containers(store, rootless=rootless).finish(ready.place)


def _run_ready(ready: Ready) -> int:
    from unionfs.engines.run.foreground import run_in_foreground

    if not is_in_background():
        return run_in_foreground(ready)
    output = os.open(ready.place.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return run_in_foreground(ready, output, lambda: tell_started(ready.name))
    finally:
        os.close(output)


@contextmanager
def exit_statuses() -> Iterator[list[int]]:
    """Our errors get exit statuses that can be told from the command's; the block appends its own to the list."""
    ended: list[int] = []
    try:
        yield ended
    except (UnionfsError, OSError) as error:
        if "UNIONFS_DEBUG" in os.environ:
            raise
        text = str(error)
        if isinstance(error, OSError) and not isinstance(error, UnionfsError):
            text = f"{os.fsdecode(error.filename or 'run')}: {error.strerror or error}"
        click.echo(printable(f"unionfs: {text}"), err=True)
        ended.append(
            _NOT_FOUND
            if isinstance(error, CommandNotFoundError)
            else _NOT_EXECUTABLE
            if isinstance(error, CommandNotExecutableError)
            else _FAILED
        )
