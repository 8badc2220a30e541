"""``unionfs container ps``, ``logs``, ``stop``, ``exec`` and ``inspect``: containers of ``unionfs run``."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

import click

from unionfs.cli.layer_output import (
    OpenMode,
    json_option,
    opened,
    print_json,
    print_table,
    printable,
    store_options,
)
from unionfs.cli.run import exit_statuses
from unionfs.errors import RunError, UnionfsError

if TYPE_CHECKING:
    from unionfs.engines.run.containers import Containers
    from unionfs.engines.run.records import Place, Record
    from unionfs.layers import LayerStore

_PIECE_BYTES = 1 << 16
_POLL_S = 0.1
_SHORT_COMMAND = 40


@click.command()
@click.option("--all", "-a", "everything", is_flag=True, help="Also those that have ended.")
@json_option
@store_options
def ps(root: str | None, driver: str, everything: bool, as_json: bool) -> None:
    """List the containers that run."""
    with opened(root, driver, OpenMode.LOOK) as store:
        found = []
        for place in _places(store):
            if everything or place.is_running():
                found.append(_facts(place, place.record()))
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("There are no containers of unionfs run." if everything else "No container is running.")
        return
    rows = []
    for one in found:
        command = str(one["command"])
        rows.append(
            (
                str(one["name"]),
                str(one["image"]),
                command if len(command) <= _SHORT_COMMAND else command[: _SHORT_COMMAND - 3] + "...",
                str(one["state"]),
                _ago(one["started"]) if one["started"] is not None else "-",
            )
        )
    print_table(("NAME", "IMAGE", "COMMAND", "STATE", "STARTED"), rows, whole=("NAME",))


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Wait for more until the container ends.")
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="LINES", help="Only the last ones. [default: all]")
@store_options
@click.argument("name")
def logs(root: str | None, driver: str, follow: bool, tail: int | None, name: str) -> None:
    """Show what a container in the background (unionfs run -d) has written: its output and errors, as they came."""
    place = _place(root, driver, name)
    if not os.path.exists(place.output):
        raise RunError(
            f"container {name} has no log: it ran in the foreground; unionfs run -d and container start -d keep one"
        )
    with open(place.output, "rb") as file:
        if tail is not None:
            file.seek(_start_of_last_lines(file, tail))
        while True:
            running = follow and place.is_running()
            while piece := file.read(_PIECE_BYTES):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            if not running:
                return
            time.sleep(_POLL_S)


def _start_of_last_lines(file: BinaryIO, count: int) -> int:
    """The offset at which the last ``count`` lines begin."""
    at = file.seek(0, os.SEEK_END)
    if count == 0:
        return at
    left, last = count, True
    while at > 0:
        start = max(0, at - _PIECE_BYTES)
        file.seek(start)
        piece = file.read(at - start)
        if last and piece.endswith(b"\n"):
            piece = piece[:-1]  # it ends the last line, and begins none
        last = False
        ends = piece.count(b"\n")
        if ends >= left:
            for _ in range(left - 1):
                piece = piece[: piece.rindex(b"\n")]
            return start + piece.rindex(b"\n") + 1
        left -= ends
        at = start
    return 0


@click.command()
@click.option(
    "--time",
    "-t",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long it may take before it is killed.",
)
@click.option("--signal", "-s", "signal_name", metavar="NAME", default="", help="[default: the image's, else TERM]")
@store_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def stop(root: str | None, driver: str, timeout_s: float, signal_name: str, names: Sequence[str]) -> int:
    """End containers, and wait until they have been cleaned up."""
    from unionfs.engines.run.runner import stop as end

    status = 0
    for name in names:
        try:
            place = _place(root, driver, name)
            asked = signal_name or place.record().config.stop_signal or "TERM"
            end(place, asked.upper().removeprefix("SIG"), timeout_s)
        except UnionfsError as error:
            # The others are ended all the same.
            click.echo(printable(f"unionfs: {error}"), err=True)
            status = 1
    return status


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass on the standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal, which is ours; for shells: -it.")
@click.option("-e", "--env", "env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable, or pass ours on.")
@click.option("-w", "--workdir", metavar="DIR", default="", help="[default: the container's]")
@click.option("-u", "--user", metavar="USER[:GROUP]", default="", help="Names or numbers. [default: the container's]")
@store_options
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARG]...")
def exec_(
    root: str | None,
    driver: str,
    interactive: bool,
    tty: bool,
    env: Sequence[str],
    workdir: str,
    user: str,
    name: str,
    command: Sequence[str],
) -> int:
    """Run one more command in a container that runs, and wait for its end. Exit statuses are those of unionfs run."""
    with exit_statuses() as ended:
        from unionfs.engines.run.containers import short_id
        from unionfs.engines.run.foreground import run_one_more
        from unionfs.engines.run.options import parse_env

        place = _place(root, driver, name)
        record = place.record()
        options = record.options.model_copy(
            update={
                "command": tuple(command),
                "entrypoint": "",
                "env": (*record.options.env, *parse_env(env, os.environ)),
                "workdir": workdir or record.options.workdir,
                "user": user or record.options.user,
                "interactive": interactive,
                "terminal": tty,
            }
        )
        ended.append(run_one_more(place, record, options, options.hostname or short_id(place)))
    return ended[0]


@click.command()
@json_option
@store_options
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def inspect(root: str | None, driver: str, as_json: bool, names: Sequence[str]) -> None:
    """Show all that is known about containers."""
    from unionfs.engines.run.containers import Containers

    with opened(root, driver, OpenMode.LOOK) as store:
        found = []
        for name in names:
            rw = store.get_rw_layer(name)
            place = Containers(store).place_of(name)
            facts: dict[str, object] = {
                "name": name,
                "id": rw.mount_id,
                "layer": rw.parent.chain_id if rw.parent is not None else "",
                "driver": store.driver_name,
                "driver_data": {key: value for key, value in rw.metadata().items() if key != "ID"},
                "mounted": rw.is_mounted(),
            }
            if place is not None:
                record = place.record()
                facts |= _facts(place, record)
                facts["options"] = record.options.model_dump(mode="json")
                facts["config"] = record.config.model_dump(mode="json")
            found.append(facts)
    if as_json:
        print_json(found)
        return
    for facts in found:
        for key, value in facts.items():
            if key not in ("options", "config"):
                click.echo(f"{key.replace('_', ' ')}: {_shown(key, value)}")


def _shown(key: str, value: object) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {name}: {printable(str(text))}" for name, text in value.items()) or "-"
    if isinstance(value, list):
        return "".join(f"\n  {printable(str(text))}" for text in value) or "-"
    if isinstance(value, float) and key in ("created", "started", "ended"):
        return _moment(value)
    return "-" if value in (None, "") else printable(str(value))


def _facts(place: Place, record: Record) -> dict[str, object]:
    """A container for programs; times are seconds since 1970."""
    running = place.running() if place.is_running() else None
    ended = place.ended()
    arguments = [*((record.options.entrypoint,) if record.options.entrypoint else record.config.entrypoint)]
    arguments += record.options.command or (record.config.cmd if record.options.entrypoint is None else ())
    return {
        "name": record.name,
        "image": record.image,
        "command": shlex.join(arguments),
        "state": state_of(place),
        "status": None if running is not None or ended is None else ended.status,
        "created": record.created or None,
        "started": running.started if running is not None else ended.started if ended is not None else None,
        "ended": None if running is not None or ended is None else ended.ended,
        "runner": running.pid if running is not None else None,
        "volumes": [
            f"{volume.name or volume.source}:{volume.destination}{':ro' if volume.read_only else ''}"
            for volume in record.options.volumes
        ],
    }


def state_of(place: Place) -> str:
    """``running``, ``exited N`` or ``created``."""
    if place.is_running():
        return "running"
    ended = place.ended()
    return "created" if ended is None else f"exited {ended.status}"


def _place(root: str | None, driver: str, name: str) -> Place:
    from unionfs.engines.run.containers import Containers

    with opened(root, driver, OpenMode.LOOK) as store:
        return Containers(store).find(name)


def _places(store: LayerStore) -> list[Place]:
    from unionfs.engines.run.containers import Containers

    containers: Containers = Containers(store)
    found = [containers.place_of(name) for name in store.rw_layers()]
    return [place for place in found if place is not None]


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _ago(seconds: object) -> str:
    assert isinstance(seconds, float)
    passed = max(0, int(time.time() - seconds))
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= size:
            count = passed // size
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return f"{passed} s ago"
