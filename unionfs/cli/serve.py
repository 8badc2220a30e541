"""``unionfs serve``: the daemons through which engines use our storage."""

from __future__ import annotations

import click


@click.group()
def serve() -> None:
    """Serve container engines that run on this machine."""
