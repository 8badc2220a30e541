"""``unionfs serve supervisor``: servers that are ready before they are asked for."""

from __future__ import annotations

import os
import sys

import click

from unionfs.errors import ListenError
from unionfs.fuse_ops.session.supervisor import client
from unionfs.fuse_ops.session.supervisor.daemon import command


@click.command()
@click.option("--socket", "path", metavar="PATH", help="Where to listen. [default: where unionfs-mount looks for it]")
@click.option(
    "--idle",
    "idle_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=0,
    help="End after so long without a request. [default: stay]",
)
def supervisor(path: str | None, idle_s: float) -> None:
    """Keep a server ready, so that a mount takes milliseconds and most of its memory is shared.

    Everything that mounts, unionfs-mount and the graph drivers, uses it when it runs and does without when it does
    not. A socket that systemd passes (LISTEN_FDS) is used in place of --socket. Mounts live on when this ends.
    """
    if path is None and os.environ.get("LISTEN_PID") != str(os.getpid()):
        found = client.socket_paths(os.environb)
        paths = [place for place in found if os.access(os.path.dirname(os.path.dirname(place)), os.W_OK)]
        if not paths:
            raise ListenError("there is no place for the socket; set XDG_RUNTIME_DIR, or name one with --socket")
        path = os.fsdecode(paths[0])
    os.execv(sys.executable, command(None if path is None else os.path.abspath(path), idle_s))
