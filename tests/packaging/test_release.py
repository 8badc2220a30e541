"""A release, tried: everything in a clone, and this repository as it was."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def release(*words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, ROOT / "scripts/build.py", "release", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dry_run(tmp_path: Path) -> None:
    before = git("rev-parse", "HEAD"), git("tag", "--list"), git("status", "--porcelain")
    done = release("987.6.5", "--dry-run", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("987.6.5 can be released; nothing was changed here\n")
    assert (git("rev-parse", "HEAD"), git("tag", "--list"), git("status", "--porcelain")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"unionfs-987.6.5.tar.gz", "unionfs-987.6.5-py3-none-any.whl"}
    with tarfile.open(tmp_path / "unionfs-987.6.5.tar.gz") as archive:

        def text(name: str) -> str:
            file = archive.extractfile(f"unionfs-987.6.5/{name}")
            assert file is not None
            return file.read().decode()

        assert '__version__ = "987.6.5"' in text("unionfs/__init__.py")
        assert re.search(r"^## 987\.6\.5 \(20\d\d-\d\d-\d\d\)$", text("CHANGELOG.md"), re.MULTILINE)
        assert '"unionfs 987.6.5"' in text("packaging/man/unionfs.8")


@pytest.mark.parametrize(
    ("words", "said"),
    [(("1.2",), "'1.2' is no version"), (("1.2.3", "--quick"), "--quick is for --dry-run")],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = release(*words, "--output", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"build: {said}")
    assert done.stderr.count("\n") == 1
