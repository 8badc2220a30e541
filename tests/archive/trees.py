"""Small trees for the archive tests: made from a description, described again, and whiteouts of every dialect."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

OPAQUE = "trusted.overlay.opaque"


def write(path: Path, data: bytes | str = b"", *, mode: int = 0o644, mtime: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def whiteout(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, 0)


def opaque(path: Path, value: bytes = b"y") -> None:
    path.mkdir(parents=True, exist_ok=True)
    os.setxattr(path, OPAQUE, value)


def describe(root: str | bytes | Path, *, times: bool = True, xattrs: bool = True) -> dict[bytes, Any]:
    """Everything that an archive should carry, by path; names of one inode are grouped by their first name."""
    found: dict[bytes, Any] = {}
    first: dict[tuple[int, int], bytes] = {}
    top = os.fsencode(root)
    for base, dirs, files in os.walk(top):
        dirs.sort()
        for name in sorted([*dirs, *files]):
            path = os.path.join(base, name)
            info = os.lstat(path)
            rel = os.path.relpath(path, top)
            entry: dict[str, Any] = {
                "mode": oct(info.st_mode),
                "uid": info.st_uid,
                "gid": info.st_gid,
            }
            if times:
                entry["mtime"] = int(info.st_mtime_ns // 10**9)
            if stat.S_ISLNK(info.st_mode):
                entry["target"] = os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                with open(path, "rb") as file:
                    entry["data"] = file.read()
            elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                entry["rdev"] = info.st_rdev
            if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
                entry["link"] = first.setdefault((info.st_dev, info.st_ino), rel)
            if xattrs:
                names = os.listxattr(path, follow_symlinks=False)
                entry["xattrs"] = {n: os.getxattr(path, n, follow_symlinks=False) for n in sorted(names)}
            found[rel] = entry
    return found
