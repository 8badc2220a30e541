"""The Debian package: its source, made of the sdist, and the package, built in a Debian of its own."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Final

from build_parts.changelog import debian_changelog
from build_parts.errors import BuildError
from build_parts.python_packages import (
    REQUIREMENTS,
    ROOT,
    finish_wheel,
    prepare_wheel,
    run,
    source_time_s,
    wheel_script,
)
from quickstart_steps import rootfs
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, default_directory, remove_tree
from unionfs import __version__

PACKAGE: Final = "unionfs-overlay"
SUITES: Final = {"trixie": "3.13", "sid": "3.14"}
"""The Debians that the package is for, and their Python."""
PYTHONS: Final = {"3.11": "bookworm"} | {python: suite for suite, python in SUITES.items()}
"""The versions of Python that a Debian has, and which."""
_BUNDLED: Final = ROOT / "packaging/debian/bundled.txt"
_BUILD_PACKAGES: Final = (
    *("build-essential", "debhelper", "lintian"),
    *("python3-click", "python3-dev", "python3-venv"),
)
_OF_SUITE: Final = {"sid": ("python3-fastcrc",)}


def maintainer() -> str:
    """Who makes the package, as Debian's tools are told: ``DEBFULLNAME`` and ``DEBEMAIL``."""
    name = os.environ.get("DEBFULLNAME", "unionfs maintainers")
    return f"{name} <{os.environ.get('DEBEMAIL', f'{PACKAGE}@packages.debian.org')}>"


def download_wheels(pythons: Iterable[str], requirements: Iterable[Path], into: Path) -> None:
    """Fetch wheels for this machine's architecture.

    Args:
        pythons: the versions of Python, as ``3.13``.
        requirements: files for pip.
        into: the directory for them.
    """
    for python in pythons:
        argv: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", into]
        argv += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
        argv += [f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none"]
        argv += [
            f"--platform={tag}_{platform.machine()}" for tag in ("manylinux_2_17", "manylinux2014", "manylinux_2_28")
        ]
        for file in requirements:
            argv += ["-r", file]
        run(argv)


def source_package(sdist: Path, scratch: Path, output: Path, revision: str) -> Path:
    """Make the source package and return its ``.dsc``.

    Args:
        sdist: what it is made of, as the upstream source.
        scratch: an empty directory, for files on the way.
        output: the directory for the result.
        revision: of the packaging, the part of the version after the dash.
    """
    name = f"{PACKAGE}_{__version__}"
    shutil.copy(sdist, scratch / f"{name}.orig.tar.gz")
    wheels = scratch / "wheels"
    download_wheels(SUITES.values(), [REQUIREMENTS, _BUNDLED], wheels)
    (scratch / f"{name}.orig-wheels.tar.gz").write_bytes(_packed(wheels))
    source = scratch / f"{PACKAGE}-{__version__}"
    source.mkdir()
    run(["tar", "-xzf", sdist, "-C", source, "--strip-components=1"])
    wheels.rename(source / "wheels")
    shutil.copytree(source / "packaging/debian", source / "debian")
    changelog = debian_changelog(
        (source / "CHANGELOG.md").read_text(), PACKAGE, revision, maintainer(), source_time_s()
    )
    (source / "debian/changelog").write_text(changelog)
    control = (source / "debian/control").read_text().splitlines()
    control = [f"Maintainer: {maintainer()}" if line.startswith("Maintainer:") else line for line in control]
    (source / "debian/control").write_text("\n".join(control) + "\n")
    run(["dpkg-source", "--build", source], cwd=scratch)
    for made in scratch.glob(f"{PACKAGE}_*"):
        shutil.copy(made, output)
    return output / f"{name}-{revision}.dsc"


def _packed(directory: Path) -> bytes:
    """A tar.gz with the files of ``directory``, without anything of this machine and moment."""
    packed = BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=source_time_s()) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for path in sorted(directory.iterdir()):
            member = tarfile.TarInfo(f"wheels/{path.name}")
            member.size, member.mtime = path.stat().st_size, source_time_s()
            with path.open("rb") as file:
                archive.addfile(member, file)
    return packed.getvalue()


