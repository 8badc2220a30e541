"""``unionfs volume``: named volumes of ``unionfs run``."""

from __future__ import annotations

from collections.abc import Sequence

import click

from unionfs.cli.layer_output import Group, OpenMode, json_option, opened, print_json, print_table, store_options


@click.group(cls=Group)
def volume() -> None:
    """Look after named volumes, which unionfs run -v NAME:/DIR makes. They stay when their containers go."""


@volume.command("ls")
@json_option
@store_options
def list_volumes(root: str | None, driver: str, as_json: bool) -> None:
    """List the volumes, and which containers have them."""
    from unionfs.engines.run.containers import Containers
    from unionfs.engines.run.volumes import Volumes, root_of

    with opened(root, driver, OpenMode.LOOK) as store:
        containers = Containers(store)
        found = [(one, containers.users_of(one.name)) for one in Volumes(root_of(store)).all()]
    if as_json:
        print_json([{"name": one.name, "path": one.path, "containers": users} for one, users in found])
    elif found:
        rows = [(one.name, one.path, ", ".join(users) or "-") for one, users in found]
        print_table(("NAME", "DIRECTORY", "CONTAINERS"), rows, whole=("NAME",))
    else:
        click.echo("There are no volumes.")


@volume.command()
@store_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(root: str | None, driver: str, names: Sequence[str]) -> None:
    """Remove volumes that no container has, with their files."""
    from unionfs.engines.run.containers import Containers
    from unionfs.engines.run.volumes import Volumes, root_of

    with opened(root, driver) as store:
        containers, volumes = Containers(store), Volumes(root_of(store))
        for name in names:
            volumes.remove(name, next(iter(containers.users_of(name)), ""))
