"""``unionfs container``: read-write layers over read-only ones."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress

import click

from unionfs.cli.layer import print_changes
from unionfs.cli.layer_output import (
    Group,
    OpenMode,
    find_layer,
    human_size,
    json_option,
    opened,
    print_json,
    print_table,
    short,
    store_options,
    write_stream,
)
from unionfs.errors import NotMountedError, RunError


@click.group(cls=Group)
def container() -> None:
    """Keep containers' own files over layers: create, mount, list changes, commit."""


@container.command()
@click.option("--name", "-n", metavar="NAME", help="[default: a random one]")
@click.option("--storage-opt", "storage", multiple=True, metavar="KEY=VALUE", help="For the driver, such as size=10G.")
@store_options
@click.argument("parent", metavar="LAYER", default="")
def create(root: str | None, driver: str, name: str | None, storage: Sequence[str], parent: str) -> None:
    """Create a container over LAYER, or over nothing, and print its name."""
    options = {}
    for word in storage:
        key, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"--storage-opt {word} has no value; write KEY=VALUE", click.get_current_context())
        options[key.strip()] = value.strip()
    with opened(root, driver) as store:
        chosen = name or os.urandom(6).hex()
        below = find_layer(store, parent).chain_id if parent else ""
        store.create_rw_layer(chosen, below, storage_options=options)
        click.echo(chosen)


@container.command("ls")
@click.option("--size", "-s", is_flag=True, help="Count what each one changed, which takes time.")
@json_option
@store_options
def list_containers(root: str | None, driver: str, size: bool, as_json: bool) -> None:
    """List the containers."""
    with opened(root, driver, OpenMode.LOOK) as store:
        found = []
        for name in store.rw_layers():
            rw = store.get_rw_layer(name)
            path = store.driver.get_metadata(rw.mount_id).get("MergedDir", "") if rw.is_mounted() else ""
            found.append(
                {
                    "name": name,
                    "parent": rw.parent.chain_id if rw.parent is not None else "",
                    "mount_id": rw.mount_id,
                    "mounted_at": path,
                    "size": rw.size() if size else None,
                }
            )
        if as_json:
            print_json(found)
            return
        if not found:
            click.echo("There are no containers.")
            return
        titles = ["NAME", "LAYER", *(["SIZE"] if size else []), "MOUNTED AT"]
        rows = [
            [
                str(one["name"]),
                short(str(one["parent"])),
                *([human_size(one["size"])] if isinstance(one["size"], int) else []),
                str(one["mounted_at"]) or "-",
            ]
            for one in found
        ]
        print_table(titles, rows, right=("SIZE",))


@container.command()
@store_options
@click.argument("name")
def mount(root: str | None, driver: str, name: str) -> None:
    """Mount a container, and print where. It stays mounted until it is unmounted."""
    with opened(root, driver) as store:
        rw = store.get_rw_layer(name)
        if rw.is_mounted():
            # Mounting is counted, and nobody would count a second mount down.
            click.echo(store.driver.get_metadata(rw.mount_id)["MergedDir"])
            return
        click.echo(rw.mount())


@container.command()
@store_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def umount(root: str | None, driver: str, names: Sequence[str]) -> None:
    """Unmount containers."""
    with opened(root, driver) as store:
        for name in names:
            rw = store.get_rw_layer(name)
            if "MergedDir" not in store.driver.get_metadata(rw.mount_id):
                continue  # the driver mounts nothing: the files are always there
            if not rw.is_mounted():
                raise NotMountedError(f"container {name} is not mounted; unionfs container ls shows what is")
            rw.unmount()


@container.command()
@json_option
@store_options
@click.argument("name")
def diff(root: str | None, driver: str, as_json: bool, name: str) -> None:
    """List what a container changed."""
    with opened(root, driver, OpenMode.READ) as store:
        print_changes(store.get_rw_layer(name).changes(), as_json)


@container.command()
@click.option("--image", metavar="NAME", default="", help="Make an image, and print its id.")
@click.option("--author", metavar="TEXT", default="", help="Of the image.")
@click.option("--message", "-m", metavar="TEXT", default="", help="For the image's history.")
@store_options
@click.argument("name")
def commit(root: str | None, driver: str, image: str, author: str, message: str, name: str) -> None:
    """Make a container's changes a layer on those it stands on, and print its chain id.

    With --image that becomes an image, which is started as the container was, and can be exported and pushed.
    """
    if (author or message) and not image:
        raise click.UsageError("--author and --message are for --image", click.get_current_context())
    if image:
        _commit_image(root, driver, name, image, author, message)
        return
    with opened(root, driver) as store:
        rw = store.get_rw_layer(name)
        with rw.tar_stream() as stream:
            made = store.register(stream, rw.parent.chain_id if rw.parent is not None else "")
        click.echo(made.chain_id)


def _commit_image(root: str | None, driver: str, name: str, image: str, author: str, message: str) -> None:
    from unionfs.engines.images import ImageStore, parse_reference
    from unionfs.engines.images.commit import commit as make_image
    from unionfs.engines.run.containers import Containers

    reference = parse_reference(image)
    with opened(root, driver, hold_images=False) as store:
        images = ImageStore(store)
        rw = store.get_rw_layer(name)
        place = Containers(store).place_of(name)
        record = None
        if place is not None:
            with suppress(RunError):  # damaged: its files are there all the same
                record = place.record()
        below = rw.parent.chain_id if rw.parent is not None else ""
        bases = [one for one in images.all() if one.chain_id == below]
        named = [one for one in bases if record is not None and images.is_called(record.image, one)]
        made = make_image(
            images,
            rw,
            reference,
            base=next(iter(named or bases), None),
            config=record.config if record is not None else None,
            author=author,
            message=message,
            command=shlex.join(record.options.command) if record is not None else "",
        )
        click.echo(made.image_id)


@container.command()
@click.option("--output", "-o", metavar="FILE", default="-", help="[default: stdout]")
@click.option("--changes", is_flag=True, help="Only what it changed, as a layer.")
@store_options
@click.argument("name")
def export(root: str | None, driver: str, output: str, changes: bool, name: str) -> None:
    """Write all files of a container as a tar archive."""
    with opened(root, driver, OpenMode.READ) as store:
        rw = store.get_rw_layer(name)
        with rw.tar_stream() if changes else store.driver.diff(rw.mount_id, "") as stream:
            write_stream(stream, output)


@container.command()
@click.option("--force", "-f", is_flag=True, help="Also mounted ones, and running ones, which are killed.")
@store_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(root: str | None, driver: str, force: bool, names: Sequence[str]) -> None:
    """Remove containers with all their files. The layers they stood on stay."""
    from unionfs.engines.run.containers import Containers

    with opened(root, driver) as store:
        containers = Containers(store)
        containers.sweep()
        for name in names:
            containers.remove(name, force=force)
