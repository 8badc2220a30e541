"""The root file system to work in: a directory, an unpacked archive, or a Debian built for the occasion."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

from quickstart_steps.apt_sources import machine_archives, transport_settings
from quickstart_steps.errors import CommandFailedError, QuickstartError
from quickstart_steps.progress import step
from quickstart_steps.sandbox import Sandbox, finish
from quickstart_steps.storage import Storage

_PIECE_BYTES = 1 << 20
_GZIP, _XZ, _ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_TAR_MAGIC_OFFSET = 257
_BUILD_STAGE = re.compile(r"I: (.+?)\.*$")


@dataclass(frozen=True, slots=True)
class Rootfs:
    """A root file system on disk, and what to call it."""

    path: str
    title: str


def from_directory(path: str) -> Rootfs:
    """Use a directory as it is; nothing in it will be changed."""
    _check_is_root(path, path)
    return Rootfs(os.path.realpath(path), f"the directory {path}")


def from_archive(path: str, into: str, sandbox: Sandbox) -> Rootfs:
    """Unpack a tar of a root file system, plain or compressed with gzip, xz or zstd, to the directory ``into``."""
    try:
        with open(path, "rb") as archive:
            option = _compression_option(archive.read(_TAR_MAGIC_OFFSET + 5), path)
            archive.seek(0)
            os.mkdir(into, 0o755)
            # Device nodes cannot be made in a user namespace, and /dev is put together for each run anyway.
            argv = ["tar", "--extract", "--file=-", f"--directory={into}", "--numeric-owner", "--same-owner"]
            argv += ["--preserve-permissions", "--xattrs", "--xattrs-include=*"]
            argv += ["--exclude=./dev/*", "--exclude=dev/*", *option]
            with step(f"Unpacking {path}", total=os.fstat(archive.fileno()).st_size) as shown:
                process = sandbox.start(argv, stdin=subprocess.PIPE)
                assert process.stdin is not None
                try:
                    with process.stdin:
                        while piece := archive.read(_PIECE_BYTES):
                            process.stdin.write(piece)
                            shown.advance(len(piece))
                except BrokenPipeError:
                    pass  # tar ended before its input did; its status and words tell why
                finish(process, "tar")
    except OSError as error:
        raise QuickstartError(f"cannot read {path}: {error.strerror}; check the path after --rootfs") from error
    except CommandFailedError as error:
        raise QuickstartError(f"cannot unpack {path} ({error}); give a complete tar archive") from error
    _check_is_root(into, path)
    return Rootfs(into, f"the archive {path}")


def _compression_option(start: bytes, path: str) -> list[str]:
    for magic, option, program in ((_GZIP, "--gzip", "gzip"), (_XZ, "--xz", "xz"), (_ZSTD, "--zstd", "zstd")):
        if start.startswith(magic):
            if shutil.which(program) is None:
                raise QuickstartError(f"{path} needs the program {program}, which is missing; run scripts/setup")
            return [option]
    if start[_TAR_MAGIC_OFFSET:] != b"ustar":
        raise QuickstartError(f"{path} is not a tar archive (plain, gzip, xz or zstd); give one or a directory")
    return []


def debian(suite: str, storage: Storage, sandbox: Sandbox, *, refresh: bool) -> Rootfs:
    """A minimal Debian, built by mmdebstrap from the archive that this machine uses; cached."""
    if not re.fullmatch(r"[a-z][a-z0-9.-]*", suite):
        raise QuickstartError(f"'{suite}' is not the name of a Debian suite; give one such as bookworm")
    sources = machine_archives().lines(suite)
    settings = transport_settings()
    digest = hashlib.sha256("\n".join(sources).encode()).hexdigest()[:8]
    title = f"Debian {suite} ({platform.machine()}, minimal)"

    def build(target: str) -> None:
        if shutil.which("mmdebstrap") is None:
            raise QuickstartError("mmdebstrap is missing; run scripts/setup, or give a root file system with --rootfs")
        # `root`: we are root already, in a namespace of our own or on the machine itself.
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]
        argv += [f"--aptopt={setting}" for setting in settings]
        argv += [suite, target, *sources]
        with step(f"Building {title}") as shown:

            def show(line: str) -> None:
                if stage := _BUILD_STAGE.match(line):
                    shown.detail(stage[1])

            try:
                sandbox.run(argv, each_line=show, name=f"mmdebstrap {suite}")
            except CommandFailedError as error:
                reason = next((line for line in error.output.splitlines() if line.startswith("E:")), str(error))
                raise CommandFailedError(
                    f"mmdebstrap could not build {title} ({reason}); check the network and {sources[0].split()[2]}, "
                    "or give a root file system with --rootfs",
                    error.output,
                ) from error

    name = f"debian-{suite}-{platform.machine()}-{digest}"
    return Rootfs(storage.cached(name, build, refresh=refresh), title)


def _check_is_root(path: str, named: str) -> None:
    # lexists: in a root file system these are often links that lead nowhere from outside.
    if not any(os.path.lexists(os.path.join(path, shell)) for shell in ("bin/sh", "usr/bin/sh")):
        raise QuickstartError(f"{named} has no bin/sh, so it is not a root file system; give one that has a shell")
