"""``unionfs image``: images without an engine."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from unionfs.cli.image_progress import layer_bars
from unionfs.cli.layer_output import (
    Group,
    OpenMode,
    human_size,
    json_option,
    opened,
    print_json,
    print_table,
    printable,
    short,
    spooled_stdin,
    store_options,
)
from unionfs.errors import ImageError

if TYPE_CHECKING:
    from unionfs.engines.images import Image, ImageStore, Reference
    from unionfs.engines.images.registry import Access, Credentials

_Command = TypeVar("_Command", bound=Callable[..., Any])

_FORMATS = ("docker-archive", "oci-tar", "oci-dir")
_COMPRESSIONS = ("none", "gzip", "zstd")
_SHORT_COMMAND = 60  # characters of a step of a history

platform_option = click.option(
    "--platform", metavar="OS/ARCH", default="", help="Such as linux/arm64. [default: this machine's]"
)


def _with_all_owners(command: _Command) -> _Command:
    """Let the command of an ordinary user go on as root of a user namespace, where files can have other owners."""

    @functools.wraps(command)
    def entering(*args: Any, **kwargs: Any) -> Any:
        if os.geteuid() != 0:
            from unionfs.engines.run.user_namespace import run_inside

            return run_inside([sys.executable, *sys.orig_argv[1:]])
        return command(*args, **kwargs)

    return cast(_Command, entering)


@click.group(cls=Group)
def image() -> None:
    """Keep images: get them from archives, directories and registries, and give them back.

    IMAGE is a name, such as alpine or localhost:5000/app:v1, an image's id, or its first digits.
    """


@contextmanager
def opened_images(root: str | None, driver: str, mode: OpenMode = OpenMode.WRITE) -> Iterator[ImageStore]:
    """The images of a store."""
    from unionfs.engines.images import ImageStore

    with opened(root, driver, mode, hold_images=False) as store:
        images = ImageStore(store)
        if images.names_damage:
            click.echo(printable(f"unionfs: no image has a name: {images.names_damage}; run unionfs fsck"), err=True)
        for image_id, why in images.unreadable.items():
            click.echo(f"unionfs: image {short(image_id)} cannot be used: {why}; pull or import it again", err=True)
        yield images


@image.command("import")
@click.option("--name", "-n", metavar="NAME", default="", help="What to call it. [default: what it is called there]")
@click.option("--only", metavar="IMAGE", default="", help="The one of this name, tag or id, where there are several.")
@platform_option
@json_option
@store_options
@click.argument("source", metavar="SOURCE")
@_with_all_owners
def import_(root: str | None, driver: str, name: str, only: str, platform: str, as_json: bool, source: str) -> None:
    """Store the images of an archive or a directory, and print their ids.

    SOURCE is what docker save, podman save or skopeo wrote: an archive for Docker, or an OCI layout as an archive or a
    directory. Archives may be compressed; - is stdin.
    """
    from unionfs.engines.images import Platform, import_images, parse_reference

    if source == "-" and sys.stdin.isatty():
        raise ImageError("stdin is a terminal; name a file, or redirect an archive")
    if source != "-" and not os.path.exists(source):
        raise ImageError(f"{source}: does not exist; name an archive or the directory of an OCI layout")
    names = [parse_reference(name).with_default_tag()] if name else None
    chosen = Platform.parse(platform) if platform else None
    with ExitStack() as stack:
        given = stack.enter_context(spooled_stdin(root)) if source == "-" else source
        images = stack.enter_context(opened_images(root, driver))
        report = stack.enter_context(layer_bars())
        found = import_images(
            images,
            given,
            platform=chosen,
            only=only,
            names=names,
            report=report,
        )
        _print_images(images, found, as_json)


def _print_images(images: ImageStore, found: Sequence[Image], as_json: bool) -> None:
    if as_json:
        print_json([facts(images, images.get(one.image_id)) for one in found])
        return
    for one in found:
        click.echo(one.image_id)


def facts(images: ImageStore, one: Image) -> dict[str, object]:
    """An image for programs."""
    complete = images.is_complete(one)
    layers = images.layers_of(one) if complete else []
    return {
        "id": one.image_id,
        "names": list(one.names),
        "platform": str(one.platform),
        "created": one.created,
        "complete": complete,
        "chain_id": one.chain_id,
        "size": sum(layer.diff_size for layer in layers),
        "layers": [
            {"diff_id": layer.diff_id, "chain_id": layer.chain_id, "cache_id": layer.cache_id, "size": layer.diff_size}
            for layer in layers
        ],
    }


def _access_options(command: _Command) -> _Command:
    """Add how a registry is reached, as the arguments of :func:`_access`."""
    for option in reversed(
        (
            click.option("--username", "-u", metavar="NAME", default="", help="[default: as docker login left it]"),
            click.option("--password-stdin", is_flag=True, help="Read the password for --username from stdin."),
            click.option("--plain-http", is_flag=True, help="Without TLS; the default only for this machine itself."),
            click.option("--cert-dir", metavar="DIR", default="", help="Certificates: *.crt; *.cert with *.key."),
            click.option(
                "--parallel",
                type=click.IntRange(1, 32),
                metavar="N",
                default=4,
                show_default=True,
                help="How many layers are transferred at the same time.",
            ),
        )
    ):
        command = option(command)
    return command


def _access(
    reference: Reference, username: str, password_stdin: bool, plain_http: bool, cert_dir: str, parallel: int
) -> Access:
    from unionfs.engines.images.registry import Access, Credentials, find_credentials

    if bool(username) != password_stdin:
        raise click.UsageError("--username and --password-stdin belong together", click.get_current_context())
    if username:
        if sys.stdin.isatty():
            password = str(click.prompt("Password", hide_input=True, err=True))
        else:
            password = sys.stdin.read().rstrip("\r\n")
        credentials: Credentials | None = Credentials(username, password)
    else:
        credentials = find_credentials(reference)
    return Access(
        credentials=credentials, plain_http=True if plain_http else None, cert_dir=cert_dir, parallel=parallel
    )


@image.command()
@platform_option
@_access_options
@json_option
@store_options
@click.argument("name", metavar="IMAGE")
@_with_all_owners
def pull(root: str | None, driver: str, platform: str, as_json: bool, name: str, **access: Any) -> None:
    """Fetch an image from a registry, and print its id.

    Layers that are here already are not fetched. What is cut off goes on where it ended.
    """
    from unionfs.engines.images import Platform, parse_reference
    from unionfs.engines.images.registry import pull as fetch
    from unionfs.engines.images.registry import run

    reference = parse_reference(name)
    chosen = Platform.parse(platform) if platform else None
    reached = _access(reference, **access)
    with opened_images(root, driver) as images, layer_bars() as report:
        one = run(lambda: fetch(images, reference, platform=chosen, access=reached, report=report))
        _print_images(images, [one], as_json)


@image.command()
@click.option(
    "--compress",
    type=click.Choice(_COMPRESSIONS[1:]),
    default="gzip",
    show_default=True,
    help="How layers are compressed that are not there yet.",
)
@_access_options
@store_options
@click.argument("name", metavar="IMAGE")
@click.argument("target", metavar="[NAME]", default="")
@_with_all_owners
def push(root: str | None, driver: str, compress: str, name: str, target: str, **access: Any) -> None:
    """Give an image to a registry, as NAME if that is given, and print the digest that it has there."""
    from unionfs.engines.images import LayerCompression, parse_reference
    from unionfs.engines.images.registry import push as give
    from unionfs.engines.images.registry import run

    with opened_images(root, driver, OpenMode.READ) as images, layer_bars() as report:
        one = images.get(name)
        names = images.meant(name, one)
        if not target and not names:
            raise ImageError(f"{name} is no name of an image; say which one it gets: unionfs image push {name} NAME")
        reference = parse_reference(target) if target else names[0]
        how = LayerCompression(compress)
        reached = _access(reference, **access)
        click.echo(run(lambda: give(images, one, reference, access=reached, compression=how, report=report)))


@image.command("ls")
@json_option
@store_options
def list_images(root: str | None, driver: str, as_json: bool) -> None:
    """List the images. The platform is shown when one of them is for another machine."""
    from unionfs.engines.run.process import foreign_machine

    with opened_images(root, driver, OpenMode.LOOK) as images:
        found = images.all()
        if as_json:
            print_json([facts(images, one) for one in found])
            return
        if not found:
            click.echo("There are no images.")
            return
        rows = []
        # Most images are for this machine: then the platform would only take room away from the names.
        foreign = any(foreign_machine(one.platform) for one in found)
        for one in found:
            complete = images.is_complete(one)
            size = sum(layer.diff_size for layer in images.layers_of(one)) if complete else 0
            tags = [name for name in one.names if "@" not in name]
            for name in tags or one.names[:1] or ("-",):
                rows.append(
                    (
                        name,
                        short(one.image_id),
                        *([str(one.platform)] if foreign else []),
                        one.created[:10] or "-",
                        human_size(size) if complete else "incomplete",
                    )
                )
        titles = ["NAME", "ID", *(["PLATFORM"] if foreign else []), "CREATED", "SIZE"]
        print_table(titles, rows, right=("SIZE",), whole=("NAME", "ID"))


@image.command()
@json_option
@store_options
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
def inspect(root: str | None, driver: str, as_json: bool, names: Sequence[str]) -> None:
    """Show all that is known about images."""
    with opened_images(root, driver, OpenMode.LOOK) as images:
        found = [images.get(text) for text in names]
        if as_json:
            print_json([_details(images, one) for one in found])
            return
        for one in found:
            _show(images, one)


def _details(images: ImageStore, one: Image) -> dict[str, object]:
    return {
        **facts(images, one),
        "author": one.author,
        "config": one.config.model_dump(mode="json"),
        "history": [step.model_dump(mode="json") for step in one.history],
        "containers": images.users(one),
    }


def _show(images: ImageStore, one: Image) -> None:
    config = one.config
    size = sum(layer.diff_size for layer in images.layers_of(one)) if images.is_complete(one) else None
    lines: list[tuple[str, str | Sequence[str]]] = [
        ("id", one.image_id),
        ("names", one.names),
        ("platform", str(one.platform)),
        ("created", one.created),
        ("author", one.author),
        ("size", "layers are missing; pull or import it again" if size is None else human_size(size)),
        ("entrypoint", config.entrypoint),
        ("command", config.cmd),
        ("user", config.user),
        ("working directory", config.working_dir),
        ("stop signal", config.stop_signal),
        ("environment", config.env),
        ("exposed ports", config.exposed_ports),
        ("volumes", config.volumes),
        ("labels", [f"{key}={value}" for key, value in config.labels.items()]),
        ("containers", images.users(one)),
    ]
    for title, value in lines:
        if isinstance(value, str):
            click.echo(f"{title}: {printable(value) or '-'}")
        else:
            click.echo(f"{title}:" + ("".join(f"\n  {printable(text)}" for text in value) or " -"))
    click.echo("layers:")
    if size is None:
        for diff_id in one.diff_ids:
            click.echo(f"  {diff_id}")
    for layer in images.layers_of(one) if size is not None else ():
        click.echo(f"  {layer.diff_id}  {human_size(layer.diff_size):>9}  chain {short(layer.chain_id)}")
    click.echo("history:" + ("" if one.history else " -"))
    for step in one.history:
        click.echo(f"  {printable(step.created[:10]) or '-'}  {printable(step.created_by or step.comment)[:100]}")


@image.command()
@click.option("--full", is_flag=True, help="Do not shorten the commands.")
@json_option
@store_options
@click.argument("name", metavar="IMAGE")
def history(root: str | None, driver: str, full: bool, as_json: bool, name: str) -> None:
    """Show the steps in which an image was made, the last one first, and what each of them takes."""
    with opened_images(root, driver, OpenMode.LOOK) as images:
        one = images.get(name)
        steps = _steps(images, one)
    if as_json:
        print_json(steps)
        return
    if not steps:
        click.echo("The image has no history.")
        return
    rows = [
        (
            str(step["created"])[:10] or "-",
            human_size(step["size"]) if isinstance(step["size"], int) else "-",
            _shortened(str(step["created_by"]), full),
            _shortened(str(step["comment"]), full),
        )
        for step in steps
    ]
    print_table(("CREATED", "SIZE", "MADE BY", "COMMENT"), rows, right=("SIZE",))


def _shortened(text: str, full: bool) -> str:
    shown = text if full or len(text) <= _SHORT_COMMAND else text[: _SHORT_COMMAND - 3] + "..."
    return shown or "-"


def _steps(images: ImageStore, one: Image) -> list[dict[str, object]]:
    """The history, the last step first, each with its layer where the two fit together."""
    told = sum(1 for step in one.history if not step.empty_layer)
    fits = told == len(one.diff_ids)
    known = list(images.layers_of(one)) if fits and images.is_complete(one) else []
    found: list[dict[str, object]] = []
    number = 0
    for step in one.history:
        layer = known[number] if known and not step.empty_layer else None
        found.append(
            {
                **step.model_dump(mode="json"),
                "diff_id": one.diff_ids[number] if fits and not step.empty_layer else None,
                "size": layer.diff_size if layer is not None else 0 if step.empty_layer else None,
            }
        )
        number += not step.empty_layer
    return found[::-1]


@image.command()
@click.option("--force", "-f", is_flag=True, help="Also with several names, or with containers; their layers stay.")
@store_options
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@_with_all_owners
def rm(root: str | None, driver: str, force: bool, names: Sequence[str]) -> None:
    """Take names away, and with the last one the image and those of its layers that nothing else needs."""
    with opened_images(root, driver) as images:
        for text in names:
            removed = images.remove(text, force=force)
            for name in removed.untagged:
                click.echo(f"untagged {name}")
            if removed.image_id:
                click.echo(f"removed {removed.image_id}")
            for layer in removed.layers:
                click.echo(f"removed layer {layer.chain_id}")


@image.command()
@store_options
@click.argument("name", metavar="IMAGE")
@click.argument("new", metavar="NAME")
def tag(root: str | None, driver: str, name: str, new: str) -> None:
    """Give an image one more name. Another image that had it loses it."""
    from unionfs.engines.images import parse_reference

    with opened_images(root, driver) as images:
        images.tag(name, parse_reference(new))


@image.command()
@click.option(
    "--output", "-o", metavar="PATH", default="-", help="A file, or the directory for oci-dir. [default: stdout]"
)
@click.option(
    "--format",
    "-f",
    "kind",
    type=click.Choice(_FORMATS),
    default=_FORMATS[0],
    show_default=True,
    help="An archive for docker load, or an OCI layout.",
)
@click.option(
    "--compress",
    type=click.Choice(_COMPRESSIONS),
    help="How the layers are compressed. [default: none for docker-archive, otherwise gzip]",
)
@store_options
@click.argument("name", metavar="IMAGE")
@_with_all_owners
def export(root: str | None, driver: str, output: str, kind: str, compress: str | None, name: str) -> None:
    """Write an image to an archive or a directory. The same image gives the same bytes each time.

    A docker-archive is for docker load, podman load and skopeo; oci-tar and oci-dir are OCI layouts.
    """
    from unionfs.engines.images import ExportOptions, Format, LayerCompression, export_stream, export_to

    form = Format(kind)
    compression = LayerCompression(compress) if compress else None
    if output == "-":
        if form is Format.OCI_DIRECTORY:
            raise click.UsageError("--format oci-dir needs --output", click.get_current_context())
        if sys.stdout.isatty():
            raise ImageError("an archive is nothing for a terminal; name a file with --output, or redirect")
    with opened_images(root, driver, OpenMode.READ) as images, layer_bars() as report:
        one = images.get(name)
        options = ExportOptions(form, images.meant(name, one), compression)
        if output == "-":
            export_stream(images, one, sys.stdout.buffer, options, report)
        else:
            export_to(images, one, output, options, report)
