"""Applying layers: whiteouts in each mode, replacements, attributes; moby's tests by name."""

from __future__ import annotations

import io
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.archive.tars import apply, archive, directory, entry, hard_link, symlink
from tests.archive.trees import describe, opaque, whiteout, write
from unionfs.archive.changes import changes_of_trees
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.pack import PackOptions, pack_changes, pack_tree
from unionfs.archive.sizes import tree_size
from unionfs.archive.stream import PieceStream
from unionfs.archive.unpacking import DevicePolicy, UnpackOptions, WhiteoutMode, unpack
from unionfs.errors import ArchiveError
from unionfs.overlay.idmap import IdRange

OVERLAY = UnpackOptions(whiteouts=WhiteoutMode.OVERLAY)
KEEP = UnpackOptions(whiteouts=WhiteoutMode.KEEP)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def tree(root: Path) -> list[str]:
    found = []
    for base, dirs, files in os.walk(root):
        for name in dirs:
            found.append(os.path.relpath(os.path.join(base, name), root) + "/")
        found += [os.path.relpath(os.path.join(base, name), root) for name in files]
    return sorted(found)


def files(*names: str) -> list[bytes]:
    """Entries of these names; only plain files have contents."""
    return [entry(name, b"" if "/.wh." in "/" + name or name.endswith("/") else b"contents") for name in names]


def test_apply_layer_whiteouts(root: Path) -> None:
    """TestApplyLayerWhiteouts: four layers, the tree after each."""
    layers = [
        (
            ["base/", ".baz", "bar/", "bar/bax", "bar/bay/", "foo"],
            [".baz", "bar/", "bar/bax", "bar/bay/", "base/", "foo"],
        ),
        ([".bay", ".wh..baz", "foo2"], [".bay", "bar/", "bar/bax", "bar/bay/", "base/", "foo", "foo2"]),
        (
            ["bar/", "bar/.wh..wh..opq", "bar/new", ".wh.foo2"],
            [".bay", "bar/", "bar/new", "base/", "foo"],
        ),
        ([".wh..wh..opq", "only"], ["only"]),
    ]
    for names, expected in layers:
        apply(root, *files(*names))
        assert tree(root) == expected


def test_opaque_keeps_what_this_archive_made_before_it(root: Path) -> None:
    write(root / "d/old")
    write(root / "d/sub/old")
    write(root / "d/sub2/old")
    apply(root, *files("d/new", "d/sub/", "d/sub/new", "d/sub2/implied/new", "d/.wh..wh..opq", "d/later"))
    assert tree(root) == [
        "d/",
        "d/later",
        "d/new",
        "d/sub/",
        "d/sub/new",
        "d/sub2/",
        "d/sub2/implied/",
        "d/sub2/implied/new",
    ]


def test_opaque_through_a_symlinked_name(root: Path) -> None:
    write(root / "usr/lib/old")
    os.symlink("usr/lib", root / "lib")
    apply(root, entry("lib/new"), entry("usr/lib/.wh..wh..opq"))
    assert tree(root) == ["lib/", "usr/", "usr/lib/", "usr/lib/new"]


def test_whiteout_hides_what_was_there_and_not_what_the_archive_has(root: Path) -> None:
    """OCI image-spec, layer.md: "Whiteout files MUST only apply to resources in lower/parent layers", in any order."""
    for name in ("a", "d/old", "d/sub/old", "e/old", "f/old"):
        write(root / name, "old")
    apply(
        root,
        *files("a", ".wh.a", "b", ".wh.b", "d/sub/new", ".wh.d", "e/", ".wh.e", ".wh.f", "f/.wh.old", "g/x", "g/.wh.x"),
    )
    assert tree(root) == ["a", "b", "d/", "d/sub/", "d/sub/new", "e/", "g/", "g/x"]
    assert (root / "a").read_bytes() == b"contents"


@pytest.mark.parametrize("known", [False, True], ids=["copy", "layer"])
def test_whiteout_where_nothing_is_leaves_nothing(root: Path, tmp_path: Path, known: bool) -> None:
    """opencontainers/umoci#254, containerd/containerd#4658: rm -rf of a directory recorded with what was in it."""
    lower = root if not known else tmp_path / "lower"
    write(lower / "test/file")
    write(lower / "plain")
    os.symlink("loop", lower / "loop")
    layer = files(".wh.test", "test/.wh.file", "none/.wh.x", "plain/.wh.x", "loop/.wh.x", "none/.wh..wh..opq", ".wh.n")
    apply(root, *layer, options=over(lower) if known else None)
    assert tree(root) == (["test"] if known else ["loop", "plain"])


