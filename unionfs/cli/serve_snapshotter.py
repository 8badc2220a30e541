"""``unionfs serve snapshotter``: containerd's snapshots service."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

import click

from unionfs.errors import OptionError

_STOP_S = 10.0


@click.command()
@click.option(
    "--root",
    metavar="DIR",
    default="/var/lib/unionfs/snapshotter",
    show_default=True,
    help="Directory for all snapshots.",
)
@click.option(
    "--socket",
    "address",
    metavar="PATH",
    default="/run/unionfs/snapshotter.sock",
    show_default=True,
    help="The socket that containerd's configuration names.",
)
@click.option(
    "-o", "mount_options", multiple=True, metavar="OPTION[,...]", help="For every mount: docs/unionfs-mount.md."
)
@click.option(
    "--overlay-unpack/--no-overlay-unpack",
    default=True,
    show_default=True,
    help="Let containerd unpack layers into their directories, without a mount.",
)
@click.option(
    "--share-layers",
    is_flag=True,
    help="Unpack a layer once for all of containerd's namespaces. What it costs: docs/containerd.md.",
)
def snapshotter(root: str, address: str, mount_options: Sequence[str], overlay_unpack: bool, share_layers: bool) -> int:
    """Serve containerd's snapshots, also those of nerdctl, Docker and Kubernetes.

    It stays in the foreground. Containers run on while it is restarted. docs/containerd.md has the whole set-up.
    """
    # Here and not at the top: gRPC takes longer to import than other commands to run.
    from unionfs.engines.snapshotter import UnionSnapshotter
    from unionfs.engines.snapshotter.service import SocketServer, make_handler

    options = _checked(mount_options)
    debug = "UNIONFS_DEBUG" in os.environ
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, format="unionfs: %(message)s", force=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = UnionSnapshotter(root, options, overlay_unpack=overlay_unpack, share_layers=share_layers)
    try:
        server = SocketServer(address, make_handler(store))
        server.start()
        click.echo(f"unionfs: serving snapshots of {store.root} on {server.path}", err=True)
        _tell_systemd("READY=1")
        stop.wait()
        _tell_systemd("STOPPING=1")
        server.stop(_STOP_S)
    finally:
        store.close()
    return 0


def _checked(options: Sequence[str]) -> tuple[str, ...]:
    """The options, known to be right: otherwise every mount would fail later."""
    from unionfs.fuse_ops.session.option_text import parse_options

    # Directories of ours come first, as they will for a mount, so that others are refused.
    parsed = parse_options([",".join(("lowerdir=/,upperdir=/,workdir=/", *options))])
    if parsed.ignored:
        raise OptionError(f"-o {','.join(parsed.ignored)}: is no mount option; see docs/unionfs-mount.md")
    if parsed.options.read_only:
        raise OptionError("-o ro: containers could not write their files; leave it out")
    return tuple(options)


def _tell_systemd(state: str) -> None:
    """Tell the service manager that started us, if one did (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # a name that is not in the file system
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto(state.encode(), address)
    except OSError as error:
        print(f"unionfs: cannot tell systemd {state}: {error.strerror}", file=sys.stderr)
