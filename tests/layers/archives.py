"""Tar streams for the tests: ordinary ones, and those that no tool at hand writes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field

OLD_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Member:
    """One entry; a name that ends with a slash is a directory's."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    pax: dict[str, str] = field(default_factory=dict)


def member(name: str, data: bytes | str = b"", **more: object) -> Member:
    """A regular file, or a directory."""
    content = data.encode() if isinstance(data, str) else data
    if name.endswith("/"):
        more = {"kind": tarfile.DIRTYPE, "mode": 0o755, **more}
    return Member(name, content, **more)  # type: ignore[arg-type]


def symlink(name: str, target: str) -> Member:
    """A symbolic link."""
    return Member(name, b"", tarfile.SYMTYPE, target, 0o777)


def hard_link(name: str, target: str) -> Member:
    """A hard link to an earlier entry."""
    return Member(name, b"", tarfile.LNKTYPE, target)


def archive(
    members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT, pax_headers: dict[str, str] | None = None
) -> bytes:
    """The members as a tar stream, padded to 10 KiB as tar does. A character device is /dev/null."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tar_format, pax_headers=pax_headers, errors="surrogateescape"
    ) as tar:
        for one in members:
            info = tarfile.TarInfo(one.name.rstrip("/") if one.kind == tarfile.DIRTYPE else one.name)
            info.type, info.linkname, info.mode, info.mtime = one.kind, one.link, one.mode, OLD_S
            info.size = len(one.data)
            info.pax_headers = one.pax
            if one.kind == tarfile.CHRTYPE:
                info.devmajor, info.devminor = 1, 3
            tar.addfile(info, io.BytesIO(one.data) if one.data else None)
    return out.getvalue()


def files(**contents: bytes | str) -> bytes:
    """An archive of regular files; two underscores in a key stand for a slash, one for a dot."""
    names = {key.replace("__", "/").replace("_", "."): value for key, value in contents.items()}
    return archive(member(name, value) for name, value in names.items())
