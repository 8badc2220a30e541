"""Archives that try to reach outside of the directory they are unpacked into, one by one."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archive.tars import apply, archive, directory, entry, hard_link, symlink
from tests.archive.trees import describe, write
from unionfs.archive.tar_format import TarEntry, encode_entry
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.errors import ArchiveError, BreakoutError

MODES = [UnpackOptions(whiteouts=mode) for mode in WhiteoutMode]


@pytest.fixture(params=MODES, ids=[mode.value for mode in WhiteoutMode])
def options(request: pytest.FixtureRequest) -> UnpackOptions:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A target beside a directory that must be the same afterwards."""
    victim = tmp_path / "victim"
    write(victim / "hello", "secret", mtime=1000)
    write(victim / "dir/file", "x", mtime=1000)
    for name in ("dir", "."):
        os.utime(victim / name, (1000, 1000))
    before = describe(victim), os.stat(victim).st_mode
    root = tmp_path / "dest"
    root.mkdir()
    yield root
    assert (describe(victim), os.stat(victim).st_mode) == before
    assert os.stat(victim).st_mtime == 1000
    assert sorted(os.listdir(tmp_path)) == ["dest", "victim"]


def attempt(root: Path, options: UnpackOptions, *entries: bytes) -> None:
    """Apply; being refused is as good as being contained. The fixture looks at what is outside."""
    try:
        apply(root, *entries, options=options)
    except ArchiveError:
        pass


@pytest.mark.parametrize(
    "name",
    [
        "../victim/hello",
        "../victim/new",
        "/../victim/new",
        "a/../../victim/new",
        "./../victim/new",
        "..",
        "../",
        "a/../..",
    ],
)
def test_apply_layer_invalid_filenames(root: Path, options: UnpackOptions, name: str) -> None:
    """TestApplyLayerInvalidFilenames, TestUntarInvalidFilenames"""
    with pytest.raises(BreakoutError, match=r"points outside"):
        apply(root, entry(name, b"x"), options=options)


def test_untar_parent_traversal_contained(root: Path, options: UnpackOptions) -> None:
    """TestUntarParentTraversalContained: up and down again inside is just another spelling."""
    apply(root, entry("a/../b", b"x"), entry("/c", b"y"), entry("./d//./e", b"z"), options=options)
    assert sorted(os.listdir(root)) == ["b", "c", "d"]


@pytest.mark.parametrize("target", ["../victim/hello", "/../victim/hello", "a/../../victim/hello"])
def test_apply_layer_invalid_hardlink(root: Path, options: UnpackOptions, target: str) -> None:
    """TestApplyLayerInvalidHardlink, TestUntarInvalidHardlink"""
    with pytest.raises(BreakoutError, match=r"link.*points outside of the archive"):
        apply(root, hard_link("link", target), options=options)


def test_hard_link_through_a_symlink(root: Path, options: UnpackOptions, tmp_path: Path) -> None:
    for target in ("../victim", str(tmp_path / "victim")):
        attempt(
            root, options, symlink("out", target), hard_link("stolen", "out/hello"), entry("stolen", b"overwritten")
        )
        attempt(root, options, symlink("s", target + "/hello"), hard_link("h", "s"), entry("h", b"overwritten"))
    assert not os.path.isfile(root / "stolen") or (root / "stolen").read_bytes() != b"secret"


def test_untar_absolute_hardlink(root: Path, options: UnpackOptions, tmp_path: Path) -> None:
    """TestUntarAbsoluteHardlink: it is relative to the root of the archive."""
    apply(root, entry("f", b"mine"), hard_link("link", "/f"), options=options)
    assert (root / "link").read_bytes() == b"mine"
    attempt(root, options, hard_link("stolen", str(tmp_path / "victim/hello")))
    assert not (root / "stolen").exists()


def test_apply_layer_invalid_symlink(root: Path, options: UnpackOptions, tmp_path: Path) -> None:
    """TestApplyLayerInvalidSymlink, TestUntarInvalidSymlink, TestUntarSymlinkBreakout"""
    for target in ("../victim", str(tmp_path / "victim"), "../../../../../../../../../" + str(tmp_path / "victim")):
        attempt(root, options, symlink("a", target), entry("a/hello", b"overwritten"))
        attempt(root, options, symlink("b", target + "/hello"), entry("b", b"overwritten"))
        attempt(root, options, symlink("c", target), directory("c", mode=0o700, mtime_ns=0))
        attempt(root, options, symlink("d", target), entry("d/new/deeper", b"x"))
        attempt(root, options, symlink("e", target), entry("e/.wh.hello"), entry("e/.wh..wh..opq"))
        attempt(root, options, symlink("f", target), entry(".wh.f"), symlink("g", target), directory("g/dir"))
        attempt(root, options, symlink("h", "a"), symlink("i", "h/dir"), entry("i/file", b"overwritten"))


def test_untar_through_absolute_symlink(root: Path, options: UnpackOptions) -> None:
    """TestUntarThroughAbsoluteSymlink: it is resolved inside, as it would be in the container."""
    apply(root, directory("etc"), symlink("conf", "/etc"), entry("conf/passwd", b"x"), options=options)
    assert (root / "etc/passwd").read_bytes() == b"x"
    assert (root / "conf").is_symlink()


