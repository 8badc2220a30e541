"""A directory tree as a value that can be compared, and checksums of layers."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}
D_TYPES = {"fifo": 1, "char": 2, "dir": 4, "block": 6, "file": 8, "symlink": 10, "socket": 12}


@dataclass(frozen=True, slots=True)
class Entry:
    """What a program can see of one name.

    ``size`` and ``nlink`` of directories are left out: both belong to the file system that holds them.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    rdev: int
    mtime_ns: int
    target: str
    digest: str
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...] = ()
    """The other names of the same file in this tree."""


Snapshot = dict[str, Entry]


class TreeFaultError(AssertionError):
    """A tree that contradicts itself, for example a listed name that is not there."""


def kind_of(mode: int) -> str:
    """``file``, ``dir``, ``symlink`` and so on."""
    return KINDS[stat.S_IFMT(mode)]


def read_xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    """All extended attributes of a name, links not followed."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def _digest(name: str, dir_fd: int) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        content = hashlib.sha256()
        while block := os.read(fd, 1 << 20):
            content.update(block)
        return content.hexdigest()[:16]
    finally:
        os.close(fd)


def _entry(name: str, dir_fd: int, st: os.stat_result, content: bool, xattrs: bool) -> Entry:
    kind = kind_of(st.st_mode)
    is_dir = kind == "dir"
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        size=0 if is_dir else st.st_size,
        nlink=0 if is_dir else st.st_nlink,
        rdev=st.st_rdev if kind in ("char", "block") else 0,
        mtime_ns=st.st_mtime_ns,
        target=os.readlink(name, dir_fd=dir_fd) if kind == "symlink" else "",
        digest=_digest(name, dir_fd) if content and kind == "file" else "",
        # The calls take no directory descriptor; a path through /proc keeps long paths possible.
        xattrs=read_xattrs(f"/proc/self/fd/{dir_fd}/{name}") if xattrs else (),
    )


def snapshot(
    root: str,
    *,
    content: bool = True,
    xattrs: bool = True,
    check_ino: bool = True,
    mtime: Callable[[int], int] = lambda ns: ns,
) -> Snapshot:
    """The tree below ``root``, with ``.`` for ``root`` itself.

    Raises TreeFaultError when listing and stat disagree: a name listed twice or not found, another type or inode.
    """
    found: Snapshot = {}
    by_inode: dict[tuple[int, int], list[str]] = defaultdict(list)

    def visit(dir_fd: int, prefix: str) -> None:
        with os.scandir(dir_fd) as listing:
            entries = list(listing)
        names = [e.name for e in entries]
        if len(set(names)) != len(names):
            raise TreeFaultError(f"{prefix or '.'}: listed twice: {sorted(n for n in names if names.count(n) > 1)}")
        for e in sorted(entries, key=lambda e: e.name):
            path = prefix + e.name
            try:
                st = os.stat(e.name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                raise TreeFaultError(f"{path}: listed, but not found") from None
            if check_ino and e.inode() != st.st_ino:
                raise TreeFaultError(f"{path}: d_ino {e.inode()}, st_ino {st.st_ino}")
            if (e.is_dir(follow_symlinks=False), e.is_symlink()) != (
                stat.S_ISDIR(st.st_mode),
                stat.S_ISLNK(st.st_mode),
            ):
                raise TreeFaultError(f"{path}: d_type differs from {kind_of(st.st_mode)}")
            entry = _entry(e.name, dir_fd, st, content, xattrs)
            found[path] = entry
            if entry.kind == "dir":
                fd = os.open(e.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
                try:
                    visit(fd, path + "/")
                finally:
                    os.close(fd)
            else:
                by_inode[st.st_dev, st.st_ino].append(path)

    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found["."] = _entry(".", fd, os.stat(fd), content, xattrs)
        visit(fd, "")
    finally:
        os.close(fd)
    links = {p: tuple(q for q in paths if q != p) for paths in by_inode.values() for p in paths}
    return {
        path: Entry(
            **{f.name: getattr(e, f.name) for f in fields(e) if f.name not in ("links", "mtime_ns")},
            mtime_ns=mtime(e.mtime_ns),
            links=links.get(path, ()),
        )
        for path, e in found.items()
    }


def differences(ours: Snapshot, theirs: Snapshot, names: tuple[str, str] = ("ours", "theirs")) -> list[str]:
    """One line for each path and field that differs."""
    lines: list[str] = []
    for path in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(path), theirs.get(path)
        if a is None or b is None:
            there = names[0] if b is None else names[1]
            lines.append(f"{path}: only in {there} ({(a or b).kind})")  # type: ignore[union-attr]
            continue
        lines += [
            f"{path}: {f.name}: {names[0]} {getattr(a, f.name)!r}, {names[1]} {getattr(b, f.name)!r}"
            for f in fields(Entry)
            if getattr(a, f.name) != getattr(b, f.name)
        ]
    return lines


def assert_same(ours: Snapshot, theirs: Snapshot, names: tuple[str, str] = ("ours", "theirs")) -> None:
    """Fail with the list of differences."""
    lines = differences(ours, theirs, names)
    if lines:
        raise AssertionError("trees differ:\n" + "\n".join(lines[:40]))


def without_root_time(tree: Snapshot) -> Snapshot:
    """The tree without the time of its root: a fresh upper directory brings its own."""
    return {**tree, ".": replace(tree["."], mtime_ns=0)}


def checksum_layer(root: str, *, content: bool = True) -> str:
    """A checksum of everything that a write to a layer would change.

    The change time is part of it: nothing may touch a lower layer, not even with the same values. The access
    time is not: reading updates it. Directories' sizes and link counts are covered by their change time.
    """
    total = hashlib.sha256()
    for path, entry in sorted(snapshot(root, content=content).items()):
        ctime_ns = os.lstat(os.path.join(root, path)).st_ctime_ns
        total.update(repr((path, entry, ctime_ns)).encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def allocated_bytes(path: str) -> int:
    """The space that a file takes on disk."""
    return os.lstat(path).st_blocks * 512


def upper_entries(upper: str) -> dict[str, str]:
    """What an upper directory holds: path to kind, whiteouts called so."""
    kinds: dict[str, str] = {}
    for base, dirs, files in os.walk(upper):
        for name in dirs + files:
            path = os.path.join(base, name)
            st = os.lstat(path)
            whiteout = stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
            kinds[os.path.relpath(path, upper)] = "whiteout" if whiteout else kind_of(st.st_mode)
    return kinds
