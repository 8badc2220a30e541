"""``unionfs serve``: the daemons through which engines use our storage."""

from __future__ import annotations

import click

from unionfs.cli.layer_output import Group
from unionfs.cli.serve_docker import docker_plugin
from unionfs.cli.serve_snapshotter import snapshotter
from unionfs.cli.serve_supervisor import supervisor


@click.group(cls=Group)
def serve() -> None:
    """Serve container engines that run on this machine."""


serve.add_command(docker_plugin)
serve.add_command(snapshotter)
serve.add_command(supervisor)
