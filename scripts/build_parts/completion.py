"""What shells complete the commands with, as click makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

PROGRAMS: Final = ("unionfs", "unionfs-overlay")
"""The command and the name that it has in the Debian package."""
FILES: Final = {"bash": "{program}", "zsh": "_{program}", "fish": "{program}.fish"}
"""How each shell wants the file to be called."""


def write_completion(into: Path) -> None:
    """Write ``SHELL/FILE`` for each shell and program below the directory ``into``."""
    for shell, name in FILES.items():
        kind = get_completion_class(shell)
        assert kind is not None
        (into / shell).mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            # Not source(), which looks for the shell on this machine.
            made = kind(click.Command(program), {}, program, "_UNIONFS_COMPLETE")
            text = made.source_template % made.source_vars()
            (into / shell / name.format(program=program)).write_text(text.strip() + "\n")
