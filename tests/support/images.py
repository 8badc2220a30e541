"""Generated images: layers as archives, full of names that collide, for tests that compare what becomes of them."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from unionfs.archive.tar_format import END_OF_ARCHIVE, TarEntry, encode_entry, padding
from unionfs.archive.unpacking import UnpackOptions, unpack
from unionfs.errors import ArchiveError

ACL = bytes.fromhex("0200000001000700ffffffff04000500ffffffff10000500ffffffff20000500ffffffff")
WIDER_ACL = bytes.fromhex("0200000001000700ffffffff02000700e803000004000500ffffffff10000700ffffffff20000500ffffffff")
OLD_S = 1_000_000_000

_NAMES = st.sampled_from([b"a", b"b", b"c"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(b"/".join)
_LINKS = st.sampled_from(
    [b"a", b"b", b"c", b"/a", b"/b/a", b"../b", b"../a/c", b"a/b", b"b/../c", b"nowhere", b"/nowhere/../b", b"../../c"]
)
_XATTRS = st.dictionaries(st.sampled_from(["user.x", "user.y", "trusted.z"]), st.sampled_from([b"1", b"2"]), max_size=2)
_DIR_XATTRS = st.one_of(
    _XATTRS,
    st.sampled_from([{"system.posix_acl_default": ACL}, {"system.posix_acl_default": WIDER_ACL, "user.x": b"1"}]),
)
_TIMES = st.integers(0, 999).map(lambda n: (OLD_S + n) * 10**9)
_OWNERS = st.sampled_from([(0, 0), (0, 0), (5, 6)])


@dataclass(frozen=True)
class Step:
    """One entry of a layer; its text is what a failing example shows."""

    kind: str
    path: bytes
    entry: TarEntry
    data: bytes = b""

    def __repr__(self) -> str:
        entry = self.entry
        more = [f"-> {entry.linkname.decode()}"] if entry.linkname else []
        more += [f"{oct(entry.mode)} {entry.uid}:{entry.gid} @{entry.mtime_ns // 10**9 - OLD_S}"]
        more += [str(entry.xattrs)] if entry.xattrs else []
        return f"<{self.kind} {self.path.decode()} {' '.join(more)}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which otherwise prints every field."""
        printer.text(repr(self))

    def encoded(self) -> bytes:
        return encode_entry(self.entry) + self.data + padding(len(self.data))


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    kind = draw(
        st.sampled_from(
            ["file", "file", "dir", "dir", "symlink", "symlink", "hardlink", "fifo", "whiteout", "whiteout", "opaque"]
        )
    )
    path = draw(_PATHS)
    uid, gid = draw(_OWNERS)
    entry = TarEntry(path, uid=uid, gid=gid, mtime_ns=draw(_TIMES), mode=draw(st.sampled_from([0o644, 0o600, 0o4755])))
    parent, _, name = path.rpartition(b"/")
    prefix = parent + b"/" if parent else b""
    data = b""
    match kind:
        case "file":
            data = draw(st.sampled_from([b"one", b"two", b"", bytes(9000)]))
            entry.size = entry.stored_size = len(data)
            entry.xattrs = draw(_XATTRS)
        case "dir":
            entry.kind, entry.name = b"5", path + b"/"
            entry.mode = draw(st.sampled_from([0o755, 0o1777, 0o2775]))
            entry.xattrs = draw(_DIR_XATTRS)
        case "symlink":
            entry.kind, entry.mode, entry.linkname = b"2", 0o777, draw(_LINKS)
        case "hardlink":
            entry.kind, entry.linkname = b"1", draw(_PATHS)
            entry.xattrs = draw(_XATTRS)
        case "fifo":
            entry.kind = b"6"
        case "whiteout":
            entry.name = prefix + b".wh." + name
        case "opaque":
            entry.name = prefix + b".wh..wh..opq"
    return Step(kind, path, entry, data)


Layer = list[Step]


def images(layers: int = 4, entries: int = 7) -> st.SearchStrategy[list[Layer]]:
    """Images of up to so many layers with up to so many entries each, bottom first."""
    return st.lists(st.lists(_steps(), min_size=1, max_size=entries), min_size=1, max_size=layers)


def archive_of(layer: Layer) -> bytes:
    """The layer as a tar archive."""
    return b"".join(step.encoded() for step in layer) + END_OF_ARCHIVE


def settled_time(ns: int) -> int:
    """A time that an archive gave, or 0 for that of a directory which was made because it was missing."""
    return ns if ns < (OLD_S + 1000) * 10**9 else 0


def applicable(layer: Layer, below: str, scratch: str) -> Layer:
    """The layer without entries that cannot be applied to the tree ``below``; ``scratch``: a name for copies of it."""
    layer = list(layer)
    while True:
        subprocess.run(["cp", "-a", below, scratch], check=True)
        try:
            unpack(io.BytesIO(archive_of(layer)), scratch, UnpackOptions())
        except ArchiveError as error:
            where = str(error).partition(":")[0]
            layer.remove(next(step for step in layer if step.entry.shown_name() == where))
        else:
            return layer
        finally:
            shutil.rmtree(scratch)
