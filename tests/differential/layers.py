"""The lower layers of the differential tests: something of everything that an image holds."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from tests.differential.operations import filled
from tests.support.layers import OLD_NS, Layer

LONG_NAME = "n" * 255
ODD_NAME = os.fsdecode(b"na\xefve \xff\n")


def build_lowers(roots: Sequence[str], linked: bool) -> None:
    """Fill three directories, top first; with hard links when ``linked``."""
    top, middle, bottom = (Layer(root) for root in roots)
    for root in roots:
        os.makedirs(root)
    (
        bottom.file("etc/conf", "one\n")
        .file("etc/secret", "s", mode=0o600, owner=(1000, 1000))
        .file("etc/none", "none", mode=0)
        .dir("etc/empty")
        .file("d/a", filled(1, 5000))
        .file("d/b", "b")
        .file("d/e/c", "c3", mtime_ns=-1_500_000_001)
        .file("d/e/f/g", "g")
        .dir("d/e/f", mode=0o750, owner=(1000, 50))
        .symlink("d/up", "../etc/conf", owner=(7, 8), mtime_ns=OLD_NS + 5)
        .symlink("to_d", "d")
        .symlink("nowhere", "no/where")
        .node("fifo", stat.S_IFIFO)
        .node("null", stat.S_IFCHR, 1, 3)
        .node("disk", stat.S_IFBLK, 7, 99)
        .socket("socket")
        .sparse("sparse", 300_000, 140_000, b"in the middle")
        .file("big", filled(3, 150_000))
        .file("suid", "s", mode=0o6755)
        .dir("tmp", mode=0o1777)
        .file("tmp/mine", "m", owner=(1000, 1000))
        .dir("home", mode=0o755, owner=(1000, 1000))
        .file("home/f", "f", owner=(1000, 1000))
        .dir("setgid", mode=0o2775, owner=(0, 50))
        .file("gone", "x")
        .file("opaque/old", "old")
        .file("opaque/sub/old", "old")
        .file("was_dir/inside", "i")
        .file("was_file", "f")
        .file("back", "first")
        .file("attrs", "x")
        .xattr("attrs", "user.one", b"1")
        .xattr("attrs", "trusted.two", b"\0\1")
        .xattr("d", "user.dir", b"d")
        .file(ODD_NAME, "odd")
        .file(LONG_NAME, "long")
        .dir("before_epoch", mtime_ns=-10_000_000_000_000_000)
        .file("only3/x/y/z", "deep")
    )
    (
        middle.whiteout("gone")
        .whiteout("d/b")
        .file("d/e/c", "c2", mode=0o640)
        .file("d/m", "m")
        .opaque("opaque")
        .file("opaque/new", "new")
        .dir("opaque/sub")
        .file("was_dir", "now a file")
        .file("was_file/inside", "now a directory")
        .whiteout("back")
        .file("only2/x", "x")
        .dir("d/e", mode=0o700)
    )
    (
        top.whiteout("d/e/f/g")
        .file("d/e/f/h", "h")
        .file("back", "again")
        .file("t/one", "1")
        .symlink("t/link", "one")
        .whiteout("never_was")
        .file("home/g", "g", owner=(1000, 1000))
    )
    if linked:
        bottom.file("h/1", filled(9, 3000)).link("h/2", to="h/1").link("h/s/3", to="h/1").link("hd", to="h/1")
        middle.file("h/m1", "mm", owner=(1000, 1000)).link("h/m2", to="h/m1")
        top.whiteout("h/2")
    for layer in (top, middle, bottom):
        os.utime(layer.root, ns=(OLD_NS, OLD_NS))
