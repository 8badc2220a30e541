"""The tree without a mount: what FUSE alone cannot show, such as memory, descriptors and half-done copies."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from unionfs.errors import LayerError
from unionfs.fuse_ops.metadata import AttributeChange
from unionfs.fuse_ops.options import MountOptions, RedirectMode
from unionfs.fuse_ops.stack import open_tree
from unionfs.fuse_ops.tree import UnionTree


@dataclass(frozen=True)
class User:
    uid: int = 0
    gid: int = 0
    pid: int = 0


ROOT = User()


@pytest.fixture
def dirs(tmp_path: Path) -> Path:
    for name in ("low1", "low2", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "low1" / "d").mkdir()
    (tmp_path / "low1" / "d" / "one").write_text("1")
    (tmp_path / "low2" / "d").mkdir()
    (tmp_path / "low2" / "d" / "two").write_text("22")
    (tmp_path / "low2" / "file").write_text("contents")
    return tmp_path


def options(dirs: Path, **changes: object) -> MountOptions:
    values: dict[str, object] = {
        "lowerdirs": (str(dirs / "low1"), str(dirs / "low2")),
        "upperdir": str(dirs / "upper"),
        "workdir": str(dirs / "work"),
    }
    return MountOptions(**{**values, **changes})  # type: ignore[arg-type]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tree(dirs: Path) -> Iterator[UnionTree]:
    before = open_fds()
    tree = open_tree(options(dirs))
    yield tree
    tree.close()
    assert open_fds() == before, "close() leaves descriptors open"
    assert os.listdir(dirs / "work" / "work") == [], "close() leaves files in the work directory"


def test_lookup_and_listing(tree: UnionTree) -> None:
    d = tree.lookup(tree.root, b"d")
    assert sorted(tree.names(d)) == [b"one", b"two"]
    assert tree.attributes(tree.lookup(d, b"two")).size == 2
    with pytest.raises(FileNotFoundError):
        tree.lookup(d, b"three")


def test_what_the_kernel_forgets_is_forgotten(tree: UnionTree) -> None:
    d = tree.lookup(tree.root, b"d")
    inodes = [tree.lookup(d, name) for name in tree.names(d)]
    for inode in (*inodes, d):
        inode.lookups += 1
    assert len(tree.inodes) == 4
    for inode in (d, *inodes):  # the directory first: its children keep it
        tree.forget(inode, 1)
    assert len(tree.inodes) == 1


def test_a_copy_that_fails_leaves_nothing(tree: UnionTree, dirs: Path) -> None:
    file = tree.lookup(tree.root, b"file")
    job = tree.copy_up.begin(file)
    assert job is not None
    assert os.listdir(dirs / "work" / "work") != []
    tree.copy_up.abort(job)
    assert os.listdir(dirs / "upper") == []
    assert tree.copy_up.needs(file, data=True)
    tree.copy_up.ensure(file)
    assert (dirs / "upper" / "file").read_text() == "contents"


def test_a_file_removed_while_it_is_copied(tree: UnionTree, dirs: Path) -> None:
    file = tree.lookup(tree.root, b"file")
    file.lookups += 1
    job = tree.copy_up.begin(file)
    assert job is not None
    tree.unlink(tree.root, b"file")
    job.run()
    tree.copy_up.finish(job)
    assert stat.S_ISCHR(os.lstat(dirs / "upper" / "file").st_mode), "the copy must not bring it back"
    assert tree.attributes(file).nlink == 0
    handle = tree.open(file, os.O_RDWR)
    assert os.pread(handle.fd, 100, 0) == b"contents"
    tree.close_file(handle)
    tree.forget(file, 1)


def test_a_directory_moved_while_a_file_in_it_is_copied(tree: UnionTree, dirs: Path) -> None:
    d = tree.lookup(tree.root, b"d")
    job = tree.copy_up.begin(tree.lookup(d, b"two"))
    assert job is not None
    tree.rename(tree.root, b"d", tree.root, b"moved")
    job.run()
    tree.copy_up.finish(job)
    assert (dirs / "upper" / "moved" / "two").read_text() == "22"


def test_a_name_linked_while_its_file_is_copied(tree: UnionTree, dirs: Path) -> None:
    os.link(dirs / "low2" / "file", dirs / "low2" / "other")
    file = tree.lookup(tree.root, b"file")
    job = tree.copy_up.begin(file)
    assert job is not None
    assert tree.lookup(tree.root, b"other") is file
    job.run()
    tree.copy_up.finish(job)
    assert os.path.samefile(dirs / "upper" / "file", dirs / "upper" / "other")
    assert tree.attributes(file).nlink == 2


def test_an_unlinked_name_does_not_take_the_others_data(tree: UnionTree, dirs: Path) -> None:
    """All known names go while the file is open and changed; a name nobody had looked up has the change."""
    os.link(dirs / "low2" / "file", dirs / "low2" / "other")
    file = tree.lookup(tree.root, b"file")
    file.lookups += 1
    handle = tree.open(file, os.O_RDONLY)
    tree.unlink(tree.root, b"file")
    tree.set_attributes(file, AttributeChange(mode=0o600), ROOT)
    other = tree.lookup(tree.root, b"other")
    assert other is file
    assert stat.S_IMODE(tree.attributes(other).mode) == 0o600
    assert tree.attributes(other).nlink == 1
    tree.rename(tree.root, b"other", tree.root, b"renamed")
    assert (dirs / "upper" / "renamed").read_text() == "contents"
    tree.close_file(handle)


def test_no_descriptor_for_a_reader_does_not_undo_a_copy(
    tree: UnionTree, dirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong after the copy is in its place must not take it away again."""
    os.link(dirs / "low2" / "file", dirs / "low2" / "other")
    file = tree.lookup(tree.root, b"file")

    def fail(*args: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(tree.copy_up, "_switch_handles", fail)
        with pytest.raises(OSError, match="too many"):
            tree.open(file, os.O_RDWR)
    assert tree.attributes(file).size == len("contents")
    handle = tree.open(file, os.O_RDWR)
    os.pwrite(handle.fd, b"CON", 0)
    tree.close_file(handle)
    assert (dirs / "upper" / "file").read_text() == "CONtents"


def test_readers_follow_a_copy_up(tree: UnionTree) -> None:
    file = tree.lookup(tree.root, b"file")
    reader, writer = tree.open(file, os.O_RDONLY), tree.open(file, os.O_WRONLY)
    os.pwrite(writer.fd, b"CON", 0)
    assert os.pread(reader.fd, 100, 0) == b"CONtents"
    tree.close_file(reader)
    tree.close_file(writer)


def test_truncation_at_open_copies_no_data(tree: UnionTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unionfs.fuse_ops.copy_up.copy_data", lambda *args: pytest.fail("data was copied"))
    handle = tree.open(tree.lookup(tree.root, b"file"), os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(handle.fd).st_size == 0
    tree.close_file(handle)


def test_descriptors_are_bounded_by_the_cache(dirs: Path) -> None:
    for n in range(300):
        (dirs / "low2" / f"dir{n}").mkdir()
        (dirs / "low2" / f"dir{n}" / "f").write_text("x")
    tree = open_tree(options(dirs))
    try:
        tree.view._cache._limit = 64  # the least, as with a low RLIMIT_NOFILE
        before = open_fds()
        for n in range(300):
            d = tree.lookup(tree.root, b"dir%d" % n)
            tree.attributes(tree.lookup(d, b"f"))
        assert open_fds() - before <= 70
    finally:
        tree.close()


def test_a_path_deeper_than_the_cache(dirs: Path) -> None:
    tree = open_tree(options(dirs))
    try:
        tree.view._cache._limit = 64
        d = tree.root
        for _ in range(200):
            d = tree.mkdir(d, b"d", 0o755, ROOT) if d is not tree.root else tree.lookup(d, b"d")
        tree.view._cache.close()
        other = tree.mkdir(tree.root, b"other", 0o755, ROOT)
        _, handle = tree.create(d, b"f", 0o644, os.O_RDWR, ROOT)
        tree.close_file(handle)
        tree.rename(d, b"f", other, b"f")
        assert tree.names(other) == [b"f"]
    finally:
        tree.close()


def test_a_read_only_tree_refuses_every_change(dirs: Path) -> None:
    tree = open_tree(options(dirs, upperdir=None, workdir=None))
    try:
        file = tree.lookup(tree.root, b"file")
        changes: list[Callable[[], object]] = [
            lambda: tree.mkdir(tree.root, b"new", 0o755, ROOT),
            lambda: tree.create(tree.root, b"new", 0o644, os.O_RDWR, ROOT),
            lambda: tree.symlink(tree.root, b"new", b"x", ROOT),
            lambda: tree.unlink(tree.root, b"file"),
            lambda: tree.rmdir(tree.root, b"d"),
            lambda: tree.rename(tree.root, b"file", tree.root, b"new"),
            lambda: tree.link(file, tree.root, b"new"),
            lambda: tree.open(file, os.O_RDWR),
            lambda: tree.set_attributes(file, AttributeChange(mode=0), ROOT),
            lambda: tree.set_xattr(file, b"user.x", b""),
            lambda: tree.remove_xattr(file, b"user.x"),
        ]
        for change in changes:
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EROFS
    finally:
        tree.close()


def test_lower_layers_cannot_be_written_through_their_descriptors(tree: UnionTree) -> None:
    """Design, LayerDir: even a bug above cannot."""
    for layer in tree.view.lower.layers:
        with pytest.raises(OSError) as caught:
            os.open(b"new", os.O_CREAT | os.O_WRONLY, dir_fd=layer.fd)
        assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError) as caught:
        tree.view.lower.layers[1].open(b"file", os.O_WRONLY)
    assert caught.value.errno == errno.EROFS


def test_links_in_a_layer_do_not_lead_out_of_it(dirs: Path, tree: UnionTree) -> None:
    (dirs / "low2" / "evil").symlink_to("/etc")
    with pytest.raises(OSError):
        tree.view.lower.layers[1].dir_fd(b"evil")
    with pytest.raises(OSError):
        tree.view.lower.layers[1].dir_fd(b"../low1")


def test_redirects_off(dirs: Path) -> None:
    tree = open_tree(options(dirs, redirect_dir=RedirectMode.OFF))
    try:
        with pytest.raises(OSError) as caught:
            tree.rename(tree.root, b"d", tree.root, b"e")
        assert caught.value.errno == errno.EXDEV
        assert os.listdir(dirs / "upper") == [], "nothing was copied up for it"
    finally:
        tree.close()


def test_too_many_layers(dirs: Path) -> None:
    with pytest.raises(LayerError, match="at most 500"):
        open_tree(options(dirs, lowerdirs=(str(dirs / "low1"),) * 501))


def test_a_layer_that_fails_releases_the_others(dirs: Path) -> None:
    before = open_fds()
    with pytest.raises(LayerError, match="no such directory"):
        open_tree(options(dirs, lowerdirs=(str(dirs / "low1"), str(dirs / "missing"))))
    with pytest.raises(LayerError, match="inside each other"):
        open_tree(options(dirs, workdir=str(dirs / "upper")))
    assert open_fds() == before