def over(*lowers: Path) -> UnpackOptions:
    """A layer directory over known layers, top first."""
    return UnpackOptions(whiteouts=WhiteoutMode.OVERLAY, lowers=[str(lower) for lower in lowers])


def test_layer_that_needs_directories_of_the_layers_below(root: Path, tmp_path: Path) -> None:
    """containerd/containerd#1723: they are as they are there, and keep their time."""
    write(tmp_path / "lower/tmp/inner/old")
    (tmp_path / "lower/tmp").chmod(0o1777)
    os.chown(tmp_path / "lower/tmp/inner", 5, 6)
    os.setxattr(tmp_path / "lower/tmp/inner", "user.note", b"1")
    os.setxattr(tmp_path / "lower/tmp/inner", "user.fuseoverlayfs.opaque", b"y")
    os.utime(tmp_path / "lower/tmp/inner", (1000, 1000))
    apply(root, entry("tmp/inner/new"), entry("tmp/inner/more/x"), options=over(tmp_path / "lower"))
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    info = (root / "tmp/inner").stat()
    assert (info.st_uid, info.st_gid, info.st_mtime) == (5, 6, 1000)
    assert os.listxattr(root / "tmp/inner") == ["user.note"]
    assert stat.S_IMODE((root / "tmp/inner/more").stat().st_mode) == 0o755


def test_layer_with_links_of_the_layers_below(root: Path, tmp_path: Path) -> None:
    """NixOS/nixpkgs#107021: an entry behind a link, and the link replaced in the middle of the archive."""
    write(tmp_path / "bottom/opt/old")
    (tmp_path / "top").mkdir()
    os.symlink("/opt", tmp_path / "top/link")
    lowers = over(tmp_path / "top", tmp_path / "bottom")
    apply(root, symlink("L", "opt"), entry("L/n"), entry("link/m"), entry("link/.wh.old"), options=lowers)
    assert tree(root) == ["L/", "opt/", "opt/m", "opt/n", "opt/old"]
    second = tmp_path / "second"
    apply(second, entry("link/m"), directory("link"), entry("link/n"), options=lowers)
    assert tree(second) == ["link/", "link/n", "opt/", "opt/m"]
    with pytest.raises(ArchiveError, match="link is not a directory"):
        apply(tmp_path / "third", entry("link/m"), entry("link", b"x"), entry("link/n"), options=lowers)


def test_layer_with_hard_links_to_the_layers_below(root: Path, tmp_path: Path) -> None:
    """opencontainers/image-spec#1204"""
    lower = tmp_path / "lower"
    write(lower / "dir/a", b"x" * 5000, mode=0o4755, mtime=1000)
    os.setxattr(lower / "dir/a", "user.note", b"1")
    os.symlink("dir", lower / "link")
    apply(root, hard_link("b", "link/a"), hard_link("c", "b"), hard_link("l", "link"), options=over(lower))
    assert (root / "b").read_bytes() == b"x" * 5000
    assert {(root / name).stat().st_ino for name in ("b", "c", "dir/a")} == {(root / "b").stat().st_ino}
    assert os.getxattr(root / "b", "user.note") == b"1"
    assert os.readlink(root / "l") == "dir"
    for target, message in (("dir", "hard link to the directory"), ("link/none", "is not there")):
        with pytest.raises(ArchiveError, match=message):
            apply(tmp_path / "other", hard_link("b", target), options=over(lower))
    with pytest.raises(ArchiveError, match="is not there"):
        apply(tmp_path / "gone", entry(".wh.dir"), hard_link("b", "dir/a"), options=over(lower))


def test_layer_with_a_hard_link_to_what_only_metadata_is_left_of(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "top/a", mode=0o600)
    os.setxattr(tmp_path / "top/a", "trusted.overlay.metacopy", b"")
    write(tmp_path / "bottom/a", b"data")
    apply(root, hard_link("b", "a"), options=over(tmp_path / "top", tmp_path / "bottom"))
    assert (root / "b").read_bytes() == b"data"
    with pytest.raises(ArchiveError, match="a: is a metadata-only copy whose data is in none"):
        apply(tmp_path / "other", hard_link("b", "a"), options=over(tmp_path / "top"))


