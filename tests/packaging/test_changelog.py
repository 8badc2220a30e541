"""The changelog: what is made of it, and that it names the version that this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from build_parts.changelog import debian_changelog, released, releases
from build_parts.errors import BuildError
from unionfs import __version__

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
# Changes

## 0.2.0 (unreleased)

- One thing, `as code`, that
  goes on ([how](docs/how.md)).
- Another.

## 0.1.0 (2026-12-24)

- The first.
"""


def test_the_newest_section_is_this_version() -> None:
    newest = releases((ROOT / "CHANGELOG.md").read_text())[0]
    assert newest.version == __version__
    assert len(newest.changes) > 20


def test_sections_are_read() -> None:
    newest, first = releases(TEXT)
    assert (newest.version, newest.date) == ("0.2.0", None)
    assert newest.changes == ("One thing, `as code`, that goes on ([how](docs/how.md)).", "Another.")
    assert (first.version, first.date, first.changes) == ("0.1.0", "2026-12-24", ("The first.",))


@pytest.mark.parametrize("text", ["# Changes\n", "## Unreleased\n\n- One.\n", "## 0.1 (2026-12-24)\n"])
def test_what_is_no_changelog_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"CHANGELOG\.md"):
        releases(text)


def test_a_release_gives_the_newest_section_a_date() -> None:
    assert "## 0.3.0 (2027-01-31)\n\n- One" in released(TEXT, "0.3.0", "2027-01-31")
    with pytest.raises(BuildError, match="was released on 2026-12-24"):
        released(TEXT[TEXT.index("## 0.1.0") :], "0.3.0", "2027-01-31")
    with pytest.raises(BuildError, match="says nothing"):
        released("## 0.2.0 (unreleased)\n", "0.2.0", "2027-01-31")


def test_debian_reads_its_changelog(tmp_path: Path) -> None:
    file = tmp_path / "changelog"
    file.write_text(debian_changelog(TEXT, "package", "3", "Some One <some@one.example>", 1_800_000_000))

    def parsed(field: str) -> str:
        argv = ["dpkg-parsechangelog", "--all", f"--file={file}", f"--show-field={field}"]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.strip()

    assert parsed("Version") == "0.2.0-3"
    assert parsed("Maintainer") == "Some One <some@one.example>"
    assert parsed("Timestamp") == "1800000000"
    changes = parsed("Changes")
    assert "package (0.2.0-3) UNRELEASED; urgency=medium" in changes
    assert "* One thing, as code, that goes on (how)." in changes
    assert "package (0.1.0-3) unstable; urgency=medium" in changes
