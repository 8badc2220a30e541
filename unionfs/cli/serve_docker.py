"""``unionfs serve docker-plugin``: our drivers for an engine that loads graph driver plugins."""

from __future__ import annotations

import logging
import os

import click

_SOCKET_DIRECTORY = "/run/docker/plugins"


@click.command("docker-plugin")
@click.option(
    "--name", default="unionfs", show_default=True, metavar="NAME", help="What the engine's --storage-driver says."
)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    help=f"Where the engine finds it. [default: {_SOCKET_DIRECTORY}/NAME.sock, or the socket that systemd passes]",
)
@click.option(
    "--driver",
    default="unionfs",
    show_default=True,
    metavar="NAME",
    help="The driver to serve: unionfs, overlay2, vfs, or one of an installed package.",
)
@click.option(
    "--storage-opt",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the driver; those of the engine come on top. May be repeated.",
)
@click.option("--home", default="", metavar="DIR", help="Where the layers are. [default: what the engine says]")
@click.option("--debug", is_flag=True, help="Log every call, and where an error comes from.")
def docker_plugin(name: str, path: str | None, driver: str, options: tuple[str, ...], home: str, debug: bool) -> None:
    """Serve Docker (27 and older, with --experimental) as a graph driver plugin.

    Start it before the engine. SIGTERM lets running calls end; mounts stay for the containers in them.
    """
    from unionfs.drivers.registry import default_registry
    from unionfs.drivers.storage_options import split_option
    from unionfs.engines.docker_plugin import app
    from unionfs.engines.docker_plugin.service import GraphDriverService
    from unionfs.engines.docker_plugin.session import SessionFile
    from unionfs.errors import NotSupportedError, OptionError
    from unionfs.fuse_ops.session import logs
    from unionfs.host import sockets

    if not name or "/" in name:
        raise click.UsageError(f"--name {name!r} is not a name for a file")
    if home and not os.path.isabs(home):
        raise click.UsageError(f"--home {home} is not an absolute path")
    try:
        init = default_registry().init_of(driver)
        for option in options:
            split_option(option)
    except (NotSupportedError, OptionError) as error:
        raise click.UsageError(str(error)) from error
    logs.to_stderr(debug, "unionfs docker-plugin")
    listening = sockets.passed() if path is None else None
    listening = listening or sockets.listen(os.path.abspath(path or f"{_SOCKET_DIRECTORY}/{name}.sock"))
    service = GraphDriverService(init, SessionFile(f"{listening.path}.session"), options=options, home=home)
    try:
        logging.getLogger(__name__).info("serving driver %s on %s", driver, listening.path)
        app.run(service, listening)
    finally:
        service.close()
        listening.close()
