"""The sdist and the pure wheel of scripts/build: whole, the same each time, and of use without a compiler."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, needs_root
from unionfs import __version__

pytest_plugins = ["tests.support.sandbox"]
needs_root()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # pip fetches what builds them and what they need

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("unionfs-mount", "unionfs")


@dataclass(frozen=True)
class Packages:
    """What was built."""

    sdist: Path
    wheel: Path


def built(output: Path, umask: int) -> Packages:
    """Build the sdist and the pure wheel, by another person in another directory each time."""
    argv: list[str | Path] = [sys.executable, ROOT / "scripts/build.py", "wheels", "--pure", "--output", output]
    scratch = output.parent / f"scratch-{umask:o}"
    scratch.mkdir()
    done = subprocess.run(
        argv, capture_output=True, text=True, umask=umask, env=os.environ | {"TMPDIR": str(scratch)}, check=False
    )
    assert done.returncode == 0, done.stderr
    sdist, wheel = map(Path, done.stdout.split())
    return Packages(sdist, wheel)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return built(tmp_path_factory.mktemp("packages") / "dist", 0o022)


def test_the_same_bytes_again(packages: Packages, tmp_path: Path) -> None:
    again = built(tmp_path / "dist", 0o077)
    assert again.sdist.read_bytes() == packages.sdist.read_bytes()
    assert again.wheel.read_bytes() == packages.wheel.read_bytes()


def test_the_sdist_has_the_whole_source(packages: Packages) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(packages.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {name for name in tracked if (ROOT / name).exists()} <= set(members)
    assert {f"packaging/man/{page}.8" for page in PAGES} <= set(members)
    assert members["scripts/build"].mode == 0o755
    assert members["README.md"].mode == 0o644
    assert not [name for name in members if name.endswith((".so", ".pyc"))]


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_metadata(packages: Packages) -> None:
    said = metadata(packages.wheel)
    assert packages.wheel.name == f"unionfs-{__version__}-py3-none-any.whl"
    assert (said["Name"], said["Version"]) == ("unionfs", __version__)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["License-File"] == "LICENSE"
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("trio") for line in needed)
    assert not any(line.startswith("pyfuse3") for line in needed), "it comes as source only, and needs a compiler"
    assert any(line.startswith("pyfuse3") and "extra ==" in line for line in said.get_all("Requires-Dist", []))


@pytest.fixture(scope="module")
def installed(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh virtual environment with the wheel, where no compiler is to be found."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=True)
    argv: list[str | Path] = [
        directory / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--only-binary=:all:",
        packages.wheel,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"CC": "/bin/false"}, check=False)
    assert done.returncode == 0, done.stderr
    yield directory


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("UNIONFS_TRANSPORT", "PYTHONPATH")}


def test_the_wheel_mounts(installed: Path, box: Sandbox) -> None:
    box.lower().file("name", b"text")
    program = installed / "bin/unionfs-mount"
    options = f"lowerdir={box.lowers[0]},upperdir={box.upper},workdir={box.work}"
    env = environment() | {"UNIONFS_SUPERVISOR": "0"}
    subprocess.run([program, "-o", options, box.target], check=True, env=env)
    try:
        Path(box.target, "new").write_text("new")
        assert sorted(os.listdir(box.target)) == ["name", "new"]
    finally:
        subprocess.run([installed / "bin/unionfs", "umount", box.target], check=True, env=env)
    assert Path(str(box.upper), "new").read_text() == "new"


def test_types_are_seen_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    """The tool and the driver of the guides, checked as their authors would."""
    examples = [shutil.copy(ROOT / f"docs/examples/{name}.py", tmp_path) for name in ("build_image", "copies")]
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import unionfs\nunionfs.mounted(lower=[1], target='x', transport='pigeon')\nunionfs.nothing\n")
    argv: list[str | Path] = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        f"--cache-dir={tmp_path}/cache",
    ]
    argv += ["--python-executable", installed / "bin/python"]
    done = subprocess.run([*argv, *examples], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*argv, wrong], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.findall(r"\[([a-z-]+)\]$", done.stdout, re.MULTILINE) == ["list-item", "arg-type", "attr-defined"]


def test_without_pyfuse3_one_line_says_so(installed: Path, box: Sandbox) -> None:
    box.lower().file("name", b"text")
    program = installed / "bin/unionfs-mount"
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    assert f"unionfs-mount: version {__version__}\n" in version
    assert "pyfuse3 version: not installed; transport=direct only\n" in version
    argv: list[str | Path] = [program, "-o", f"lowerdir={box.lowers[0]},transport=pyfuse3", box.target]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "unionfs-mount: the transport pyfuse3 needs the Python package pyfuse3, which is not installed; install "
        "unionfs[pyfuse3], or mount with transport=direct\n"
    )


@pytest.mark.parametrize("page", PAGES)
def test_man_finds_the_page(installed: Path, page: str) -> None:
    """Where pipx and pip put it; groff has nothing to say against it, and no option of the guide is missing."""
    argv: list[str | Path] = ["man", "--warnings", "-M", installed / "share/man", page]
    env = os.environ | {"MANWIDTH": "500", "LC_ALL": "C.UTF-8"}
    shown = subprocess.run(argv, check=True, capture_output=True, text=True, env=env)
    assert shown.stderr == ""
    text = " ".join(shown.stdout.replace("\u2010", "-").split())
    assert f"NAME {page} - " in text
    terms = re.findall(r"^\| `([^`]+)`", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE)
    assert len(terms) > 10
    for term in terms:
        assert " ".join(term.replace("\\|", "|").split()) in text, f"{page}(8) lacks {term}"


@pytest.fixture(scope="module")
def completion(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completion")
    with tarfile.open(packages.sdist) as archive:
        for member in archive.getmembers():
            if "/packaging/completion/" in member.name and member.isfile():
                archive.extract(member, directory)
    return directory / f"unionfs-{__version__}" / "packaging/completion"


def completed(installed: Path, script: str, shell: str) -> str:
    env = environment() | {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([shell, "-c", script], check=True, capture_output=True, text=True, env=env).stdout


def test_bash_completes(installed: Path, completion: Path) -> None:
    script = f"""
        source {completion}/bash/unionfs
        COMP_WORDS=(unionfs um) COMP_CWORD=1
        _unionfs_completion unionfs
        echo "${{COMPREPLY[@]}}"
    """
    assert completed(installed, script, "bash") == "umount\n"


def test_fish_completes(installed: Path, completion: Path) -> None:
    script = f"source {completion}/fish/unionfs.fish; complete --do-complete 'unionfs um'"
    assert completed(installed, script, "fish").split()[0] == "umount"


def test_zsh_takes_it(completion: Path) -> None:
    file = completion / "zsh/_unionfs"
    assert file.read_text().startswith("#compdef unionfs\n")
    subprocess.run(["zsh", "-n", file], check=True)
