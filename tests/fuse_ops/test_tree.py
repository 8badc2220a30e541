"""The tree without a mount: what FUSE alone cannot show, such as memory, descriptors and half-done copies."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.users import as_user
from unionfs.errors import LayerError
from unionfs.fuse_ops.copy_up.copy_up import METADATA
from unionfs.fuse_ops.options import MountOptions, RedirectMode
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree


@dataclass(frozen=True)
class User:
    uid: int = 0
    gid: int = 0
    pid: int = 0


ROOT = User()
NOBODY = 65534


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


def _created(tree: UnionTree, parent: Inode, user: User) -> Inode:
    inode, file = tree.create(parent, b"new", 0o640, os.O_RDWR, user)
    tree.close_file(file)
    return inode


MAKERS: dict[str, Callable[[UnionTree, Inode, User], Inode]] = {
    "file": _created,
    "device": lambda tree, parent, user: tree.mknod(parent, b"new", stat.S_IFCHR | 0o640, 0x103, user),
    "whiteout": lambda tree, parent, user: tree.mknod(parent, b"new", stat.S_IFCHR, 0, user),
    "directory": lambda tree, parent, user: tree.mkdir(parent, b"new", 0o1750, user),
    "link": lambda tree, parent, user: tree.symlink(parent, b"new", b"target", user),
}


@pytest.mark.parametrize("user", [ROOT, User(0, 1000), User(1000, 1000), User(1000, 50)], ids=str)
@pytest.mark.parametrize("group", [0, 50])
@pytest.mark.parametrize("setgid", [False, True])
@pytest.mark.parametrize("place", ["made here", "merged", "where a lower one was removed"])
@pytest.mark.parametrize("kind", MAKERS)
def test_owner_of_what_is_made(
    tree: UnionTree, dirs: Path, kind: str, place: str, setgid: bool, group: int, user: User
) -> None:
    (dirs / "low1" / "d" / "new").write_text("")
    if place == "made here":
        parent = tree.mkdir(tree.root, b"p", 0o777, ROOT)
    else:
        parent = tree.lookup(tree.root, b"d")
        if place == "merged":
            (dirs / "low1" / "d" / "new").unlink()
        else:
            tree.unlink(parent, b"new")
    change = AttributeChange(mode=0o2777 if setgid else 0o777, gid=group)
    tree.set_attributes(parent, change, ROOT)
    with pytest.raises(FileNotFoundError):
        tree.lookup(parent, b"new")

    inode = MAKERS[kind](tree, parent, user)
    told = tree.view.attributes_of_new(inode)
    assert (told.uid, told.gid) == (user.uid, group if setgid else user.gid)
    if kind == "directory":
        assert stat.S_IMODE(told.mode) == (0o3750 if setgid else 0o1750)
    assert told == tree.attributes(inode), "what was told is not what is there"
    for make in MAKERS.values():
        with pytest.raises(FileExistsError):
            make(tree, parent, user)


@pytest.mark.parametrize("where", ["lower", "merged"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_name_of_a_lower_layer_is_taken(tree: UnionTree, dirs: Path, kind: str, where: str) -> None:
    (dirs / "low2" / "d" / "new").write_text("")
    d = tree.lookup(tree.root, b"d")
    if where == "merged":
        tree.mkdir(d, b"other", 0o755, ROOT)
    with pytest.raises(FileExistsError):
        MAKERS[kind](tree, d, ROOT)
    assert not (dirs / "upper" / "d" / "new").exists()


class TestWhiteoutDevices:
    """The file system is asked for them when the first is needed."""

    @pytest.fixture
    def answers(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """What mknod(2) says to the next ones who ask: an errno, 0 for what it says really."""
        answers: list[int] = []
        real_mknod = os.mknod

        def mknod(path: bytes, *args: Any, **kwargs: Any) -> None:
            if error := answers.pop(0):
                raise OSError(error, os.strerror(error))
            real_mknod(path, *args, **kwargs)

        monkeypatch.setattr("unionfs.fuse_ops.stack.upper_dir.os.mknod", mknod)
        return answers

    def test_a_mount_asks_for_nothing_and_leaves_nothing(self, answers: list[int], tree: UnionTree, dirs: Path) -> None:
        assert os.listdir(dirs / "work" / "work") == []
        assert [name for name in os.listxattr(dirs / "work" / "work") if "overlay" in name] == []

    def test_one_inode_serves_all(self, answers: list[int], tree: UnionTree, dirs: Path) -> None:
        answers += [0]
        tree.unlink(tree.root, b"file")
        tree.unlink(tree.lookup(tree.root, b"d"), b"one")
        made = [os.lstat(dirs / "upper" / name) for name in ("file", "d/one")]
        assert [(stat.S_ISCHR(st.st_mode), st.st_rdev) for st in made] == [(True, 0)] * 2
        assert len({st.st_ino for st in made}) == 1

    @pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL])
    def test_marks_where_there_are_none(self, answers: list[int], tree: UnionTree, dirs: Path, error: int) -> None:
        answers += [error]
        tree.unlink(tree.root, b"file")
        tree.unlink(tree.lookup(tree.root, b"d"), b"one")
        assert (dirs / "upper" / ".wh.file").exists() and (dirs / "upper" / "d" / ".wh.one").exists()
        assert tree.find(tree.root, b"file") is None

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_full_disk_says_nothing_about_them(
        self, answers: list[int], tree: UnionTree, dirs: Path, error: int
    ) -> None:
        answers += [error, error, 0]
        with pytest.raises(OSError) as raised:
            tree.unlink(tree.root, b"file")
        assert raised.value.errno == error
        with pytest.raises(OSError) as raised:
            tree.rename(tree.root, b"file", tree.root, b"new", 0, ROOT)
        assert raised.value.errno == error
        assert sorted(tree.names(tree.root)) == [b"d", b"file"]
        assert os.listdir(dirs / "upper") in ([], ["file"])  # it was copied up to be renamed
        tree.unlink(tree.root, b"file")
        assert stat.S_ISCHR(os.lstat(dirs / "upper" / "file").st_mode)


def test_two_servers_may_try_the_same_work_directory(dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_removexattr = os.removexattr

    def twice(path: int, name: bytes) -> None:
        real_removexattr(path, name)  # the other one's
        real_removexattr(path, name)

    with monkeypatch.context() as patched:
        patched.setattr(os, "removexattr", twice)
        tree = open_tree(options(dirs))
    assert tree.view.xattrs.opaque == b"trusted.overlay.opaque"
    tree.close()


def refuse_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a file system without O_TMPFILE; counts how often it was asked for."""
    asked: list[int] = []
    real_open = os.open

    def refuse(path: bytes, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            asked.append(flags)
            raise OSError(errno.EOPNOTSUPP, "no unnamed files")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr("unionfs.fuse_ops.stack.upper_dir.os.open", refuse)
    return asked


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_copy_that_fails_leaves_nothing(
    tree: UnionTree, dirs: Path, monkeypatch: pytest.MonkeyPatch, *, unnamed: bool
) -> None:
    if not unnamed:
        refuse_unnamed_files(monkeypatch)
    file = tree.lookup(tree.root, b"file")
    job = tree.copy_up.begin(file)
    assert job is not None and job.new is not None
    assert os.listdir(dirs / "work" / "work") == ([] if unnamed else [os.fsdecode(job.new.temp)])
    job.run()
    tree.copy_up.abort(job)
    assert os.listdir(dirs / "upper") == os.listdir(dirs / "work" / "work") == []
    assert tree.copy_up.requires(file)
    tree.copy_up.ensure(file)
    assert (dirs / "upper" / "file").read_text() == "contents"


def test_unnamed_files_are_asked_for_once(tree: UnionTree, dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse_unnamed_files(monkeypatch)
    tree.copy_up.ensure(tree.lookup(tree.root, b"file"))
    tree.copy_up.ensure(tree.lookup(tree.lookup(tree.root, b"d"), b"two"))
    assert len(asked) == 1
    assert (dirs / "upper" / "file").read_text() == "contents"
    assert (dirs / "upper" / "d" / "two").read_text() == "22"


@pytest.mark.parametrize("unnamed", [True, False])
def test_data_is_synced_before_it_has_its_place(
    tree: UnionTree, dirs: Path, monkeypatch: pytest.MonkeyPatch, *, unnamed: bool
) -> None:
    events: list[str] = []
    real_fsync, real_link, real_rename = os.fsync, os.link, os.rename

    def fsync(fd: int) -> None:
        events.append(f"fsync of {os.pread(fd, 100, 0).decode()}")
        real_fsync(fd)

    def link(*args: Any, **kwargs: Any) -> None:
        events.append("link")
        real_link(*args, **kwargs)

    def rename(*args: Any, **kwargs: Any) -> None:
        events.append("rename")
        real_rename(*args, **kwargs)

    if not unnamed:
        refuse_unnamed_files(monkeypatch)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "rename", rename)
    tree.copy_up.ensure(tree.lookup(tree.root, b"file"))
    assert events == ["fsync of contents", "link" if unnamed else "rename"]


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("metacopy", [False, True])
def test_a_copy_is_complete_before_it_can_be_seen(
    dirs: Path, monkeypatch: pytest.MonkeyPatch, *, metacopy: bool, unnamed: bool
) -> None:
    """A crash just before it has its place leaves the old state; after it, the copy lacks nothing."""
    lower = dirs / "low2" / "file"
    os.chown(lower, 12, 34)
    os.chmod(lower, 0o4751)
    os.setxattr(lower, "user.kept", b"value")
    os.utime(lower, ns=(1_000_000_001, 2_000_000_002))
    seen: list[os.stat_result] = []
    attributes: list[set[str]] = []

    def crash(temp: bytes, name: bytes, *, src_dir_fd: int | None = None, dst_dir_fd: int) -> None:
        assert os.listdir(dirs / "upper") == []
        path = temp if src_dir_fd is None else b"/proc/self/fd/%d/%s" % (src_dir_fd, temp)
        seen.append(os.stat(path))
        attributes.append(set(os.listxattr(path)))
        raise OSError(errno.EIO, "crash")

    if not unnamed:
        refuse_unnamed_files(monkeypatch)
    tree = open_tree(options(dirs, metacopy=metacopy))
    try:
        file = tree.lookup(tree.root, b"file")
        with monkeypatch.context() as patch:
            patch.setattr(os, "link" if unnamed else "rename", crash)
            with pytest.raises(OSError, match="crash"):
                tree.copy_up.ensure(file, METADATA)
        assert os.listdir(dirs / "upper") == os.listdir(dirs / "work" / "work") == []
        tree.copy_up.ensure(file, METADATA)
        copy = os.stat(dirs / "upper" / "file")
    finally:
        tree.close()
    for st in (*seen, copy):
        assert (st.st_mode, st.st_uid, st.st_gid) == (stat.S_IFREG | 0o4751, 12, 34)
        assert (st.st_size, st.st_atime_ns, st.st_mtime_ns) == (len("contents"), 1_000_000_001, 2_000_000_002)
    marks = {"trusted.overlay.metacopy"} if metacopy else set()
    assert attributes == [{"user.kept", "trusted.overlay.origin"} | marks]


def test_a_server_without_privilege_copies_a_read_only_file() -> None:
    """Extended attributes can be set only as long as the copy may be written."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        dirs = Path(directory)
        for name in ("low1", "low2", "upper", "work"):
            (dirs / name).mkdir()
        lower = dirs / "low2" / "file"
        lower.write_text("contents")
        os.setxattr(lower, "user.kept", b"value")
        os.chmod(lower, 0o444)
        for path in (dirs, *dirs.rglob("*")):
            os.chown(path, NOBODY, NOBODY)

        def change() -> None:
            tree = open_tree(options(dirs, userxattr=True))
            file = tree.lookup(tree.root, b"file")
            tree.set_attributes(file, AttributeChange(mode=0o440), User(NOBODY, NOBODY))
            tree.close()

        as_user(NOBODY, change)
        copy = dirs / "upper" / "file"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o440
        assert copy.read_text() == "contents"
        assert set(os.listxattr(copy)) == {"user.kept", "user.overlay.origin"}


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


def test_readers_follow_a_copy_up_without_a_further_descriptor(
    tree: UnionTree, dirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened the file before the copy-up must not see the lower one for ever, because none was free then."""
    os.link(dirs / "low2" / "file", dirs / "low2" / "other")
    file = tree.lookup(tree.root, b"file")
    reader = tree.open(file, os.O_RDONLY)
    real_open = os.open

    def fail(path: bytes, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags == os.O_RDONLY | os.O_CLOEXEC and path.startswith(b"/proc/self/fd/"):
            raise OSError(errno.EMFILE, "too many open files")
        return real_open(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        handle = tree.open(file, os.O_RDWR)
    os.pwrite(handle.fd, b"CON", 0)
    assert os.pread(reader.fd, 100, 0) == b"CONtents"
    tree.close_file(handle)
    tree.close_file(reader)


def test_readers_follow_a_copy_up(tree: UnionTree) -> None:
    file = tree.lookup(tree.root, b"file")
    reader, writer = tree.open(file, os.O_RDONLY), tree.open(file, os.O_WRONLY)
    os.pwrite(writer.fd, b"CON", 0)
    assert os.pread(reader.fd, 100, 0) == b"CONtents"
    tree.close_file(reader)
    tree.close_file(writer)


def test_truncation_at_open_copies_no_data(tree: UnionTree, monkeypatch: pytest.MonkeyPatch) -> None:
    for how in (
        "unionfs.overlay.copying.syscalls.reflink",
        "unionfs.overlay.copying.os.copy_file_range",
    ):
        monkeypatch.setattr(how, lambda *args: pytest.fail("data was copied"))
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
        d: Inode = tree.root
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
    with pytest.raises(LayerError, match="the same directory"):
        open_tree(options(dirs, workdir=str(dirs / "upper")))
    assert open_fds() == before
