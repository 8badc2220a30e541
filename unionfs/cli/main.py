"""``unionfs``: the command for people."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click

from unionfs import __version__
from unionfs.cli.container import container
from unionfs.cli.df import df
from unionfs.cli.image import image
from unionfs.cli.info import info
from unionfs.cli.layer import layer
from unionfs.cli.layer_output import Group, NoCommandError, printable
from unionfs.cli.mount_commands import mount, mounts, umount
from unionfs.cli.run import run, start
from unionfs.cli.running import exec_, inspect, logs, ps, stop
from unionfs.cli.serve import serve
from unionfs.cli.store import fsck, gc
from unionfs.cli.volume import volume
from unionfs.errors import UnionfsError
from unionfs.host.daemon import open_standard_fds

_DEBUG = "UNIONFS_DEBUG"  # also tells the mount program


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="unionfs: version %(version)s")
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
def unionfs(debug: bool) -> None:
    """Stack directories into one file system tree."""
    if debug:
        os.environ[_DEBUG] = "1"


for command in (mount, umount, mounts, layer, image, container, volume, run, df, info, fsck, gc, serve):
    unionfs.add_command(command)
for command in (start, stop, ps, logs, exec_, inspect):
    container.add_command(command)


class _Line(logging.Formatter):
    """What the library warns of, as our own lines are."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(f"unionfs: {record.getMessage()}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    open_standard_fds()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Line())
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = unionfs.main(words, prog_name="unionfs", standalone_mode=False)
    except NoCommandError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "unionfs"
        _say(f"{error.format_message().rstrip('.')}; see {command} --help")
        return 2
    except click.Abort:
        return 130
    except click.ClickException as error:
        _say(error.format_message())
        return 1
    except BrokenPipeError:
        # The reader of our output has gone, as in "unionfs mounts | head -1".
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if _DEBUG in os.environ:
            raise
        if isinstance(error, UnionfsError):
            _say(str(error))
        elif isinstance(error, OSError):
            where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            _say(f"{where}{error.strerror or error}; run unionfs --debug to see where")
        else:
            _say(f"internal error: {type(error).__name__}: {error}; run unionfs --debug to see where")
        return 1
    return result if isinstance(result, int) else 0


def _say(text: str) -> None:
    click.echo(printable(f"unionfs: {text}"), err=True)


if __name__ == "__main__":
    sys.exit(main())