def _tools(suite: str, storage: Storage) -> list[Path]:
    """The directories of a Debian with what builds packages, the top one first; cached."""
    packages = " ".join((*_BUILD_PACKAGES, *_OF_SUITE.get(suite, ())))
    with Sandbox() as sandbox:
        base = Path(rootfs.debian(suite, storage, sandbox, refresh=False).path)

    def make(target: str) -> None:
        os.mkdir(target, 0o755)
        with mounted_root([base], Path(target)) as (sandbox, root):
            sandbox.run(["cp", "--remove-destination", "/etc/resolv.conf", f"{root}/etc/resolv.conf"])
            sandbox.run_in(root, f"apt-get update -q; apt-get install -q -y --no-install-recommends {packages}")
        for name in ("work", "root"):
            remove_tree(os.path.join(target, name))

    digest = hashlib.sha256(packages.encode()).hexdigest()[:8]
    return [Path(storage.cached(f"{base.name}-build-{digest}", make)) / "upper", base]


@contextmanager
def mounted_root(lowers: list[Path], scratch: Path) -> Iterator[tuple[Sandbox, str]]:
    """The Debian of these directories, changed in ``scratch/upper``, and the sandbox in which it can be used."""
    upper, work, root = (scratch / name for name in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir()
    layers = f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={work}"
    with Sandbox() as sandbox:
        sandbox.run(["mount", "-t", "overlay", "build", "-o", layers, str(root)])
        sandbox.run(["mount", "-t", "proc", "proc", str(root / "proc")])
        sandbox.run(["mount", "--rbind", "/dev", str(root / "dev")])
        yield sandbox, str(root)


@contextmanager
def debian_root(suite: str, scratch: Path) -> Iterator[tuple[Sandbox, str]]:
    """A Debian with what builds packages, whose changes are gone afterwards, and the sandbox to run programs in it.

    Args:
        suite: its name.
        scratch: a directory that is ``/build`` there.

    Raises:
        BuildError: this user cannot make one.
    """
    if os.geteuid() != 0:
        raise BuildError("a Debian to build in needs root; run: sudo scripts/build")
    storage = Storage(default_directory())
    lowers = _tools(suite, storage)
    with storage.run_directory(keep=False) as directory, mounted_root(lowers, Path(directory)) as (sandbox, root):
        sandbox.run(["mkdir", f"{root}/build"])
        sandbox.run(["mount", "--bind", str(scratch), f"{root}/build"])
        yield sandbox, root


def build_wheel(python: str, sdist: Path, scratch: Path, output: Path) -> Path:
    """Make a wheel for one of :data:`PYTHONS` in the Debian that has it, and return its path.

    The arguments are those of :func:`build_parts.python_packages.build_wheel`.
    """
    suite = PYTHONS[python]
    prepare_wheel(sdist, scratch)
    download_wheels([python], [REQUIREMENTS], scratch / "wheels")
    with debian_root(suite, scratch) as (sandbox, root):
        sandbox.run_in(root, "cd /build\n" + wheel_script("/usr/bin/python3", offline=True))
    return finish_wheel(scratch, output)


def build_package(dsc: Path, suite: str, scratch: Path, output: Path) -> Path:
    """Build the package for a suite with dpkg-buildpackage, have lintian look at it, and return its path.

    Raises:
        BuildError: lintian found an error.
        CommandFailedError: it could not be built.
    """
    with debian_root(suite, scratch) as (sandbox, root):
        for path in dsc.parent.glob(f"{PACKAGE}_*"):
            shutil.copy(path, scratch)
        script = f"cd /build; dpkg-source --extract {dsc.name} package; cd package; dpkg-buildpackage -us -uc -b"
        with open(scratch / "log", "w") as log:
            sandbox.run_in(root, script, each_line=lambda line: print(line, file=log, flush=True))
        said = sandbox.run_in(root, "cd /build; lintian --allow-root --fail-on none *.changes")
        print(said)
        if errors := [line for line in said.splitlines() if line.startswith("E:")]:
            raise BuildError(f"lintian found {len(errors)} errors in the package for {suite}; the first: {errors[0]}")
        (made,) = scratch.glob(f"{PACKAGE}_*.deb")
        into = output / suite
        into.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(made, into))
