"""``unionfs run`` and ``unionfs container start``: containers without an engine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from unionfs.cli.layer_output import find_layer, store_options, wait_for_store
from unionfs.errors import CommandNotExecutableError, CommandNotFoundError, UnionfsError

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
@click.option("-i", "--interactive", is_flag=True, help="Pass on the standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal, which is ours; for shells: -it.")
@click.option(
    "-v",
    "--volume",
    "volumes",
    multiple=True,
    metavar="SRC:DST[:ro]",
    help="Show SRC of this host as DST; z is ignored.",
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
) -> int:
    """Run a command in a new container of IMAGE, and wait for its end.

    Without a command the image's own is run. Exit status: the command's; 128 + N when signal N ended it; 125 when the
    container cannot be run, 126 when the command cannot be executed, 127 when there is no such command.
    """

    with _statuses() as ended:
        from unionfs.engines.run.options import (
            RunOptions,
            parse_env,
            parse_hostname,
            parse_tmpfs,
            parse_volume,
            read_env_file,
        )
        from unionfs.engines.run.privileges import choose_capabilities
        from unionfs.engines.run.records import Record

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
        )

        def prepare(store: LayerStore, containers: Containers) -> Ready:
            chain_id, config = _stands_on(store, image, is_layer)
            record = Record(name=name, image=image, config=config, options=options, remove=remove)
            return containers.prepare_new(record, chain_id, runtime)

        ended.append(_run(root, driver, prepare))
    return ended[0]


@click.command(context_settings={"allow_interspersed_args": False})
@_runtime_option
@store_options
@click.argument("name")
def start(root: str | None, driver: str, runtime: str, name: str) -> int:
    """Start a container of 'unionfs run' again, with the same options, and wait for its end."""
    with _statuses() as ended:
        ended.append(_run(root, driver, lambda _, containers: containers.prepare(containers.find(name), runtime)))
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


def _run(root: str | None, driver: str, prepare: Callable[[LayerStore, Containers], Ready]) -> int:
    """Prepare a container, run it and clean up, with the store open before and after."""
    from unionfs.engines.run.containers import Containers, open_when_free
    from unionfs.engines.run.foreground import run_in_foreground
    from unionfs.engines.run.guard import Guard
    from unionfs.engines.run.user_namespace import is_rootless, must_enter, run_inside
    from unionfs.layers import open_store

    if must_enter():
        return run_inside([sys.executable, *sys.orig_argv[1:]])
    rootless = is_rootless()

    def clean_up() -> None:
        with open_when_free(root, driver) as store:
            Containers(store, rootless=rootless).sweep()

    with Guard(clean_up):
        with open_store(root, driver, wait=wait_for_store) as store:
            containers = Containers(store, rootless=rootless)
            containers.sweep()
            ready = prepare(store, containers)
        try:
            return run_in_foreground(ready)
        finally:
            # A second ^C must not keep us from it; what stops us for good leaves it to the guard.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
            with open_when_free(root, driver) as store:
                Containers(store, rootless=rootless).finish(ready.place)


@contextmanager
def _statuses() -> Iterator[list[int]]:
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
        click.echo(f"unionfs: {text}".replace("\n", "\\n"), err=True)
        ended.append(
            _NOT_FOUND
            if isinstance(error, CommandNotFoundError)
            else _NOT_EXECUTABLE
            if isinstance(error, CommandNotExecutableError)
            else _FAILED
        )
