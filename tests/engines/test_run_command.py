"""Commands that the kernel would not start are found out before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.engines.run.executable import check_command
from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import CommandNotExecutableError, CommandNotFoundError

PROGRAM = Path("/bin/sh").read_bytes()[:512]


@pytest.fixture
def rootfs(tmp_path: Path) -> Iterator[RootFs]:
    for name in ("bin", "opt/bin", "srv", "usr"):
        (tmp_path / name).mkdir(parents=True)

    def add(name: str, data: bytes, mode: int = 0o755) -> None:
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(mode)

    add("bin/sh", PROGRAM)
    add("bin/plain", PROGRAM, 0o644)
    add("opt/bin/plain", PROGRAM)
    add("bin/script", b"#! /bin/sh -e\n")
    add("bin/orphan", b"#!/usr/bin/nothere\n")
    add("bin/mounted", b"#!/data/python\n")
    add("bin/garbage", b"garbage")
    add("bin/empty", b"")
    add("srv/tool", PROGRAM)
    (tmp_path / "bin/link").symlink_to("/srv/tool")
    (tmp_path / "bin/dangling").symlink_to("/bin/true/or/not")
    (tmp_path / "bin/out").symlink_to("/../../../../../../../../bin/sh")
    with RootFs(str(tmp_path)) as opened:
        yield opened


def check(rootfs: RootFs, command: str, cwd: str = "/", search: str = "/bin:/opt/bin") -> None:
    check_command(rootfs, command, search, cwd, ["/data", "/bin/hidden", "/dev"])


@pytest.mark.parametrize("command", ["sh", "/bin/sh", "plain", "script", "link", "/srv/../srv/tool", "bin/sh", "out"])
def test_good_commands(rootfs: RootFs, command: str) -> None:
    check(rootfs, command)


def test_relative_ones_count_from_the_working_directory(rootfs: RootFs) -> None:
    check(rootfs, "./tool", cwd="/srv")
    check(rootfs, "../bin/sh", cwd="/srv")
    check(rootfs, "tool", cwd="/srv", search="/bin:.")
    check(rootfs, "tool", cwd="/srv", search="/bin:")
    with pytest.raises(CommandNotFoundError):
        check(rootfs, "./tool", cwd="/bin")


@pytest.mark.parametrize("command", ["/data/anything", "/bin/hidden", "/dev/init", "mounted"])
def test_what_is_mounted_later_is_not_judged(rootfs: RootFs, command: str) -> None:
    check(rootfs, command)


@pytest.mark.parametrize("command", ["nothere", "/bin/nothere", "/bin/sh/x", "dangling", "orphan", ""])
def test_commands_that_are_not_there(rootfs: RootFs, command: str) -> None:
    with pytest.raises(CommandNotFoundError, match=r"^command not found: "):
        check(rootfs, command)


@pytest.mark.parametrize("command", ["/bin/plain", "/bin", "garbage", "empty", "/"])
def test_commands_that_cannot_be_executed(rootfs: RootFs, command: str) -> None:
    with pytest.raises(CommandNotExecutableError, match=r"^cannot execute "):
        check(rootfs, command)