def test_untar_sibling_prefix_contained(tmp_path: Path, root: Path, options: UnpackOptions) -> None:
    """TestUntarSiblingPrefixContained: /dest-other begins with /dest and is still outside."""
    with pytest.raises(BreakoutError):
        apply(root, entry("../dest-other/f", b"x"), options=options)
    attempt(root, options, symlink("s", "../dest-other"), entry("s/f", b"x"))
    assert not (tmp_path / "dest-other").exists()


def test_symlink_is_replaced_by_a_directory_and_back(root: Path, options: UnpackOptions, tmp_path: Path) -> None:
    """A parent that was checked once may be something else for the next entry."""
    attempt(
        root,
        options,
        directory("d"),
        entry("d/f", b"1"),
        symlink("d", str(tmp_path / "victim")),
        entry("d/hello", b"overwritten"),
        directory("d"),
        entry("d/f", b"2"),
        symlink("d", "../victim"),
        entry("d/.wh.hello"),
    )


def test_magic_links_are_not_followed(root: Path, options: UnpackOptions, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "victim", os.O_RDONLY)
    try:
        for target in (f"/proc/self/fd/{fd}", "/proc/self/root" + str(tmp_path / "victim")):
            attempt(root, options, symlink("m", target), entry("m/hello", b"overwritten"))
    finally:
        os.close(fd)


def test_fifo_and_device_are_not_opened_for_writing(root: Path, options: UnpackOptions) -> None:
    """Opening a FIFO would wait for ever, a device would do something; both are replaced instead."""
    apply(
        root,
        entry("fifo", kind=b"6"),
        entry("fifo", b"data"),
        entry("null", kind=b"3", major=1, minor=3),
        entry("null", b"data"),
        options=options,
    )
    assert (root / "null").read_bytes() == b"data"


def test_link_loops_end(root: Path, options: UnpackOptions) -> None:
    with pytest.raises(ArchiveError, match=r"a/f"):
        apply(root, symlink("a", "b"), symlink("b", "a"), entry("a/f", b"x"), options=options)


def test_enormous_name_is_refused_quickly(root: Path, options: UnpackOptions) -> None:
    with pytest.raises(ArchiveError, match="too long"):
        apply(root, entry(b"a/" * 400_000 + b"f", b"x"), options=options)


def test_name_too_long_for_the_file_system(root: Path, options: UnpackOptions) -> None:
    with pytest.raises(ArchiveError, match="File name too long"):
        apply(root, entry("n" * 300, b"x"), options=options)


def test_control_characters_do_not_reach_the_terminal(root: Path, options: UnpackOptions) -> None:
    with pytest.raises(ArchiveError) as caught:
        apply(root, entry("\x1b[2J\n../../x", kind=b"Z"), options=options)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stash_of_aufs_cannot_be_reached_by_other_names(root: Path, options: UnpackOptions) -> None:
    attempt(
        root,
        options,
        entry(".wh..wh.plnk/../../victim/hello", b"x"),
        hard_link("a", ".wh..wh.plnk/../../victim/hello"),
        hard_link("b", ".wh..wh.plnk/deep/er"),
    )


def test_another_process_swaps_directories_for_symlinks_meanwhile(root: Path, tmp_path: Path) -> None:
    """No order of checks and uses lets a racing writer lead an entry outside."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            try:
                os.rename(root / "d", root / "aside")
                os.symlink(tmp_path / "victim", root / "d")
                os.unlink(root / "d")
                os.rename(root / "aside", root / "d")
            except OSError:
                pass

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for i in range(150):
            attempt(
                root,
                UnpackOptions(),
                directory("d"),
                entry("d/hello", b"overwritten"),
                entry(f"d/sub{i}/file", b"x"),
                entry("d/.wh.dir"),
                symlink("d/link", "x"),
                entry(".wh.d"),
            )
    finally:
        stop.set()
        thread.join()


def test_stream_that_fails_in_the_middle_of_a_file(root: Path) -> None:
    cut = archive(entry("a", b"x" * 2000), entry("b", b"y" * 2000))[:4000]
    with pytest.raises(ArchiveError, match=r"cut off in the contents of b"):
        unpack(io.BytesIO(cut), str(root))


def test_contents_that_pretend_to_be_headers_are_contents(root: Path) -> None:
    inner = archive(entry("../victim/hello", b"overwritten"))
    apply(root, entry("nested.tar", inner), entry("after", b"x"))
    assert (root / "nested.tar").read_bytes() == inner
    assert sorted(os.listdir(root)) == ["after", "nested.tar"]


def test_size_on_an_entry_without_contents_is_ignored(root: Path) -> None:
    """Else a reader that skips it and one that does not would see different archives."""
    forged = encode_entry(TarEntry(b"d/", kind=b"5", mode=0o755, size=512))
    unpack(io.BytesIO(archive(forged, entry("f", b"x"))), str(root))
    assert sorted(os.listdir(root)) == ["d", "f"]
