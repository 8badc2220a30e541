"""Uppers, work directories and lower layers that are the same, or lie inside each other, however they are named."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import mount_program, mounted_overlay
from tests.support.sandbox import needs_root
from tests.support.snapshot import checksum_layer
from tests.support.syscalls import MNT_DETACH, mount, umount2
from unionfs.errors import LayerError
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.option_text import parse_options

needs_root()

_BIND = 4096

# Lowers, upper, work directory; whether the kernel's overlayfs refuses them too. It has accepted a writable directory
# in a lower layer since Linux 5.13, to which that layer then is written.
OVERLAPS = {
    "upper is lower": ("l", "l", "w", True),
    "by a link": ("link", "l", "w", True),
    "by another link": ("l", "link/sub/..", "w", True),
    "upper is the second lower": ("l2:l", "l", "w", True),
    "upper in lower": ("l", "l/sub", "l/w", False),
    "upper deep in lower": ("l", "l/sub/deep", "l/w", False),
    "upper in lower by dots": ("l", "u/../l/sub", "l/w", False),
    "work in lower": ("l", "u", "l/w", False),
    "work is lower": ("l", "u", "l", True),
    "lower in upper": ("u/in", "u", "w", True),
    "lower in work": ("w/in", "u", "w", True),
    "upper is work": ("l", "u", "u", True),
    "work in upper": ("l", "u", "u/in", True),
    "upper in work": ("l", "w/in", "w", True),
    "bound: upper is lower": ("bound", "l", "w", True),
    "bound: lower is upper": ("l", "bound/sub", "bound/w", False),
    "bound part: upper in lower": ("l", "part/u", "part/w", False),
    "bound part: upper is lower": ("part", "l/sub", "l/w", True),
    "bound twice: upper in lower": ("bound", "part/u", "part/w", False),
    "bound: lower in upper": ("bound/sub", "l", "w", True),
    "bound part: lower in upper": ("part/u", "l", "w", True),
    "data layer in upper": ("l2::u/in", "u", "w", True),
    "upper in data layer": ("l2::l", "l/sub", "l/w", False),
}

# What looks like an overlap and is none.
SEPARATE = {
    "names that begin alike": ("l", "l2", "w"),
    "on a file system mounted in the upper": ("u/other/x", "u", "w"),
    "upper on a file system mounted in the lower": ("u", "u/other/x", "u/other/w"),
    "upper on a bind mount in the lower": ("l2", "l2/mnt/x", "l2/mnt/w"),
    "lowers in one another": ("l:l/sub:l", "u", "w"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``l`` with ``sub``, as ``bound`` too; its ``sub`` as ``part``; a tmpfs in ``u``; ``far`` bound into ``l2``."""
    for name in ("l/sub/deep", "l/sub/u", "l/sub/w", "l/w", "l2/mnt", "u/in", "u/other", "w/in", "bound", "part", "m"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("far/x", "far/w"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("l")
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as mounted:
        for source, target in (("l", "bound"), ("l/sub", "part"), ("far", "l2/mnt")):
            mount(source, target, "", _BIND)
            mounted.callback(umount2, target, MNT_DETACH)
        mount("none", "u/other", "tmpfs")
        mounted.callback(umount2, "u/other", MNT_DETACH)
        for name in ("x", "w"):
            (tmp_path / "u/other" / name).mkdir()
        yield tmp_path
        with contextlib.suppress(OSError):
            umount2("m", MNT_DETACH)  # of a test that failed


def words(lowers: str, upper: str, work: str) -> str:
    return f"lowerdir={lowers},upperdir={upper},workdir={work}"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlap_is_refused(place: Path, name: str) -> None:
    lowers, upper, work, _ = OVERLAPS[name]
    before = checksum_layer("l")
    with pytest.raises(LayerError, match=r"lower layer|inside each other|the same directory") as refused:
        open_tree(parse_options([words(lowers, upper, work)]).options)
    assert "\n" not in str(refused.value)
    assert checksum_layer("l") == before


@pytest.mark.parametrize("name", OVERLAPS)
def test_what_the_kernel_refuses(place: Path, name: str) -> None:
    lowers, upper, work, refuses = OVERLAPS[name]
    with contextlib.ExitStack() as mounted:
        try:
            mounted.enter_context(mounted_overlay(lowers.split(":"), upper, work, "m", ()))
        except OSError:
            assert refuses
        else:
            assert not refuses


@pytest.mark.parametrize("name", SEPARATE)
def test_what_is_separate_is_accepted(place: Path, name: str) -> None:
    lowers, upper, work = SEPARATE[name]
    open_tree(parse_options([words(lowers, upper, work)]).options).close()


def test_a_read_only_mount_overlaps_as_it_likes(place: Path) -> None:
    open_tree(parse_options(["lowerdir=l:l/sub:bound"]).options).close()


@pytest.mark.parametrize("target", ["l", "l/sub", "u", "u/in", "w", "w/in"])
def test_the_mount_point_may_cover_any_of_them(place: Path, target: str) -> None:
    with mounted_overlay(["l"], "u", "w", target, ()):
        pass  # as the kernel has it
    done = _run([mount_program(), "-o", words("l", "u", "w"), target])
    assert (done.returncode, done.stderr) == (0, "")
    try:
        Path(target, "new").touch()
    finally:
        subprocess.run(["umount", target], check=True)
    assert os.path.exists("u/new")


def test_the_mount_programs_refuse_in_one_line(place: Path) -> None:
    for command in (
        [mount_program(), "-o", words("l", "l/sub", "l/w"), "m"],
        [mount_program().removesuffix("-mount"), "mount", "-l", "l", "-u", "l/sub", "-w", "l/w", "m"],
    ):
        done = _run(command)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "upperdir l/sub lies in lower layer l," in done.stderr.replace(f"{place}/", "")
