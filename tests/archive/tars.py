"""Tar archives for the tests, entry by entry, valid or not."""

from __future__ import annotations

import io
from pathlib import Path

from unionfs.archive.tar_format import END_OF_ARCHIVE, TarEntry, encode_entry, padding
from unionfs.archive.unpacking import UnpackOptions, UnpackResult, unpack


def entry(name: str | bytes, data: bytes = b"", **more: object) -> bytes:
    """A header and its contents; a name that ends with a slash makes a directory."""
    raw = name.encode() if isinstance(name, str) else name
    made = TarEntry(raw, kind=b"5" if raw.endswith(b"/") else b"0", mode=0o755 if raw.endswith(b"/") else 0o644)
    for key, value in more.items():
        setattr(made, key, value.encode() if isinstance(value, str) else value)
    made.size = made.stored_size = len(data)
    return encode_entry(made) + data + padding(len(data))


def directory(name: str, **more: object) -> bytes:
    return entry(name.rstrip("/") + "/", b"", **more)


def symlink(name: str, target: str | bytes) -> bytes:
    return entry(name, kind=b"2", linkname=target, mode=0o777)


def hard_link(name: str, target: str | bytes) -> bytes:
    return entry(name, kind=b"1", linkname=target)


def archive(*entries: bytes) -> bytes:
    return b"".join(entries) + END_OF_ARCHIVE


def apply(root: Path, *entries: bytes, options: UnpackOptions | None = None) -> UnpackResult:
    root.mkdir(exist_ok=True)
    return unpack(io.BytesIO(archive(*entries)), str(root), options or UnpackOptions())
