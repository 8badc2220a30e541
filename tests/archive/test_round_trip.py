"""Random trees through archives and back: pack, unpack, compare."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.archive.trees import describe
from unionfs.archive.changes import changes_of_trees, changes_of_upper
from unionfs.archive.pack import PackOptions, XattrSelection, pack_changes, pack_tree
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack

# Few names, so that paths meet; odd bytes, one name at the limit, and none that is a whiteout's.
NAMES = st.sampled_from([b"a", b"a-", b"b", b"\xff\n", "\u00e9".encode(), b"n" * 255, b"..c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
MODES = st.sampled_from([0o644, 0o600, 0o4755, 0o2711, 0o1777, 0])
NODES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("file"), "data": st.binary(max_size=1200), "hole": st.integers(0, 1)}),
    st.fixed_dictionaries({"kind": st.just("dir")}),
    st.fixed_dictionaries({"kind": st.just("symlink"), "target": st.binary(min_size=1, max_size=200)}),
    st.fixed_dictionaries({"kind": st.just("fifo")}),
    st.fixed_dictionaries({"kind": st.just("device"), "rdev": st.integers(1, 1000)}),
    st.fixed_dictionaries({"kind": st.just("link"), "to": PATHS}),
)
ATTRIBUTES = st.fixed_dictionaries(
    {
        "mode": MODES,
        "uid": st.sampled_from([0, 1000, 3_000_000]),
        "mtime": st.integers(0, 1 << 33),
        "xattrs": st.dictionaries(st.sampled_from(["user.a", "trusted.b"]), st.binary(max_size=50), max_size=2),
    }
)
TREES = st.lists(st.tuples(PATHS, NODES, ATTRIBUTES), max_size=12)
Tree = list[tuple[bytes, dict[str, Any], dict[str, Any]]]


def build(root: bytes, tree: Tree) -> None:
    """Make what can be made of a description; clashes are left out."""
    os.makedirs(root, exist_ok=True)
    for path, node, attributes in tree:
        full = root + b"/" + path
        try:
            os.makedirs(os.path.dirname(full), exist_ok=True)
            make(full, root, node)
        except OSError:
            continue
        try:
            os.chown(full, attributes["uid"], attributes["uid"], follow_symlinks=False)
            if not os.path.islink(full):
                for name, value in attributes["xattrs"].items():
                    if os.path.isfile(full) or os.path.isdir(full):
                        os.setxattr(full, name, value)
                os.chmod(full, attributes["mode"])
        finally:
            os.utime(full, (attributes["mtime"], attributes["mtime"]), follow_symlinks=False)
    # Directories last: what was made in them changed their times.
    for base, _, _ in os.walk(root):
        os.utime(base, (5, 5))


def make(full: bytes, root: bytes, node: dict[str, Any]) -> None:
    match node["kind"]:
        case "file":
            with open(full, "xb") as file:
                file.write(node["data"])
                if node["hole"]:
                    file.seek(1 << 20)
                    file.write(b"end")
        case "dir":
            os.mkdir(full)
        case "symlink":
            os.symlink(node["target"].replace(b"\0", b"0"), full)
        case "fifo":
            os.mkfifo(full)
        case "device":
            os.mknod(full, 0o020600, node["rdev"])
        case "link":
            os.link(root + b"/" + node["to"], full, follow_symlinks=False)


ALL = PackOptions(xattrs=XattrSelection.ALL)


@given(tree=TREES)
def test_tree(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as base:
        root, target = os.fsencode(base) + b"/root", os.fsencode(base) + b"/target"
        build(root, tree)
        os.mkdir(target)
        data = b"".join(pack_tree(root, ALL))
        unpack(io.BytesIO(data), target)
        assert describe(target) == describe(root)
        assert b"".join(pack_tree(target, ALL)) == data
        assert list(changes_of_trees(target, root, all_xattrs=True)) == []


@given(old=TREES, new=TREES)
def test_changes_applied_to_the_old_tree_give_the_new_one(old: Tree, new: Tree) -> None:
    with tempfile.TemporaryDirectory() as base:
        before, after, target = (os.fsencode(base) + name for name in (b"/before", b"/after", b"/target"))
        build(before, old)
        build(after, [*old, *new])
        subprocess.run(["cp", "-a", before, target], check=True)
        changes = list(changes_of_trees(after, before, all_xattrs=True))
        layer = b"".join(pack_changes(changes, ALL))
        unpack(io.BytesIO(layer), target)
        assert list(changes_of_trees(target, after, all_xattrs=True)) == []


@given(old=TREES, new=TREES)
def test_layer_directory_made_from_an_archive_makes_the_same_changes(old: Tree, new: Tree) -> None:
    with tempfile.TemporaryDirectory() as base:
        before, after, upper = (os.fsencode(base) + name for name in (b"/before", b"/after", b"/upper"))
        build(before, old)
        build(after, new)
        os.mkdir(upper)
        changes = list(changes_of_trees(after, before, all_xattrs=True))
        layer = b"".join(pack_changes(changes, ALL))
        unpack(io.BytesIO(layer), upper, UnpackOptions(whiteouts=WhiteoutMode.OVERLAY))
        found = list(changes_of_upper(upper, [before]))
        assert set(found) <= set(changes)
        # An archive has whole seconds and no difference where only the fraction or nothing differs.
        assert {c for c in changes if c not in found} == set()
        again = b"".join(pack_tree(upper, PackOptions(convert_whiteouts=True, xattrs=XattrSelection.ALL)))
        assert sorted(_names(again)) == sorted(_names(layer))


def _names(data: bytes) -> list[bytes]:
    from unionfs.archive.tar_reader import TarReader

    return [entry.name for entry in TarReader(io.BytesIO(data))]


@pytest.mark.parametrize("links", [False, True])
def test_tar_files(tmp_path: Path, links: bool) -> None:
    """TestTarFiles, TestTarUntar: 1000 files, with and without links."""
    root, target = tmp_path / "root", tmp_path / "target"
    root.mkdir()
    target.mkdir()
    for i in range(1000):
        (root / f"file-{i}").write_bytes(b"fooo")
        if links:
            os.link(root / f"file-{i}", root / f"hard-{i}")
            os.symlink(f"file-{i}", root / f"symlink-{i}")
    data = b"".join(pack_tree(str(root)))
    unpack(io.BytesIO(data), str(target))
    assert describe(target) == describe(root)


def test_tar_untar_with_xattr(tmp_path: Path) -> None:
    """TestTarUntarWithXattr: the capability of one file, and nobody else's."""
    root, target = tmp_path / "root", tmp_path / "target"
    root.mkdir()
    target.mkdir()
    for name in ("1", "2", "3"):
        (root / name).write_bytes(b"hello")
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(root / "2", "security.capability", capability)
    unpack(io.BytesIO(b"".join(pack_tree(str(root)))), str(target))
    assert {name: os.listxattr(target / name) for name in "123"} == {"1": [], "2": ["security.capability"], "3": []}
    assert os.getxattr(target / "2", "security.capability") == capability


def test_real_tree(tmp_path: Path) -> None:
    """A part of this machine's own file system."""
    source = Path("/usr/share/perl5" if os.path.isdir("/usr/share/perl5") else "/etc")
    target = tmp_path / "target"
    target.mkdir()
    data = b"".join(pack_tree(str(source), ALL))
    unpack(io.BytesIO(data), str(target))
    assert describe(target) == describe(source)
