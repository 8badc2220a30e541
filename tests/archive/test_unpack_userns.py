"""Unpacking as the root of a user namespace, where devices cannot be made and few ids exist."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.archive.tars import archive, directory, entry


def unpack_in_userns(archive_path: Path, target: Path, mode: str = "OVERLAY") -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack\n"
        "from unionfs.errors import ArchiveError\n"
        "try:\n"
        f"    with open(sys.argv[1], 'rb') as file:\n"
        f"        print(unpack(file, sys.argv[2], UnpackOptions(whiteouts=WhiteoutMode.{mode})))\n"
        "except ArchiveError as error:\n"
        "    sys.exit(str(error))\n"
    )
    run = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", code, str(archive_path), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in run.stderr or "Operation not permitted" in run.stderr.split("\n")[0][:60]:
        pytest.skip("no user namespaces here")
    return run


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    return target


def test_devices_are_left_out_and_whiteouts_are_made(tmp_path: Path, target: Path) -> None:
    data = archive(
        entry("null", kind=b"3", major=1, minor=3),
        entry("fifo", kind=b"6"),
        entry("f", b"x", mode=0o4755),
        entry("d/.wh..wh..opq"),
        entry(".wh.gone"),
        directory("e"),
    )
    (tmp_path / "layer.tar").write_bytes(data)
    run = unpack_in_userns(tmp_path / "layer.tar", target)
    assert run.returncode == 0, run.stderr
    assert "skipped=1" in run.stdout
    assert sorted(os.listdir(target)) == ["d", "e", "f", "fifo", "gone"]
    info = (target / "gone").lstat()
    assert stat.S_ISCHR(info.st_mode)
    assert info.st_rdev == 0
    assert os.getxattr(target / "d", "user.overlay.opaque") == b"y"
    assert stat.S_IMODE((target / "f").stat().st_mode) == 0o4755


def test_unmapped_owner_gets_the_hint_about_subuid(tmp_path: Path, target: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(archive(entry("f", b"x", uid=1000)))
    run = unpack_in_userns(tmp_path / "layer.tar", target)
    assert run.returncode == 1
    assert run.stderr.startswith(
        "f: cannot be unpacked: Invalid argument; try increasing the number of subordinate IDs"
    )
