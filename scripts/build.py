"""Builds what is published: sdist, wheels, Debian packages. Run it as ``scripts/build``.

docs/design/release.md says what is built of what, and how a release is made.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

from build_parts import debian, python_packages
from build_parts import release as releases
from unionfs.errors import UnionfsError

_VERSIONS = ("3.11", "3.12", "3.13", "3.14")
_OUTPUT = click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=python_packages.ROOT / "dist",
    help="Where the results go. Default: dist, beside scripts.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def build() -> None:
    """Build what is published, from what git tracks as it is now. The same commit gives the same bytes."""


@build.command()
@_OUTPUT
def sdist(output: Path) -> None:
    """The source with man pages and completion. All else is made of it."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unionfs-build-") as scratch:
        _sdist(Path(scratch), output)


def _sdist(scratch: Path, output: Path) -> Path:
    python = python_packages.build_environment(scratch / "venv")
    made = python_packages.build_sdist(python, _new(scratch / "sdist"), output)
    print(made)
    return made


@build.command()
@click.option("--pure", is_flag=True, help="One for every Python, of which nothing is compiled; no other unless named.")
@click.option("--for", "versions", multiple=True, type=click.Choice(_VERSIONS), help="May be repeated. Default: all.")
@click.option("--python", "programs", multiple=True, metavar="PROGRAM", help="For this interpreter. May be repeated.")
@_OUTPUT
def wheels(pure: bool, versions: tuple[str, ...], programs: tuple[str, ...], output: Path) -> None:
    """Wheels, compiled unless pure; and the sdist.

    A wheel is compiled in the Debian that has its Python. No Debian has 3.12, which is looked for in PATH.
    """
    output.mkdir(parents=True, exist_ok=True)
    if not (pure or versions or programs):
        versions = _VERSIONS
    for version in [version for version in versions if version not in debian.PYTHONS]:
        program = shutil.which(f"python{version}")
        if program is None:
            raise click.UsageError(f"no Debian has Python {version}, nor is it in PATH; name one with --python")
        programs += (program,)
    with tempfile.TemporaryDirectory(prefix="unionfs-build-") as directory:
        scratch = Path(directory)
        source = _sdist(scratch, output)
        if pure:
            print(python_packages.build_wheel(sys.executable, source, _new(scratch / "pure"), output, pure=True))
        for number, program in enumerate(programs):
            print(python_packages.build_wheel(program, source, _new(scratch / str(number)), output, pure=False))
        for version in [version for version in versions if version in debian.PYTHONS]:
            print(debian.build_wheel(version, source, _new(scratch / version), output))


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory


@build.command()
@click.option("--suite", "suites", multiple=True, type=click.Choice(list(debian.SUITES)), help="Default: all of them.")
@click.option("--revision", default="1", show_default=True, help="Of the packaging: the version's part after the dash.")
@click.option("--source-only", is_flag=True, help="Only the source package.")
@_OUTPUT
def deb(suites: tuple[str, ...], revision: str, source_only: bool, output: Path) -> None:
    """The Debian source package, and packages built of it in a Debian of their own; and the sdist."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unionfs-build-") as directory:
        scratch = Path(directory)
        source = _sdist(scratch, output)
        dsc = debian.source_package(source, _new(scratch / "source"), output, revision)
        print(dsc)
        for suite in () if source_only else suites or debian.SUITES:
            print(debian.build_package(dsc, suite, _new(scratch / suite), output))


@build.command()
@click.argument("version")
@click.option("--dry-run", is_flag=True, help="Build everything, and leave this repository as it is.")
@click.option("--quick", is_flag=True, help="With --dry-run: build only the sdist and the pure wheel.")
@_OUTPUT
def release(version: str, dry_run: bool, quick: bool, output: Path) -> None:
    """Release VERSION: changelog, version, all packages, commit and tag. Nothing is pushed."""
    if quick and not dry_run:
        raise click.UsageError("--quick is for --dry-run")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unionfs-build-") as directory:
        releases.release(version, Path(directory), output, dry_run=dry_run, quick=quick)


def main() -> None:
    """Run the command; every mistake is one line."""
    os.environ["LC_ALL"] = "C.UTF-8"
    try:
        build.main(prog_name="scripts/build", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(f"build: {error.format_message()}")
    except UnionfsError as error:
        sys.exit(f"build: {error}")
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


if __name__ == "__main__":
    main()
