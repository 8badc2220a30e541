"""What a directory of a layer says of a name: every dialect, and redirects as the kernel takes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import mounted_overlay
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.overlay import rules
from unionfs.overlay.format import TRUSTED, USER

BOTH = (TRUSTED, USER)
NO_MARKS = rules.DirMarks(False, False, None, False, False)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def probe(layer: Path, name: str, *, xwhiteouts: bool = False, last: bool = False) -> rules.Entry:
    with opened(layer) as fd:
        return rules.probe(fd, name.encode(), BOTH, xwhiteouts=xwhiteouts, last=last)


# -- one name -------------------------------------------------------------------------------------------------


def test_nothing_and_whiteouts(tmp_path: Path) -> None:
    whiteout(tmp_path / "device")
    (tmp_path / ".wh.marked").write_text("")
    (tmp_path / "xattr").write_text("")
    os.setxattr(tmp_path / "xattr", "trusted.overlay.whiteout", b"y")
    assert probe(tmp_path, "nothing") == (None, False, None, False, NO_MARKS)
    assert probe(tmp_path, "n" * 256) == (None, False, None, False, NO_MARKS)
    for name in ("device", "marked"):
        assert probe(tmp_path, name)[:2] == (None, True), name
    assert probe(tmp_path, "xattr", xwhiteouts=True)[:2] == (None, True)
    assert probe(tmp_path, "xattr").st is not None, "only a directory that says so has such whiteouts"
    for name in (".wh.marked", ".wh..wh..opq", ".wh.x"):
        assert probe(tmp_path, name)[:2] == (None, False)


def test_a_mark_beside_a_name_hides_what_is_below_it_only(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert not probe(tmp_path, "d").hides
    (tmp_path / ".wh.d").write_text("")
    entry = probe(tmp_path, "d")
    assert entry.st is not None
    assert entry.hides
    assert not probe(tmp_path, "d", last=True).hides


@pytest.mark.parametrize(
    ("name", "value", "opaque", "xwhiteouts"),
    [
        ("trusted.overlay.opaque", b"y", True, False),
        ("user.overlay.opaque", b"y", True, False),
        ("user.fuseoverlayfs.opaque", b"y", True, False),
        ("trusted.overlay.opaque", b"x", False, True),
        ("trusted.overlay.opaque", b"0", False, False),
        ("trusted.overlay.overlay.opaque", b"y", False, False),
    ],
)
def test_opaque_directories(tmp_path: Path, name: str, value: bytes, opaque: bool, xwhiteouts: bool) -> None:
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", name, value)
    entry = probe(tmp_path, "d")
    assert (entry.hides, entry.marks.opaque, entry.marks.xwhiteouts) == (opaque, opaque, xwhiteouts)


def test_the_mark_of_an_opaque_directory_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with opened(tmp_path) as fd:
        assert not rules.is_marked_opaque(fd, b"d")
        (tmp_path / "d" / ".wh..wh..opq").write_text("")
        assert rules.is_marked_opaque(fd, b"d")
        assert not rules.is_marked_opaque(fd)
    with opened(tmp_path / "d") as fd:
        assert rules.is_marked_opaque(fd)


def test_a_file_ends_the_search_unless_its_data_is_below(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.setxattr(tmp_path / "file", "trusted.overlay.redirect", b"ignored")
    assert probe(tmp_path, "file")[1:4] == (True, None, False)
    os.setxattr(tmp_path / "file", "trusted.overlay.metacopy", b"")
    assert probe(tmp_path, "file")[1:4] == (False, b"ignored", True)


def test_the_first_name_space_counts(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", "user.overlay.redirect", b"user")
    assert probe(tmp_path, "d").redirect == b"user"
    os.setxattr(tmp_path / "d", "trusted.overlay.redirect", b"trusted")
    assert probe(tmp_path, "d").redirect == b"trusted"


# -- redirects ------------------------------------------------------------------------------------------------

VALUES = [
    b"t",
    b"/t",
    b"/t/s",
    b"t\0behind",
    b"/nothing",
    b"/t/in_t",
    b"/t/" + b"n" * 300,
    b"",
    b"/",
    b"/t/",
    b"//t",
    b"/t//s",
    b"t/s",
    b"../l2",
    b"..",
    b".",
    b"/t/../t",
    b"/t/./s",
]


def seen(list_it: Callable[[], list[str]]) -> list[str] | int:
    try:
        return sorted(list_it())
    except OSError as error:
        return error.errno or 0


@pytest.mark.parametrize("layer", ["upper", "l1", "l2"])
@pytest.mark.parametrize("value", VALUES)
def test_redirects_are_those_of_the_kernel(tmp_path: Path, value: bytes, layer: str) -> None:
    for path in ("upper", "work", "mnt", "l1", "l2/t/s", "l2/d", layer + "/d"):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    for path in ("l2/t/in_t", "l2/t/s/in_s", "l2/d/in_d", layer + "/d/top"):
        (tmp_path / path).write_text("")
    os.setxattr(tmp_path / layer / "d", "trusted.overlay.redirect", value)
    lowers = [str(tmp_path / "l1"), str(tmp_path / "l2")]
    where = (str(tmp_path / "upper"), str(tmp_path / "work"))
    with mounted_overlay(lowers, *where, str(tmp_path / "mnt")) as mnt:
        kernel = seen(lambda: os.listdir(os.path.join(mnt, "d")))
        assert sorted(os.listdir(mnt)) == ["d", "t"]
    tree = open_tree(MountOptions(lowerdirs=tuple(lowers), upperdir=where[0], workdir=where[1]))
    try:
        ours = seen(lambda: [os.fsdecode(name) for name in tree.names(tree.lookup(tree.root, b"d"))])
        assert sorted(tree.names(tree.root)) == [b"d", b"t"]
    finally:
        tree.close()
    assert ours == kernel