def test_layer_that_hides_all_of_the_root(root: Path, tmp_path: Path) -> None:
    """The kernel knows no opaque root, so every name is hidden."""
    for name in ("a", "d/old", "e/old", "f/old"):
        write(tmp_path / "lower" / name)
    apply(root, *files("d/", "d/new", ".wh..wh..opq", "e/", "new"), options=over(tmp_path / "lower"))
    assert tree(root) == ["a", "d/", "d/new", "e/", "f", "new"]
    assert (
        os.getxattr(root / "d", "trusted.overlay.opaque") == os.getxattr(root / "e", "trusted.overlay.opaque") == b"y"
    )
    assert [(root / name).lstat().st_rdev for name in "af"] == [0, 0]
    assert os.listxattr(root) == []


def test_links_that_lead_far_are_refused(root: Path) -> None:
    """More components than anybody needs: each would be looked up for each entry."""
    apply(root, directory("a"), symlink("far", "a/../" * 150), symlink("near", "a/../" * 100), entry("near/f"))
    assert (root / "f").exists()
    with pytest.raises(ArchiveError, match="far/f: cannot be unpacked: Too many levels of symbolic links"):
        apply(root, entry("far/f"))


def test_layer_over_many(root: Path, tmp_path: Path) -> None:
    """It holds few files open: a process has 1024 at least."""
    lowers = [tmp_path / str(number) for number in range(127)]
    for lower in lowers:
        write(lower / "d/e" / lower.name)
    before = len(os.listdir("/proc/self/fd"))
    most = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            return super().read(512)

    made = [part for number in range(127) for part in (entry(f"d/e/.wh.{number}"), entry(f"d/e/{number}x", b"x"))]
    unpack(Counting(archive(*made)), str(root), over(*lowers))
    assert len(os.listdir(root / "d/e")) == 254
    assert 128 < most < 450
    assert len(os.listdir("/proc/self/fd")) == before


