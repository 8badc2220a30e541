"""Commands that the kernel would not start are found out before."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.engines.images.model import Platform
from unionfs.engines.run.process import check_command, foreign_machine
from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import CommandNotExecutableError, CommandNotFoundError

PROGRAM = Path("/bin/sh").read_bytes()[:512]

# This machine, and one that is not.
MACHINES = ["amd64", "arm64"] if Platform.of_this_machine().architecture == "amd64" else ["arm64", "s390x"]


def elf(machine: str, loader: str = "", *, order: str = "<", wide: bool = True, offset: int = 0) -> bytes:
    """The head of a program; one with a loader has a header of a segment that names it."""
    number = {"386": 3, "amd64": 62, "arm64": 183, "s390x": 22}[machine]
    start, size = (64, 56) if wide else (52, 32)
    end = start + size
    ident = b"\x7fELF" + bytes((2 if wide else 1, 1 if order == "<" else 2, 1)) + bytes(9)
    fields = "HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"
    count = 1 if loader else 0
    head = ident + struct.pack(order + fields, 2, number, 1, 0, start, 0, 0, start, size, count, 0, 0, 0)
    if loader:
        where, length = offset or end, len(loader) + 1
        if wide:
            head += struct.pack(order + "IIQQQQQQ", 3, 4, where, 0, 0, length, length, 1)
        else:
            head += struct.pack(order + "IIIIIIII", 3, where, 0, 0, length, length, 4, 1)
    return head + loader.encode() + b"\0"


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
    add("bin/foreign", elf(MACHINES[1]))
    add("bin/big-endian", elf(MACHINES[0], order=">"))
    add("bin/old", elf("386"))
    add("bin/short", PROGRAM[:10])
    add("bin/unloadable", elf(MACHINES[0], "/lib/ld-musl-x86_64.so.1"))
    add("bin/unloadable-386", elf("386", "/lib/ld-linux.so.2", wide=False))
    add("bin/loadable", elf(MACHINES[0], "/bin/sh"))
    add("bin/loaded-by-mount", elf(MACHINES[0], "/data/ld.so"))
    add("bin/far", elf(MACHINES[0], "/lib/nothere", offset=1 << 40))
    add("bin/script-of-foreign", b"#!/bin/foreign\n")
    add("bin/script-of-script", b"#!/bin/orphan\n")
    add("bin/script-of-itself", b"#!/bin/script-of-itself\n")
    (tmp_path / "bin/link").symlink_to("/srv/tool")
    (tmp_path / "bin/dangling").symlink_to("/bin/true/or/not")
    (tmp_path / "bin/out").symlink_to("/../../../../../../../../bin/sh")
    with RootFs(str(tmp_path)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that was taught no formats of programs."""
    directory = tmp_path / "binfmt_misc"
    directory.mkdir()
    for name in ("register", "status"):
        (directory / name).touch()
    monkeypatch.setattr("unionfs.engines.run.process._BINFMT_MISC", str(directory))
    return directory


def check(rootfs: RootFs, command: str, cwd: str = "/", search: str = "/bin:/opt/bin") -> None:
    check_command(rootfs, command, search, cwd, ["/data", "/bin/hidden", "/dev"])


@pytest.mark.parametrize(
    "command",
    [
        "sh",
        "/bin/sh",
        "plain",
        "script",
        "link",
        "/srv/../srv/tool",
        "bin/sh",
        "out",
        "short",
        "loadable",
        "loaded-by-mount",
        "far",
        "script-of-itself",
    ],
)
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


@pytest.mark.parametrize(
    "command", ["nothere", "/bin/nothere", "/bin/sh/x", "dangling", "orphan", "", "unloadable", "script-of-script"]
)
def test_commands_that_are_not_there(rootfs: RootFs, command: str) -> None:
    with pytest.raises(CommandNotFoundError, match=r"^command not found: "):
        check(rootfs, command)


@pytest.mark.parametrize(
    "command", ["/bin/plain", "/bin", "garbage", "empty", "/", "foreign", "big-endian", "script-of-foreign"]
)
def test_commands_that_cannot_be_executed(rootfs: RootFs, command: str) -> None:
    with pytest.raises(CommandNotExecutableError, match=r"^cannot execute "):
        check(rootfs, command)


@pytest.mark.parametrize("command", ["foreign", "garbage", "big-endian"])
def test_a_machine_with_an_emulator(rootfs: RootFs, formats: Path, command: str) -> None:
    (formats / "qemu-something").touch()
    check(rootfs, command)


@pytest.mark.skipif(Platform.of_this_machine().architecture != "amd64", reason="programs of 32 bits run on amd64")
def test_programs_of_32_bits(rootfs: RootFs) -> None:
    check(rootfs, "old")
    with pytest.raises(CommandNotFoundError, match=r"/lib/ld-linux\.so\.2, which is not in this image"):
        check(rootfs, "unloadable-386")


def test_what_is_said_of_a_foreign_machine(rootfs: RootFs, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandNotExecutableError, match=f"it is for {MACHINES[1]}, but this machine is {MACHINES[0]}"):
        check(rootfs, "foreign")
    here = Platform(os="linux", architecture="amd64", variant="v3")
    monkeypatch.setattr(Platform, "of_this_machine", lambda: here)
    for text in ("linux/arm64/v8", "linux/amd64/v4", "windows/amd64"):
        assert foreign_machine(Platform.parse(text)).startswith(
            f"the image is for {text}, but this machine is linux/amd64/v3;"
        )
    for text in ("linux/amd64", "linux/amd64/v2", "linux/386"):
        assert foreign_machine(Platform.parse(text)) == ""
    assert foreign_machine(Platform()) == ""
