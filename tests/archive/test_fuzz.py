"""Random and mutated archives: whatever they say, nothing outside of the target changes and only our errors come out.

Runs for UNIONFS_FUZZ_SECONDS: give hours for a long run. Without it, half a minute in CI (HYPOTHESIS_PROFILE=ci) and
20 seconds elsewhere. A finding is printed with its archive, which then becomes a test of its own.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.archive.tars import entry
from tests.archive.trees import describe
from unionfs.archive.tar_format import END_OF_ARCHIVE, TarEntry, encode_entry, padding
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.errors import ArchiveError

_IN_CI = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
SECONDS = float(os.environ.get("UNIONFS_FUZZ_SECONDS") or (30 if _IN_CI else 20))

COMPONENTS = st.sampled_from(
    [
        b"a",
        b"b",
        b"c",
        b"..",
        b".",
        b"",
        b".wh.a",
        b".wh.b",
        b".wh..wh..opq",
        b".wh..wh.plnk",
        b".wh.",
        b".wh..",
        b"\xff",
    ]
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=5).map(b"/".join)
# Where the target's neighbour is, seen from various places.
TARGETS = st.one_of(
    PATHS,
    st.sampled_from(
        [
            b"../victim",
            b"../victim/hello",
            b"../../victim",
            b"/proc/self/cwd/../victim",
            b"/",
            b"a/b",
            b"../a",
            b"c",
            b"c/hello",
        ]
    ),
)
XATTRS = st.dictionaries(
    st.sampled_from(
        ["user.a", "trusted.overlay.opaque", "security.capability", "bad", "user.", "system.posix_acl_access"]
    ),
    st.binary(max_size=30),
    max_size=2,
)
# "c" and "d" are links to the outside that lie in the target from the start.
NAMES = st.one_of(
    st.sampled_from([b"c", b"d", b"a", b"a/b", b"c/hello", b"c/dir/x", b"c/.wh.hello", b"c/.wh..wh..opq", b"d/x"]),
    PATHS,
    st.sampled_from([b"../victim/hello", b"/../victim/new"]),
)
KINDS = st.one_of(
    st.sampled_from([b"0", b"5", b"2", b"1"]),
    st.sampled_from([b"3", b"4", b"6", b"7", b"g", b"L", b"K", b"S", b"x", b"\0", b"Z"]),
)
ENTRIES = st.builds(
    TarEntry,
    name=NAMES,
    kind=KINDS,
    mode=st.integers(0, 0o7777),
    uid=st.sampled_from([0, 0, 1000, 3_000_000]),
    size=st.sampled_from([0, 0, 3, 512, 600]),
    mtime_ns=st.sampled_from([0, 10**18, -1, 1 << 70]),
    linkname=TARGETS,
    major=st.sampled_from([0, 1, 5000]),
    minor=st.sampled_from([0, 3, 1 << 20]),
    xattrs=st.one_of(st.just({}), XATTRS),
)
# (position, bytes) written over the finished archive
MUTATIONS: st.SearchStrategy[list[tuple[int, bytes]]] = st.one_of(
    st.just([]), st.lists(st.tuples(st.integers(0, 1 << 14), st.binary(min_size=1, max_size=12)), max_size=4)
)
CONTENTS = st.sampled_from([b"data", b"22 GNU.sparse.major=1\n", b"30 path=../victim/hello\n", bytes(4), b"a\0"])


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    pieces = []
    for made in draw(st.lists(ENTRIES, min_size=1, max_size=8)):
        data = (draw(CONTENTS) * (made.size // 4 + 1))[: made.size]
        pieces.append(encode_entry(made) + data + padding(len(data)))
    archive = bytearray(b"".join(pieces) + (END_OF_ARCHIVE if draw(st.booleans()) else b""))
    for at, value in draw(MUTATIONS):
        if archive:
            start = at % len(archive)
            archive[start : start + len(value)] = value
            if draw(st.booleans()):
                mend_checksum(archive, start // 512 * 512)
    return bytes(archive[: draw(st.integers(0, len(archive)))] if draw(st.integers(0, 9)) == 0 else archive)


def mend_checksum(archive: bytearray, start: int) -> None:
    """Make a damaged header believable, so that the damage gets past the first check."""
    block = archive[start : start + 512]
    if len(block) == 512:
        archive[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)


class Arena:
    """A target directory and what lies around it, which nothing may touch."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.victim = base / "victim"
        (self.victim / "dir").mkdir(parents=True)
        (self.victim / "hello").write_bytes(b"secret")
        self.target = base / "target"
        self.lower = base / "lower"
        self.fill(self.lower)
        self.before = self.state()

    def state(self) -> object:
        info = os.stat(self.victim)
        inside = describe(self.victim), describe(self.lower)
        return inside, info.st_mode, info.st_mtime_ns, os.stat(self.victim / "hello").st_nlink

    @staticmethod
    def fill(directory: Path) -> None:
        (directory / "old/a").mkdir(parents=True)
        os.symlink("../victim", directory / "c")
        os.symlink("../victim/hello", directory / "d")

    def run(self, data: bytes, options: UnpackOptions) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        if options.lowers is None:
            self.fill(self.target)
        else:
            self.target.mkdir()
        try:
            unpack(io.BytesIO(data), str(self.target), options)
        except ArchiveError as error:
            assert "\n" not in str(error)
        assert self.state() == self.before
        assert sorted(os.listdir(self.base)) == ["lower", "target", "victim"]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.timeout(0)
def test_fuzz(arena: Arena) -> None:
    """FuzzApplyLayer, FuzzUntar"""
    deadline = time.monotonic() + SECONDS
    runs = 0

    @settings(
        max_examples=400,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=archives(), mode=st.sampled_from(WhiteoutMode), known=st.booleans())
    def once(data: bytes, mode: WhiteoutMode, known: bool) -> None:
        nonlocal runs
        runs += 1
        lowers = [str(arena.lower)] if known and mode is WhiteoutMode.OVERLAY else None
        arena.run(data, UnpackOptions(whiteouts=mode, include_root=bool(len(data) % 2), lowers=lowers))

    descriptors = len(os.listdir("/proc/self/fd"))
    while time.monotonic() < deadline:
        once()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert runs >= 400


def test_fuzz_arena_notices(arena: Arena) -> None:
    """The net has no hole: a write outside would be seen."""
    arena.run(entry("fine", b"x"), UnpackOptions())
    (arena.victim / "new").touch()
    try:
        with pytest.raises(AssertionError):
            arena.run(entry("fine", b"x"), UnpackOptions())
    finally:
        (arena.victim / "new").unlink()
        os.utime(arena.victim, ns=(0, arena.before[2]))  # type: ignore[index]
