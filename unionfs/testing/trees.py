"""Small trees and archives for the tests of the contract."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import BinaryIO


def write(root: str, name: str, content: bytes) -> str:
    """Write a file below ``root``, with the directories above it, and return its path."""
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(content)
    return path


def fill_base(root: str) -> None:
    """Two directories, three files, a symbolic and a hard link."""
    write(root, "etc/passwd", b"root")
    write(root, "etc/group", b"wheel")
    write(root, "bin/sh", b"#!")
    os.symlink("bin/sh", root + "/sh")
    os.link(root + "/bin/sh", root + "/bin/bash")


def tar_of(*members: tuple[str, bytes | str | None]) -> io.BytesIO:
    """A tar: contents make a file, None a directory, ``->x`` a symlink."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1_000_000_000
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content.removeprefix("->")
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def members_of(stream: BinaryIO) -> list[tarfile.TarInfo]:
    """What is in an archive."""
    with tarfile.open(fileobj=io.BytesIO(stream.read())) as archive:
        return archive.getmembers()
