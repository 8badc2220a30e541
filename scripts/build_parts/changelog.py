"""CHANGELOG.md, from which a release has its number and its notes, and debian/changelog is made."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime

from build_parts.errors import BuildError

_HEADING = re.compile(r"^## (?P<version>\d+\.\d+\.\d+) \((?P<date>unreleased|\d{4}-\d\d-\d\d)\)$", re.MULTILINE)
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class Release:
    """One section of the changelog."""

    version: str
    date: str | None
    """As YYYY-MM-DD; None while it has not been released."""
    changes: tuple[str, ...]
    """What users see, in Markdown without line breaks."""


def releases(text: str) -> list[Release]:
    """The sections of CHANGELOG.md, the newest first.

    Raises:
        BuildError: there is none, or a heading is not of the form ``## 1.2.3 (2027-01-31)`` or ``(unreleased)``.
    """
    for line in re.findall(r"^## .*$", text, re.MULTILINE):
        if not _HEADING.match(line):
            raise BuildError(f"CHANGELOG.md: '{line}' is no heading of a release; write it as '## 1.2.3 (unreleased)'")
    starts = list(_HEADING.finditer(text))
    if not starts:
        raise BuildError("CHANGELOG.md has no release; begin it with '## 1.2.3 (unreleased)'")
    found = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        body = text[start.end() : following.start() if following else len(text)]
        items = re.split(r"^- ", body, flags=re.MULTILINE)[1:]
        date = None if start["date"] == "unreleased" else start["date"]
        found.append(Release(start["version"], date, tuple(" ".join(item.split()) for item in items)))
    return found


def released(text: str, version: str, date: str) -> str:
    """CHANGELOG.md with its newest section given ``version`` and ``date``.

    Raises:
        BuildError: the newest section was released already, or is empty.
    """
    newest = releases(text)[0]
    if newest.date is not None:
        raise BuildError(
            f"CHANGELOG.md: {newest.version} was released on {newest.date}; add '## {version} (unreleased)'"
        )
    if not newest.changes:
        raise BuildError(f"CHANGELOG.md says nothing of {version}; write what users will see")
    return text.replace(f"## {newest.version} (unreleased)", f"## {version} ({date})", 1)


def debian_changelog(text: str, package: str, revision: str, maintainer: str, now_s: int) -> str:
    """debian/changelog (deb-changelog(5)) with the sections of CHANGELOG.md.

    Args:
        text: CHANGELOG.md.
        package: the source package.
        revision: of the packaging, the part of the version after the dash.
        maintainer: ``NAME <ADDRESS>``.
        now_s: the date of a section that has not been released, in seconds since 1970.
    """
    entries = []
    for release in releases(text):
        when = datetime.fromisoformat(f"{release.date}T12:00:00+00:00") if release.date else None
        date = format_datetime(when or datetime.fromtimestamp(now_s, UTC))
        suite = "unstable" if when else "UNRELEASED"
        changes = "\n".join(
            textwrap.fill(
                _LINK.sub(r"\1", change).replace("`", ""),
                width=78,
                initial_indent="  * ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for change in release.changes
        )
        head = f"{package} ({release.version}-{revision}) {suite}; urgency=medium"
        entries.append(f"{head}\n\n{changes}\n\n -- {maintainer}  {date}\n")
    return "\n".join(entries)
