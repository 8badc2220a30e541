"""What the commands about layers share: opening the store, names cut short, tables, sizes and progress bars."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import click

from unionfs.cli.held_images import images_in
from unionfs.errors import (
    LayerDoesNotExistError,
    LayerStoreError,
    NotSupportedError,
    StoreLockedError,
    StoreNotFoundError,
)

if TYPE_CHECKING:
    from unionfs.layers import Layer, LayerStore

_ROOT_VARIABLE = "UNIONFS_ROOT"
_SHORT_DIGITS = 12
_SENTENCE_LENGTH = 200
_WAIT_KEY = "unionfs.wait_s"
_PIECE_BYTES = 1 << 20
_SILENT_WAIT_S = 1.0
_WAIT_S = 60.0
_GAP = 2  # between two columns
_FOLDED_WIDTH = 16  # of a column that is folded, at least

_Command = TypeVar("_Command", bound=Callable[..., Any])


class NoCommandError(click.UsageError):
    """A group of commands was called without one; the message is its help."""


class Group(click.Group):
    """A group of commands that shows its help, as wrong usage, when it is called without one.

    click does so by itself, but on another stream and with another status in each of its versions.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :meth:`click.Command.parse_args`."""
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            raise NoCommandError(ctx.get_help(), ctx)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See :meth:`click.Group.format_commands`, which cuts what is longer than a line; here it is folded."""
        rows = [(name, command.get_short_help_str(_SENTENCE_LENGTH)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def store_options(command: _Command) -> _Command:
    """Add ``--root`` and ``--driver``, as the arguments ``root`` and ``driver``; and ``--wait``."""
    root = click.option(
        "--root",
        metavar="DIR",
        envvar=_ROOT_VARIABLE,
        help=f"Where the layers are. [default: ${_ROOT_VARIABLE}, else /var/lib/unionfs or ~/.local/share/unionfs]",
    )
    driver = click.option(
        "--driver", metavar="NAME", default="", help="unionfs, overlay2 or vfs. [default: the one used there before]"
    )
    wait = click.option(
        "--wait",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        default=_WAIT_S,
        help=f"How long to wait for another command that uses it; 0: not at all. [default: {_WAIT_S:.0f}]",
        expose_value=False,
        callback=_note_wait,
    )
    return root(driver(wait(command)))


def _note_wait(ctx: click.Context, _: click.Parameter, value: float) -> None:
    ctx.meta[_WAIT_KEY] = value


json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")


class OpenMode(Enum):
    """What a command wants of the store."""

    LOOK = auto()
    """A list of what is there: at once, whoever uses the store."""
    READ = auto()
    """The files of layers, too: when nobody else uses the store. On a read-only file system, a look is enough."""
    WRITE = auto()
    """To change it, when nobody else uses it."""


@contextmanager
def opened(
    root: str | None,
    driver: str,
    mode: OpenMode = OpenMode.WRITE,
    *,
    recover: bool = True,
    hold_images: bool = True,
) -> Iterator[LayerStore]:
    """The store, and a word about what in it cannot be used. Waits for another process that uses it, if need be.

    Args:
        root, driver: of :func:`store_options`.
        mode: see :class:`OpenMode`.
        recover: see :class:`LayerStore`.
        hold_images: let its images hold their layers; off for who opens the images.
    """
    with _open(root, driver, mode, recover) as store:
        if hold_images:
            images_in(store)
        if store.unreadable and recover:
            count = len(store.unreadable)
            click.echo(f"unionfs: {count} stored {plural(count, 'thing')} cannot be read; run unionfs fsck", err=True)
        yield store


def _open(root: str | None, driver: str, mode: OpenMode, recover: bool) -> LayerStore:
    # Here and not at the top: the commands that have nothing to do with layers start faster without.
    from unionfs.layers import default_root, open_store

    if mode is OpenMode.LOOK or (mode is OpenMode.READ and _is_on_read_only_fs(root or default_root())):
        # Without a store one is made; a driver of another package may not know how to look only.
        with suppress(StoreNotFoundError, NotSupportedError):
            return open_store(root, driver, read_only=True)
    return open_store(root, driver, recover=recover, wait=wait_for_store)


def _is_on_read_only_fs(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def wait_for_store(error: StoreLockedError) -> None:
    """Wait until the process that has the store open closes it; says so when that takes longer than a moment.

    A command that reads its standard input does so before it opens the store: what writes there may want it too.

    Raises:
        StoreLockedError: that takes longer than the option ``--wait`` says.
    """
    from unionfs.host.locks import wait_until_free

    context = click.get_current_context(silent=True)
    limit_s = float(context.meta.get(_WAIT_KEY, _WAIT_S)) if context is not None else _WAIT_S
    if wait_until_free(error.lock, min(limit_s, _SILENT_WAIT_S)):
        return
    what = str(error).partition(";")[0]
    if limit_s > _SILENT_WAIT_S:
        click.echo(f"unionfs: waiting: {what}", err=True)
        if wait_until_free(error.lock, limit_s - _SILENT_WAIT_S):
            return
    raise StoreLockedError(f"{what}; try again later, or wait longer: --wait SECONDS", error.lock)


@contextmanager
def spooled_stdin(root: str | None) -> Iterator[BinaryIO]:
    """The standard input as a file that can be read in any order: a copy of it, unless it is one.

    Args:
        root: where the layers are; the copy lies there, if there is such a directory.

    Raises:
        LayerStoreError: it cannot be copied.
    """
    from unionfs.layers import default_root

    if stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
        yield sys.stdin.buffer
        return
    where = root or default_root()
    if not os.access(where, os.W_OK | os.X_OK):
        where = tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=where) as file:
        try:
            shutil.copyfileobj(sys.stdin.buffer, file, _PIECE_BYTES)
            file.seek(0)
        except OSError as error:
            raise LayerStoreError(
                f"standard input cannot be copied to {where}: {error.strerror}; free space there, or give a file"
            ) from error
        yield cast(BinaryIO, file)


def plural(count: int, word: str) -> str:
    """``word`` for that many."""
    return word if count == 1 else word + "s"


def find_layer(store: LayerStore, text: str) -> Layer:
    """The layer that ``text`` stands for: a chain id, or enough of its first digits.

    Raises:
        LayerDoesNotExistError: there is none.
        LayerStoreError: there are several.
    """
    layers = store.map()
    digits = text.removeprefix("sha256:")
    found = [layer for chain_id, layer in layers.items() if digits and chain_id.partition(":")[2].startswith(digits)]
    if not found:
        raise LayerDoesNotExistError(f"layer does not exist: {text[:100]}; unionfs layer ls shows those that do")
    if len(found) > 1:
        raise LayerStoreError(f"{text} stands for {len(found)} layers; give more of its digits")
    return found[0]


def short(digest: str) -> str:
    """The first digits of a digest, enough for people; ``-`` for none."""
    return digest.partition(":")[2][:_SHORT_DIGITS] or "-"


def human_size(size: int) -> str:
    """A number of bytes with three digits, such as ``1.42 MiB``."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 999.5 or unit == "TiB":
            break
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def print_json(value: object) -> None:
    """``value`` for programs."""
    click.echo(json.dumps(value, indent=2))


def print_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str | Sequence[str]]],
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """A table, which folds what is too wide for the terminal.

    Args:
        titles: of the columns.
        rows: a text for each column, or several, which go below each other. Control characters are escaped.
        right: the columns that are numbers.
        whole: those that are not folded, since somebody may copy what is in them. A line may become too long for it.
    """
    # Here and not at the top: a command that draws nothing starts faster without.
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[[cell] if isinstance(cell, str) else list(cell) for cell in row] for row in rows]
    shown = [[Text("\n".join(map(printable, lines))) for lines in row] for row in cells]
    table = Table(box=None, pad_edge=False, header_style="bold")
    least = _GAP * (len(titles) - 1)
    for number, title in enumerate(titles):
        width = max(
            cell_len(line) for text in (title, *(row[number].plain for row in shown)) for line in text.split("\n")
        )
        fixed = title in whole
        table.add_column(
            title,
            overflow="fold",
            justify="right" if title in right else "left",
            no_wrap=fixed,
            min_width=width if fixed else None,
        )
        least += width if fixed else min(width, max(cell_len(title), _FOLDED_WIDTH))
    for row in shown:
        table.add_row(*row)
    size = shutil.get_terminal_size()
    # A pipe has no width: lines for grep are not folded. Without a height, rich takes 80 x 25 for a dumb terminal.
    width = max(size.columns, least) if sys.stdout.isatty() else 10_000
    Console(highlight=False, width=width, height=size.lines).print(table)


def printable(text: str) -> str:
    """``text`` on one line, whatever is in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


@contextmanager
def progress_bar(what: str, total: int | None, *, unit_is_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, nothing elsewhere; gives a function to call with what is done so far.

    Args:
        what: shown in front.
        total: what there is to do, if known.
        unit_is_bytes: show sizes and a rate; otherwise a count.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit_is_bytes else [MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda done: bar.update(task, completed=done)


def write_stream(stream: IO[bytes], output: str) -> int:
    """Write a stream to a file, which appears when it is complete, or to stdout (``-``); how many bytes it had.

    Raises:
        LayerStoreError: stdout is a terminal.
    """
    from unionfs.host.disk import replacing

    if output == "-":
        if sys.stdout.isatty():
            raise LayerStoreError("an archive is nothing for a terminal; name a file with --output, or redirect")
        return _copy(stream, sys.stdout.buffer, "stdout")
    if os.path.exists(output) and not os.path.isfile(output):  # a pipe, or /dev/null
        with open(output, "wb") as file:
            return _copy(stream, file, output)
    with replacing(output) as file:
        return _copy(stream, file, output)


def _copy(stream: IO[bytes], file: IO[bytes], name: str) -> int:
    size = 0
    with progress_bar(name, None) as show:
        while piece := stream.read(_PIECE_BYTES):
            file.write(piece)
            size += len(piece)
            show(size)
    file.flush()
    return size
