"""Man pages, made of the guides in docs/ by pandoc."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pypandoc

PAGES: Final = {
    "unionfs-mount": "mount a union of directories",
    "unionfs": "union mounts, images and containers from layers",
}
"""The programs that have a page, all in section 8: what the page's NAME says of each."""


def man_page(source: Path, program: str, version: str, now_s: int) -> str:
    """The man page of ``program`` as groff text.

    Args:
        source: the source tree, with ``docs/PROGRAM.md`` and ``packaging/man.lua``.
        program: one of :data:`PAGES`.
        version: of unionfs.
        now_s: the date of the page, in seconds since 1970.
    """
    title, _, text = (source / "docs" / f"{program}.md").read_text().partition("\n")
    assert title == f"# {program}(8)", f"docs/{program}.md begins with {title!r}"
    # What stands before the first section belongs to the description.
    first, start, sections = text.partition("\n## ")
    heading = "\n## Description\n"
    text = start + sections
    text = text.replace(heading, heading + first, 1) if heading in text else heading + first + text
    made: str = pypandoc.convert_text(
        f"## Name\n\n{program} - {PAGES[program]}\n{text}",
        "man",
        format="gfm",
        extra_args=[
            "--standalone",
            "--wrap=none",
            "--shift-heading-level-by=-1",
            f"--lua-filter={os.fspath(source / 'packaging/man.lua')}",
            f"--metadata=title={program.upper()}",
            "--metadata=section=8",
            f"--metadata=date={datetime.fromtimestamp(now_s, UTC):%Y-%m-%d}",
            f"--metadata=footer=unionfs {version}",
        ],
    )
    return made


def write_man_pages(source: Path, into: Path, version: str, now_s: int) -> None:
    """Write the pages of all programs to the directory ``into``; the arguments are those of :func:`man_page`."""
    into.mkdir(parents=True, exist_ok=True)
    for program in PAGES:
        (into / f"{program}.8").write_text(man_page(source, program, version, now_s))
