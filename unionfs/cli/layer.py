"""``unionfs layer``: read-only layers."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, BinaryIO

import click

from unionfs.cli.held_images import images_in
from unionfs.cli.layer_output import (
    Group,
    OpenMode,
    find_layer,
    human_size,
    json_option,
    opened,
    plural,
    print_json,
    print_table,
    printable,
    progress_bar,
    short,
    spooled_stdin,
    store_options,
    write_stream,
)
from unionfs.errors import LayerStoreError, UnionfsError

if TYPE_CHECKING:
    from unionfs.archive.changes import Change
    from unionfs.layers import Layer, LayerStore


@click.group(cls=Group)
def layer() -> None:
    """Keep layers: register, list, check, export and remove them."""


@layer.command()
@click.option("--parent", "-p", metavar="LAYER", default="", help="What the first layer goes on. [default: nothing]")
@click.option("--expect", metavar="DIGEST", default="", help="The digest that the uncompressed layer must have.")
@json_option
@store_options
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
def register(root: str | None, driver: str, parent: str, expect: str, as_json: bool, files: Sequence[str]) -> None:
    """Store layers from tar archives, and print their chain ids.

    The archives may be compressed (gzip, zstd, xz, bzip2); - is stdin. Several go on top of each other, the first is
    the lowest.
    """
    if expect and len(files) > 1:
        raise click.UsageError("--expect is for one FILE", click.get_current_context())
    if "-" in files and sys.stdin.isatty():
        raise LayerStoreError("stdin is a terminal; name a file, or redirect an archive")
    with ExitStack() as stack:
        stdin = stack.enter_context(spooled_stdin(root)) if "-" in files else None
        store = stack.enter_context(opened(root, driver))
        below = find_layer(store, parent).chain_id if parent else ""
        done = []
        for name in files:
            made = _register_file(store, name, stdin, below, expect)
            below = made.chain_id
            done.append(made)
            if not as_json:
                click.echo(made.chain_id)
        if as_json:
            print_json([facts(store, one) for one in done])


def _register_file(store: LayerStore, name: str, stdin: BinaryIO | None, below: str, expect: str) -> Layer:
    if name == "-" and stdin is not None:
        return _register_stream(store, stdin, "stdin", below, expect)
    try:
        with open(name, "rb") as file:
            return _register_stream(store, file, name, below, expect)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if error.filename != name:
            raise
        raise LayerStoreError(f"{name}: {error.strerror}; name a tar archive") from None


def _register_stream(store: LayerStore, file: IO[bytes], name: str, below: str, expect: str) -> Layer:
    total = _length(file)
    with progress_bar(os.path.basename(name), total) as show:
        try:
            # Of a file it is known how much of it, compressed or not, there is to read.
            progress = show if total is None else lambda _: show(file.tell())
            return store.register(file, below, expected_diff_id=expect, progress=progress)
        except UnionfsError as error:
            raise type(error)(f"{name}: {error}") from error


def _length(file: IO[bytes]) -> int | None:
    """The bytes of a regular file; None for a pipe or a device."""
    info = os.fstat(file.fileno())
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def facts(store: LayerStore, one: Layer) -> dict[str, object]:
    """A layer for programs."""
    return {
        "chain_id": one.chain_id,
        "diff_id": one.diff_id,
        "parent": one.parent.chain_id if one.parent is not None else "",
        "cache_id": one.cache_id,
        "depth": one.depth,
        "size": one.size,
        "diff_size": one.diff_size,
        "containers": _containers(store, one),
    }


def _containers(store: LayerStore, one: Layer) -> list[str]:
    return [name for name, mount in store.rw_layers().items() if mount.parent is one.stored]


@layer.command("ls")
@json_option
@store_options
def list_layers(root: str | None, driver: str, as_json: bool) -> None:
    """List the layers."""
    with opened(root, driver, OpenMode.LOOK) as store:
        layers = sorted(store.map().values(), key=lambda one: (one.depth, one.chain_id))
        if as_json:
            print_json([facts(store, one) for one in layers])
            return
        if not layers:
            click.echo("There are no layers.")
            return
        rows = [
            (
                short(one.chain_id),
                short(one.diff_id),
                short(one.parent.chain_id) if one.parent is not None else "-",
                str(one.depth),
                human_size(one.diff_size),
                human_size(one.size),
                str(store.reference_count(one.chain_id)),
            )
            for one in layers
        ]
        print_table(
            ("CHAIN ID", "DIFF ID", "PARENT", "DEPTH", "OWN SIZE", "SIZE", "USERS"),
            rows,
            right=("DEPTH", "OWN SIZE", "SIZE", "USERS"),
        )


@layer.command()
@json_option
@store_options
def tree(root: str | None, driver: str, as_json: bool) -> None:
    """Show which layer and which container stands on which."""
    with opened(root, driver, OpenMode.LOOK) as store:
        children: dict[str, list[Layer]] = {}
        for one in store.map().values():
            children.setdefault(one.parent.chain_id if one.parent is not None else "", []).append(one)
        containers: dict[str, list[str]] = {}
        for name, mount in store.rw_layers().items():
            containers.setdefault(mount.record.parent, []).append(name)
        if as_json:
            print_json(_nested("", children, containers))
            return
        # From a stack: a chain may be deeper than what is nice to recurse into.
        todo = [(0, item) for item in _above("", children, containers)]
        if not todo:
            click.echo("There are no layers.")
        while todo:
            depth, item = todo.pop(0)
            if isinstance(item, str):
                click.echo(f"{'  ' * depth}container {printable(item)}")
                continue
            click.echo(f"{'  ' * depth}{short(item.chain_id)}  {human_size(item.diff_size)}")
            todo[:0] = [(depth + 1, above) for above in _above(item.chain_id, children, containers)]


def _above(chain_id: str, children: dict[str, list[Layer]], containers: dict[str, list[str]]) -> list[Layer | str]:
    return [*containers.get(chain_id, []), *sorted(children.get(chain_id, []), key=lambda one: one.chain_id)]


def _nested(
    chain_id: str, children: dict[str, list[Layer]], containers: dict[str, list[str]]
) -> list[dict[str, object]]:
    """What stands on a layer, each with what stands on it; a chain has 125 layers at most."""
    return [
        {"container": item}
        if isinstance(item, str)
        else {
            "chain_id": item.chain_id,
            "diff_size": item.diff_size,
            "above": _nested(item.chain_id, children, containers),
        }
        for item in _above(chain_id, children, containers)
    ]


@layer.command()
@json_option
@store_options
@click.argument("layers", nargs=-1, required=True, metavar="LAYER...")
def inspect(root: str | None, driver: str, as_json: bool, layers: Sequence[str]) -> None:
    """Show all that is known about layers."""
    with opened(root, driver, OpenMode.LOOK) as store:
        found = []
        for text in layers:
            one = find_layer(store, text)
            found.append({**facts(store, one), "driver": store.driver_name, "driver_data": one.metadata()})
        if as_json:
            print_json(found)
            return
        for known in found:
            for key, value in known.items():
                click.echo(f"{key.replace('_', ' ')}: {_shown(key, value)}")


def _shown(key: str, value: object) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {name}: {printable(text)}" for name, text in value.items())
    if isinstance(value, list):
        return ", ".join(map(printable, value)) or "-"
    if isinstance(value, int) and key.endswith("size"):
        return human_size(value) + (f" ({value} bytes)" if value >= 1024 else "")
    return str(value) or "-"


@layer.command()
@json_option
@store_options
@click.argument("layers", nargs=-1, metavar="[LAYER...]")
def verify(root: str | None, driver: str, as_json: bool, layers: Sequence[str]) -> int:
    """Compare layers, all unless some are named, with their digests."""
    with opened(root, driver, OpenMode.READ) as store:
        chosen = [find_layer(store, text) for text in layers] if layers else list(store.map().values())
        results = []
        with progress_bar("verifying", len(chosen), unit_is_bytes=False) as show:
            for number, one in enumerate(chosen):
                show(number)
                damages = one.damages()
                results.append((one.chain_id, "; ".join(damages)))
                for damage in damages if not as_json else ():
                    click.echo(printable(f"unionfs: {one.chain_id}: {damage}"), err=True)
        bad = sum(1 for _, problem in results if problem)
        if as_json:
            print_json([{"chain_id": chain_id, "ok": not problem, "problem": problem} for chain_id, problem in results])
        elif not bad:
            click.echo(f"{len(results)} {plural(len(results), 'layer')} verified.")
        return 1 if bad else 0


@layer.command()
@click.option("--output", "-o", metavar="FILE", default="-", help="[default: stdout]")
@store_options
@click.argument("name", metavar="LAYER")
def export(root: str | None, driver: str, output: str, name: str) -> None:
    """Write a layer as the tar archive it was registered from, byte for byte."""
    with opened(root, driver, OpenMode.READ) as store, find_layer(store, name).tar_stream() as stream:
        write_stream(stream, output)


@layer.command()
@json_option
@store_options
@click.argument("name", metavar="LAYER")
@click.argument("ancestor", metavar="[ANCESTOR]", default="")
def diff(root: str | None, driver: str, as_json: bool, name: str, ancestor: str) -> None:
    """List what a layer changes in the one below it, or in ANCESTOR."""
    with opened(root, driver, OpenMode.READ) as store:
        one = find_layer(store, name)
        below = one.parent
        if ancestor:
            below = find_layer(store, ancestor)
            if below.chain_id == one.chain_id or all(below.stored is not other for other in one.stored.chain()):
                raise LayerStoreError(f"{ancestor} is not below {name}; unionfs layer tree shows what is")
        print_changes(store.driver.changes(one.cache_id, below.cache_id if below is not None else ""), as_json)


def print_changes(changes: Sequence[Change], as_json: bool) -> None:
    """A list of changes, a line each."""
    if as_json:
        print_json(
            [
                {"path": os.fsdecode(one.path).encode(errors="replace").decode(), "kind": one.kind.name.lower()}
                for one in changes
            ]
        )
        return
    for one in changes:
        click.echo(printable(str(one)))


@layer.command()
@click.option("--parents", is_flag=True, help="Also the layers below that nothing else needs.")
@store_options
@click.argument("layers", nargs=-1, required=True, metavar="LAYER...")
def rm(root: str | None, driver: str, parents: bool, layers: Sequence[str]) -> None:
    """Remove layers that nothing stands on, and print their chain ids."""
    with opened(root, driver) as store:
        for text in layers:
            one = find_layer(store, text)
            users = _users(store, one)
            if users:
                raise LayerStoreError(f"{text} is needed by {', '.join(users)}; remove that first")
            if reason := store.claims.why_layer_stays(one.chain_id):
                raise LayerStoreError(f"{text} may still be needed: {reason}")
            for gone in store.release(store.get(one.chain_id), keep_parents=not parents):
                click.echo(gone.chain_id)


def _users(store: LayerStore, one: Layer) -> list[str]:
    users = [f"container {printable(name)}" for name in _containers(store, one)]
    held = images_in(store)
    if held is not None:
        of = [image for image in held.all() if image.chain_id == one.chain_id]
        users += [f"image {image.names[0] if image.names else short(image.image_id)}" for image in of]
    users += [
        f"layer {short(chain_id)}" for chain_id, other in store.map().items() if other.stored.parent is one.stored
    ]
    return users[:5] + ([f"{len(users) - 5} more"] if len(users) > 5 else [])
