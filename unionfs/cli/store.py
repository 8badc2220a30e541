"""``unionfs fsck`` and ``unionfs gc``: the store as a whole."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from unionfs.cli.held_images import images_in
from unionfs.cli.layer_output import (
    OpenMode,
    human_size,
    json_option,
    opened,
    plural,
    print_json,
    print_table,
    printable,
    progress_bar,
    short,
    store_options,
)

if TYPE_CHECKING:
    from unionfs.layers import Garbage


@click.command()
@click.option("--deep", is_flag=True, help="Read every layer and compare it with its digest.")
@click.option("--repair", is_flag=True, help="Remove what is useless. Containers' files are never removed.")
@json_option
@store_options
def fsck(root: str | None, driver: str, deep: bool, repair: bool, as_json: bool) -> int:
    """Check the layers, containers and images. Fails when something is left to be done."""
    from unionfs.engines.run.containers import Containers
    from unionfs.layers import fsck as check

    mode = OpenMode.WRITE if repair else OpenMode.READ
    with opened(root, driver, mode, recover=False, hold_images=False) as store:
        images = images_in(store)
        containers_of_run = Containers(store)
        containers_of_run.claim_trees()
        with progress_bar("checking", None, unit_is_bytes=False) as show:
            found = check(store, deep=deep, repair=repair, progress=lambda _, number, __: show(number))
        found += images.check() if images is not None else []
        found += containers_of_run.check()
        left = sum(1 for problem in found if not problem.repaired)
        if as_json:
            print_json([asdict(problem) for problem in found])
            return 1 if left else 0
        for problem in found:
            state = "repaired" if problem.repaired else problem.advice
            click.echo(f"{problem.kind} {printable(problem.name)}: {printable(problem.what)} [{printable(state)}]")
        layers, containers = len(store.map()), len(store.rw_layers())
        click.echo(
            f"{layers} {plural(layers, 'layer')}, {containers} {plural(containers, 'container')}, "
            f"{len(found)} {plural(len(found), 'problem')}, {left} left."
        )
        if not repair and any(problem.repairable for problem in found):
            click.echo("Run unionfs fsck --repair to remove what is useless.", err=True)
        return 1 if left else 0


@click.command()
@click.option("--layers", is_flag=True, help="Also layers that no container and no other layer stands on.")
@click.option("--dry-run", "-n", is_flag=True, help="Only tell.")
@json_option
@store_options
def gc(root: str | None, driver: str, layers: bool, dry_run: bool, as_json: bool) -> int:
    """Remove what nobody references: what crashes left, and files of no layer."""
    from unionfs.engines.run.containers import Containers
    from unionfs.layers import collect

    mode = OpenMode.READ if dry_run else OpenMode.WRITE
    with opened(root, driver, mode, recover=False) as store:
        containers = Containers(store)
        if not dry_run:
            containers.sweep()
        containers.claim_trees()
        found = collect(store, layers=layers, dry_run=dry_run)
        failed = sum(1 for one in found if one.problem)
        if as_json:
            print_json([asdict(one) for one in found])
            return 1 if failed else 0
        if found:
            print_table(("KIND", "NAME", "SIZE", "WHAT"), [_row(one) for one in found], right=("SIZE",))
        total = human_size(sum(one.size for one in found if not one.problem))
        verb = "would be removed" if dry_run else "removed"
        click.echo(f"{len(found) - failed} {plural(len(found) - failed, 'thing')} {verb}, {total}.")
        if failed:
            click.echo(f"unionfs: {failed} could not be removed, for the reason in the list", err=True)
        return 1 if failed else 0


def _row(one: Garbage) -> tuple[str, str, str, str]:
    name = short(one.name) if one.kind == "layer" else one.name
    return one.kind, name, human_size(one.size), one.problem or one.what