def test_layer_does_not_change_the_layers_below(root: Path, tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    write(lower / "d/a", "x")
    os.symlink("d", lower / "l")
    before = describe(lower)
    made = [entry("l/a", b"new"), entry("d/.wh..wh..opq"), hard_link("d/b", "l/a"), entry(".wh.l"), directory("d/a")]
    apply(root, *made, options=over(lower))
    assert describe(lower) == before


def test_attributes_of_a_directory_are_replaced(root: Path) -> None:
    """OCI image-spec, layer.md: those of the entry, so the others go."""
    acl = bytes.fromhex("0200000001000700ffffffff04000500ffffffff10000500ffffffff20000500ffffffff")
    (root / "d").mkdir()
    for name, value in (("user.a", b"1"), ("user.b", b"1"), ("trusted.c", b"1"), ("system.posix_acl_default", acl)):
        os.setxattr(root / "d", name, value)
    os.setxattr(root / "d", "trusted.overlay.opaque", b"y")  # a nested overlay's
    apply(root, directory("d", xattrs={"user.a": b"2"}), entry("d/f"))
    assert sorted(os.listxattr(root / "d")) == ["trusted.overlay.opaque", "user.a"]
    assert os.getxattr(root / "d", "user.a") == b"2"
    assert os.listxattr(root / "d/f") == []


def test_nothing_is_inherited_from_a_default_acl(root: Path) -> None:
    acl = bytes.fromhex("0200000001000700ffffffff02000700e803000004000500ffffffff10000700ffffffff20000500ffffffff")
    acls = {"system.posix_acl_default": acl, "system.posix_acl_access": acl}
    apply(
        root,
        directory("d", xattrs={"system.posix_acl_default": acl}),
        entry("d/file", mode=0o640),
        directory("d/dir"),
        entry("d/implied/x"),
        entry("d/fifo", kind=b"6"),
        directory("d/own", xattrs=acls),
        symlink("d/link", "x"),
    )
    for name in ("file", "dir", "implied", "fifo"):
        assert os.listxattr(root / "d" / name) == [], name
    assert stat.S_IMODE((root / "d/file").stat().st_mode) == 0o640
    assert sorted(os.listxattr(root / "d/own")) == sorted(acls)


def test_hard_link_that_changes_a_file_takes_it_out_of_its_other_names(root: Path) -> None:
    """As in a layer, where the other names are in the layers below and are not changed."""
    write(root / "a", "x", mtime=1000)
    os.link(root / "a", root / "other")
    same = entry("same", kind=b"1", linkname="other", mtime_ns=1000 * 10**9)
    apply(root, same, entry("new", b"y"), hard_link("more", "new"))
    assert (root / "a").stat().st_nlink == 3
    apply(root, hard_link("b", "a"))
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino != (root / "other").stat().st_ino
    assert ((root / "a").stat().st_mtime, (root / "other").stat().st_mtime) == (0, 1000)
    assert (root / "new").stat().st_nlink == 2
    assert sorted(os.listdir(root)) == ["a", "b", "more", "new", "other", "same"]


def test_whiteout_removes_trees_and_not_what_links_lead_to(root: Path) -> None:
    write(root / "keep/file")
    write(root / "gone/deep/file")
    os.symlink("../keep", root / "gone/link")
    os.symlink("keep", root / "link")
    apply(root, entry(".wh.gone"), entry(".wh.link"), entry(".wh.never-was"))
    assert tree(root) == ["keep/", "keep/file"]


def test_whiteout_of_a_tree_deeper_than_any_limit(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("dddd", dir_fd=fd)
        inner = os.open("dddd", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    apply(root, entry(".wh.dddd"))
    assert tree(root) == []


def test_overlay_tar_untar(tmp_path: Path, root: Path) -> None:
    """TestOverlayTarUntar: opaque directories and a whiteout there and back, modes and xattr included."""
    opaque(root / "d1")
    (root / "d1").chmod(0o700)
    write(root / "d1/f1", "x")
    opaque(root / "d2")
    (root / "d2").chmod(0o750)
    whiteout(root / "d3/f1")
    target = tmp_path / "target"
    target.mkdir()
    stream = PieceStream(pack_tree(str(root), PackOptions(convert_whiteouts=True)))
    unpack(stream, str(target), OVERLAY)
    assert describe(target) == describe(root)
    assert describe(target)[b"d3/f1"]["rdev"] == 0


def test_overlay_tar_aufs_untar(tmp_path: Path, root: Path) -> None:
    """TestOverlayTarAUFSUntar"""
    opaque(root / "d1")
    (root / "d1").chmod(0o700)
    whiteout(root / "d3/f1")
    target = tmp_path / "target"
    target.mkdir()
    unpack(PieceStream(pack_tree(str(root), PackOptions(convert_whiteouts=True))), str(target), KEEP)
    assert tree(target) == ["d1/", "d1/.wh..wh..opq", "d3/", "d3/.wh.f1"]
    assert stat.S_IMODE((target / "d1/.wh..wh..opq").stat().st_mode) == 0o700
    assert stat.S_IMODE((target / "d3/.wh.f1").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh..", "d/.wh...", ".wh.x/y"])
@pytest.mark.parametrize("mode", [WhiteoutMode.DELETE, WhiteoutMode.OVERLAY])
def test_overlay_untar_invalid_whiteout_names(root: Path, name: str, mode: WhiteoutMode) -> None:
    """TestOverlayUntarInvalidWhiteoutNames, in both formats."""
    write(root / "keep")
    with pytest.raises(ArchiveError, match="invalid whiteout entry"):
        apply(root, entry(name), options=UnpackOptions(whiteouts=mode))
    assert "keep" in tree(root)


def test_opaque_xattr_of_a_user_namespace(root: Path) -> None:
    apply(root, entry("d/.wh..wh..opq"), options=UnpackOptions(whiteouts=WhiteoutMode.OVERLAY, user_xattrs=True))
    assert os.getxattr(root / "d", "user.overlay.opaque") == b"y"


def test_overlay_directory_after_its_own_whiteout_hides_what_is_below(root: Path) -> None:
    apply(
        root, entry(".wh.a"), directory("a"), entry(".wh.b"), entry("b/f"), entry("c"), directory("c"), options=OVERLAY
    )
    for name in "abc":
        assert os.getxattr(root / name, "trusted.overlay.opaque") == b"y"
    assert tree(root) == ["a/", "b/", "b/f", "c/"]


def test_overlays_own_xattrs_in_an_archive_are_dropped(root: Path) -> None:
    xattrs = {
        "trusted.overlay.redirect": b"/etc",
        "trusted.overlay.metacopy": b"",
        "user.overlay.opaque": b"y",
        "user.fuseoverlayfs.opaque": b"y",
        "user.kept": b"1",
    }
    apply(root, entry("f", xattrs=xattrs), directory("d", xattrs=xattrs), options=OVERLAY)
    assert os.listxattr(root / "f") == ["user.kept"]
    assert os.listxattr(root / "d") == ["user.kept"]


def test_aufs_leftovers_are_skipped_and_its_hard_links_satisfied(root: Path) -> None:
    apply(
        root,
        directory(".wh..wh.plnk"),
        entry(".wh..wh.plnk/1.2", b"shared"),
        entry(".wh..wh.aufs"),
        directory(".wh..wh.orph"),
        hard_link("a", ".wh..wh.plnk/1.2"),
        hard_link("b", "/.wh..wh.plnk/1.2"),
    )
    assert tree(root) == ["a", "b"]
    assert (root / "a").read_bytes() == (root / "b").read_bytes() == b"shared"
    with pytest.raises(ArchiveError, match="invalid aufs hardlink"):
        apply(root, hard_link("c", ".wh..wh.plnk/9.9"))


def test_apply_layer(tmp_path: Path) -> None:
    """TestApplyLayer: the changes of a tree, applied to the original, leave no difference."""
    from tests.archive.test_changes_of_trees import copy, mutate, sample

    old = sample(tmp_path / "old")
    new = copy(old, tmp_path / "new")
    mutate(new)
    layer = PieceStream(pack_changes(changes_of_trees(str(new), str(old))))
    unpack(layer, str(old), UnpackOptions())
    assert list(changes_of_trees(str(new), str(old))) == []


def test_last_of_a_name_wins_whatever_its_type(root: Path) -> None:
    kinds: dict[str, Callable[[str], bytes]] = {
        "file": lambda n: entry(n, b"data"),
        "dir": directory,
        "link": lambda n: symlink(n, "somewhere"),
        "fifo": lambda n: entry(n, kind=b"6"),
    }
    for first, make_first in kinds.items():
        for second, make_second in kinds.items():
            name = f"{first}-{second}"
            apply(root, make_first(name), make_second(name))
            mode = (root / name).lstat().st_mode
            expected = {"file": stat.S_ISREG, "dir": stat.S_ISDIR, "link": stat.S_ISLNK, "fifo": stat.S_ISFIFO}
            assert expected[second](mode), name


def test_directory_over_directory_keeps_contents_and_takes_attributes(root: Path) -> None:
    write(root / "d/old")
    apply(root, directory("d", mode=0o700, uid=5))
    assert tree(root) == ["d/", "d/old"]
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o700
    assert (root / "d").stat().st_uid == 5


def test_replaced_file_is_not_written_through_its_other_name(root: Path) -> None:
    write(root / "a", "precious")
    os.link(root / "a", root / "b")
    apply(root, entry("b", b"new"))
    assert (root / "a").read_bytes() == b"precious"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_implied_directory_permissions(root: Path, umask: int) -> None:
    """TestImpliedDirectoryPermissions, TestUntarParentPathPermissions"""
    before = os.umask(umask)
    try:
        apply(root, entry("implied/deep/file", mode=0o666), directory("given", mode=0o1777))
    finally:
        os.umask(before)
    modes = {name: oct(stat.S_IMODE((root / name).stat().st_mode)) for name in ("implied", "implied/deep", "given")}
    assert modes == {"implied": "0o755", "implied/deep": "0o755", "given": "0o1777"}
    assert stat.S_IMODE((root / "implied/deep/file").stat().st_mode) == 0o666


def test_implied_parents_belong_to_the_mapped_root(root: Path) -> None:
    mapping = IdMapping([IdRange(0, 100000, 65536)], [IdRange(0, 200000, 65536)])
    apply(root, entry("d/f", uid=5, gid=6), options=UnpackOptions(to_host=mapping.to_host))
    assert ((root / "d").stat().st_uid, (root / "d").stat().st_gid) == (100000, 200000)
    assert ((root / "d/f").stat().st_uid, (root / "d/f").stat().st_gid) == (100005, 200006)
    with pytest.raises(ArchiveError, match=r"g: container ID 70000 cannot be mapped to a host ID"):
        apply(root, entry("g", uid=70000), options=UnpackOptions(to_host=mapping.to_host))


def test_unpack_layer_creates_implied_directories_through_lower_layer_symlink(root: Path) -> None:
    """TestUnpackLayerCreatesImpliedDirectoriesThroughLowerLayerSymlink"""
    (root / "usr/lib").mkdir(parents=True)
    os.symlink("usr/lib", root / "lib")
    os.symlink("/usr", root / "absolute")
    apply(root, entry("lib/systemd/system/x.service"), entry("absolute/share/y"))
    assert (root / "usr/lib/systemd/system/x.service").is_file()
    assert (root / "usr/share/y").is_file()
    assert (root / "lib").is_symlink()


def test_symlink_to_nowhere_as_a_parent(root: Path) -> None:
    """What it names is made, inside: as containerd and umoci do."""
    os.symlink("/var/nowhere/../run", root / "link")
    os.symlink("../../outside", root / "up")
    apply(root, entry("link/f"), entry("up/g"))
    assert tree(root) == ["link", "outside/", "outside/g", "up", "var/", "var/run/", "var/run/f"]


def test_file_as_a_parent(root: Path) -> None:
    write(root / "f")
    with pytest.raises(ArchiveError, match=r"f is not a directory"):
        apply(root, entry("f/g"))


def test_times(root: Path) -> None:
    s = 10**9
    apply(
        root,
        directory("d", mtime_ns=1000 * s),
        entry("d/f", mtime_ns=2000 * s),
        entry("negative", mtime_ns=-5 * s),
        entry("huge", mtime_ns=(1 << 62) * s),
        symlink("link", "x"),
        directory("d/inner", mtime_ns=3000 * s),
        entry("d/inner/f"),
    )
    times = {name: (root / name).lstat().st_mtime_ns // s for name in tree(root)}
    assert times == {"d/": 1000, "d/f": 2000, "negative": 0, "huge": 0, "link": 0, "d/inner/": 3000, "d/inner/f": 0}


def test_time_of_a_directory_that_was_replaced_is_not_set_on_what_replaced_it(root: Path) -> None:
    write(root / "elsewhere/f")
    apply(root, directory("d", mtime_ns=1000 * 10**9), symlink("d", "elsewhere"))
    assert (root / "elsewhere").stat().st_mtime > 10**6


def test_pax_times_keep_their_nanoseconds(root: Path) -> None:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as made:
        info = tarfile.TarInfo("f")
        info.pax_headers = {"mtime": "1500000000.123456789", "atime": "1600000000.987654321"}
        made.addfile(info)
    buffer.seek(0)
    unpack(buffer, str(root))
    info_ = (root / "f").stat()
    assert (info_.st_mtime_ns, info_.st_atime_ns) == (1500000000123456789, 1600000000987654321)


def test_setuid_survives_the_change_of_owner(root: Path) -> None:
    apply(root, entry("su", b"x", mode=0o4755, uid=1000, gid=1000))
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o4755


def test_capability_survives(root: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    apply(root, entry("ping", b"x", uid=7, xattrs={"security.capability": capability}))
    assert os.getxattr(root / "ping", "security.capability") == capability


def test_hard_links(root: Path) -> None:
    apply(root, entry("a", b"x"), hard_link("d/b", "a"), hard_link("c", "/d/../a"), hard_link("a", "a"))
    assert len({(root / name).stat().st_ino for name in ("a", "d/b", "c")}) == 1


def test_untar_hardlink_to_symlink(root: Path) -> None:
    """TestUntarHardlinkToSymlink"""
    apply(root, symlink("link", "target"), hard_link("also", "link"))
    assert os.readlink(root / "also") == "target"
    assert (root / "also").lstat().st_nlink == 2


def test_hard_link_to_nothing_and_to_a_directory(root: Path) -> None:
    with pytest.raises(ArchiveError, match=r"b: the hard link's target missing is not there"):
        apply(root, hard_link("b", "missing"))
    with pytest.raises(ArchiveError, match=r"b: is a hard link to the directory d"):
        apply(root, directory("d"), hard_link("b", "d"))


def test_devices(root: Path) -> None:
    made = (
        entry("char", kind=b"3", major=300, minor=70000, mode=0o600),
        entry("block", kind=b"4", major=8, minor=1),
        entry("fifo", kind=b"6", mode=0o622),
    )
    apply(root, *made)
    assert (root / "char").stat().st_rdev == os.makedev(300, 70000)
    assert stat.S_ISBLK((root / "block").stat().st_mode)
    assert stat.S_IMODE((root / "fifo").stat().st_mode) == 0o622
    other = root / "other"
    assert apply(other, *made, options=UnpackOptions(devices=DevicePolicy.SKIP)).skipped == 2
    assert tree(other) == ["fifo"]
    with pytest.raises(ArchiveError, match=r"char: is a device, which is not allowed"):
        apply(other, *made, options=UnpackOptions(devices=DevicePolicy.REFUSE))


@pytest.mark.parametrize(("major", "minor"), [(4096, 0), (0, 1 << 20)])
def test_handle_tar_type_block_char_fifo_device_range(root: Path, major: int, minor: int) -> None:
    """TestHandleTarTypeBlockCharFifoDeviceRange"""
    with pytest.raises(ArchiveError, match=rf"dev: device number {major}:{minor} is out of"):
        apply(root, entry("dev", kind=b"3", major=major, minor=minor))


def test_xattr_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(ArchiveError, match=r"f: cannot set the xattr user\.note"):
        apply(tmp_path / "strict", entry("f", xattrs={"user.note": b"1"}))
    apply(tmp_path / "lenient", entry("f", xattrs={"user.note": b"1"}), options=UnpackOptions(best_effort_xattrs=True))
    assert tree(tmp_path / "lenient") == ["f"]
    with pytest.raises(ArchiveError, match="cannot mark the directory opaque"):
        apply(
            tmp_path / "opaque",
            entry("d/.wh..wh..opq"),
            options=UnpackOptions(whiteouts=WhiteoutMode.OVERLAY, best_effort_xattrs=True),
        )


@pytest.mark.parametrize("name", ["com.apple.provenance", "com.apple.quarantine", "system.nfs4_acl", "bad", "x" * 300])
def test_xattrs_of_other_systems_are_left_out(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """ko-build/ko#1525, moby/moby#47962: a file from macOS; docker 20.10, podman, umoci and containerd take it."""
    apply(root, entry("app", b"x", xattrs={name: b"1", "user.kept": b"2"}), directory("d", xattrs={name: b"1"}))
    assert os.listxattr(root / "app") == ["user.kept"]
    assert os.listxattr(root / "d") == []
    assert sum("not set" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("data", "blocks"),
    [
        (bytes(1 << 20), 0),
        (bytes((1 << 20) - 100), 0),
        (bytes(5000) + b"x" + bytes(1 << 20), 1),
        (bytes(8192) + b"x" * 4096 + bytes(4096) + b"x" * 100 + bytes(4096), 2),
        (b"x" + bytes(8190) + b"x", 2),
        (bytes(3 << 20) + b"end", 1),
        (b"", 0),
    ],
)
def test_zeros_take_no_space(root: Path, data: bytes, blocks: int) -> None:
    """moby/moby#5419: the holes that are streamed as zeros are holes again."""
    apply(root, entry("f", data))
    assert (root / "f").read_bytes() == data
    assert (root / "f").stat().st_blocks == blocks * 8


def test_sparse_entry_with_zeros_in_its_pieces(root: Path) -> None:
    """GNU sparse 0.1: the pieces need not be whole pages, nor full of data."""
    pieces = [(100, 5000), (9000, 20000)]
    stored = b"a" * 5000 + b"b" * 10 + bytes(19980) + b"c" * 10
    text = ",".join(f"{at},{size}" for at, size in pieces).encode()
    body = b"".join(b"%d %s\n" % (len(r) + 4, r) for r in (b"GNU.sparse.map=" + text, b"GNU.sparse.size=1000000"))
    apply(root, entry("p", body, kind=b"x"), entry("f", stored))
    expected = bytearray(1_000_000)
    at = 0
    for start, size in pieces:
        expected[start : start + size] = stored[at : at + size]
        at += size
    assert (root / "f").read_bytes() == expected
    assert (root / "f").stat().st_blocks <= 4 * 8


def test_global_headers_are_passed_over(root: Path) -> None:
    """TestXGlobalNoParent, TestTypeXGlobalHeaderDoesNotFail"""
    apply(root, entry("no/such/parent/pax_global_header", b"18 comment=hello!\n", kind=b"g"), entry("f"))
    assert tree(root) == ["f"]


def test_unknown_type(root: Path) -> None:
    with pytest.raises(ArchiveError, match=r"odd: unhandled tar header type Z"):
        apply(root, entry("odd", kind=b"Z"))


def test_root_entry(root: Path) -> None:
    root.chmod(0o700)
    apply(root, directory(".", mode=0o755))
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    apply(root, directory(".", mode=0o751, mtime_ns=10**12), entry("f"), options=UnpackOptions(include_root=True))
    assert stat.S_IMODE(root.stat().st_mode) == 0o751
    assert root.stat().st_mtime == 1000


def test_result_counts_what_the_headers_say(root: Path) -> None:
    result = apply(root, entry("a", b"12345"), entry("a", b"123"), hard_link("b", "a"), directory("d"))
    assert (result.entries, result.size) == (4, 8)
    assert tree_size(str(root)) == 3


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ([], 0),
        ([("f", 0)], 0),
        ([("f", 5)], 5),
        ([("d/", 0)], 0),
        ([("f", 6), ("d/", 0)], 6),
        ([("f", 6), ("d/g", 6)], 12),
    ],
)
def test_tree_size(root: Path, layout: list[tuple[str, int]], size: int) -> None:
    """moby's directory TestSize...: empty, empty file, file, nested directory, file and nested."""
    for name, length in layout:
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            write(root / name, b"x" * length)
    assert tree_size(str(root)) == size


def test_tree_size_of_nothing(tmp_path: Path) -> None:
    """TestSizeNonExistingDirectory"""
    with pytest.raises(ArchiveError, match="nowhere"):
        tree_size(str(tmp_path / "nowhere"))


def test_failing_source_is_told_apart_from_a_failing_target(root: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionResetError(104, "Connection reset by peer")
            return super().read(1024)

    with pytest.raises(ArchiveError, match=r"archive cannot be read \(at byte 1024\): Connection reset"):
        unpack(Failing(entry("f", b"x" * 5000)), str(root))


def test_stream_is_read_to_its_end(root: Path) -> None:
    stream = io.BytesIO(archive(entry("f")) + b"trailing" * 10000)
    unpack(stream, str(root))
    assert stream.read() == b""


class Slow:
    """Gives one byte at a time, as a slow sender might."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int) -> bytes:
        piece, self.data = self.data[:1], self.data[1:]
        return piece


def test_chroot_apply_empty_archive_from_slow_reader(root: Path) -> None:
    """TestChrootApplyEmptyArchiveFromSlowReader"""
    assert unpack(Slow(archive()), str(root)).entries == 0
    assert unpack(Slow(archive(entry("f", b"x" * 600))), str(root)).size == 600


def test_chroot_apply_dot_dot_file(root: Path) -> None:
    """TestChrootApplyDotDotFile: two dots at the start of a name are just a name."""
    apply(root, entry("..gitme", b""), entry("d/..data/x"))
    assert tree(root) == ["..gitme", "d/", "d/..data/", "d/..data/x"]


def test_non_utf8_and_long_names(root: Path) -> None:
    name = b"\xff\xfe/" + b"d" * 250 + b"/" + b"n" * 255
    apply(root, entry(name, b"x"))
    with open(os.fsencode(root) + b"/" + name, "rb") as file:
        assert file.read() == b"x"


def test_memory_does_not_grow_with_the_contents(root: Path) -> None:
    class Zeros:
        def __init__(self, head: bytes, size: int) -> None:
            self.head, self.left = head, size

        def read(self, size: int) -> bytes:
            if self.head:
                piece, self.head = self.head[:size], self.head[size:]
                return piece
            piece = bytes(min(size, self.left))
            self.left -= len(piece)
            return piece

    from unionfs.archive.tar_format import TarEntry, encode_entry

    big = 200 << 20
    tracemalloc.start()
    try:
        unpack(Zeros(encode_entry(TarEntry(b"big", size=big)), big), str(root))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (root / "big").stat().st_size == big


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    made = [entry(f"d{i}/e/f{i}") for i in range(100)]
    apply(root, *made, *[entry(f".wh.d{i}") for i in range(100)], *made, symlink("d5/e", "x"), entry("d6/e/new"))
    with pytest.raises(ArchiveError):
        apply(root, *made, entry("d7/e/f7/not-a-directory/x"))
    assert os.listdir("/proc/self/fd") == before


def test_missing_target(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"nowhere.*existing directory"):
        unpack(io.BytesIO(b""), str(tmp_path / "nowhere"))
