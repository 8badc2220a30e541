"""A release: the version and the changelog in one commit, everything built of it, and a tag."""

from __future__ import annotations

import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from build_parts.changelog import released
from build_parts.errors import BuildError
from build_parts.python_packages import ROOT, run

_VERSION_LINE = re.compile(r'^__version__ = ".*"$', re.MULTILINE)


def release(version: str, scratch: Path, output: Path, *, dry_run: bool, quick: bool) -> None:
    """Make a release of the commit that is checked out.

    All is done in a clone; only when everything was built do the commit and the tag come to this repository.

    Args:
        version: as 1.2.3.
        scratch: an empty directory, for files on the way.
        output: the directory for what is published.
        dry_run: leave this repository as it is.
        quick: build the sdist and the pure wheel only; with ``dry_run``.

    Raises:
        BuildError: this repository or its changelog is not ready, or something could not be built.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise BuildError(f"'{version}' is no version; write it as 1.2.3")
    if run(["git", "tag", "--list", f"v{version}"], cwd=ROOT):
        raise BuildError(f"there is a tag v{version}; choose the next version")
    if run(["git", "status", "--porcelain"], cwd=ROOT) and not dry_run:
        raise BuildError("there are changes that are not committed; commit them, or put them away with git stash")
    clone = scratch / "clone"
    run(["git", "clone", "--quiet", ROOT, clone])
    changelog, package = clone / "CHANGELOG.md", clone / "unionfs/__init__.py"
    changelog.write_text(released(changelog.read_text(), version, f"{datetime.now(UTC):%Y-%m-%d}"))
    package.write_text(_VERSION_LINE.sub(f'__version__ = "{version}"', package.read_text()))
    who = ["-c", f"user.name={_git_config('user.name')}", "-c", f"user.email={_git_config('user.email')}"]
    run(["git", *who, "commit", "--quiet", "--all", "--message", f"Release {version}"], cwd=clone)
    run(["git", *who, "tag", "--annotate", "--message", f"unionfs {version}", f"v{version}"], cwd=clone)
    for what in [["wheels", "--pure"]] if quick else [["wheels", "--pure"], ["wheels"], ["deb"]]:
        env = {"PYTHONPATH": f"{clone}:{clone / 'scripts'}"}
        print(run([sys.executable, clone / "scripts/build.py", *what, "--output", output], env=env), end="")
    if f"unionfs-{version}.tar.gz" not in os.listdir(output):
        raise BuildError(f"no sdist of {version} was made; see what is in {output}")
    if dry_run:
        print(f"{version} can be released; nothing was changed here")
        return
    run(["git", "fetch", "--quiet", clone, "HEAD", f"refs/tags/v{version}:refs/tags/v{version}"], cwd=ROOT)
    run(["git", "merge", "--quiet", "--ff-only", f"v{version}"], cwd=ROOT)
    print(f"committed and tagged; publish it with: git push origin HEAD v{version}")


def _git_config(name: str) -> str:
    """Who the person is, by the configuration that holds here, which a clone does not have."""
    try:
        return run(["git", "config", name], cwd=ROOT).strip()
    except BuildError:
        raise BuildError(f"git does not know who you are; run: git config --global {name} ...") from None
