"""What each request is answered with, by every transport: one script of requests over a fake kernel.

What a program sees is tested with mounts elsewhere, through one transport. This is where both are held to say the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fake_kernel import ROOT, FakeKernel, FuseError, served
from tests.support.sandbox import needs_root
from unionfs.fuse_ops.transports.direct import protocol as p
from unionfs.fuse_ops.transports.direct.protocol import SetAttr
from unionfs.host.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

needs_root()

_PLACES = 80  # one for each test
_LARGE = 3 * 1024 * 1024
_NOBODY = 65534


@dataclass
class Place:
    """A directory of the mounted tree that one test has for itself, with the lower and upper ones behind it."""

    kernel: FakeKernel
    name: str
    node: int
    lower: Path
    upper: Path

    def at(self, path: str) -> int:
        """The node of something in it."""
        return self.kernel.walk(f"{self.name}/{path}")

    def names(self) -> list[str]:
        return self.kernel.names(self.node)


def _fill(place: Path) -> None:
    (place / "dir" / "inner").mkdir(parents=True)
    (place / "dir" / "one").write_text("1")
    (place / "file").write_text("lower contents")
    (place / "large").write_bytes(b"x" * _LARGE)
    (place / "private").write_text("secret")
    (place / "private").chmod(0o600)
    (place / "program").write_text("#!/bin/sh\n")
    (place / "program").chmod(0o6755)
    (place / "link").symlink_to("file")
    os.link(place / "file", place / "second name")
    os.setxattr(place / "file", "user.colour", b"red")
    for path in (place, *place.rglob("*")):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)


@dataclass
class Session:
    kernel: FakeKernel
    root: Path
    used: int = 0


@pytest.fixture(scope="module", params=["direct", "direct,speedups=off", "pyfuse3", "pyfuse3,speedups=off"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    root = tmp_path_factory.mktemp("session")
    for name in ("lower", "upper", "work"):
        (root / name).mkdir()
    for number in range(_PLACES):
        place = root / "lower" / f"place{number}"
        place.mkdir()
        _fill(place)
    options = [f"{name}dir={root}/{name}" for name in ("lower", "upper", "work")]
    with served([*options, f"transport={request.param}"]) as kernel:
        yield Session(kernel, root)


@pytest.fixture
def place(session: Session) -> Place:
    name = f"place{session.used}"
    session.used += 1
    session.kernel.uid = session.kernel.gid = 0
    node = session.kernel.walk(name)
    return Place(session.kernel, name, node, session.root / "lower" / name, session.root / "upper" / name)


@pytest.fixture
def kernel(place: Place) -> FakeKernel:
    return place.kernel


def error_of(call: Callable[..., object], *args: object) -> int:
    with pytest.raises(FuseError) as caught:
        call(*args)
    assert caught.value.errno is not None
    return caught.value.errno


# -- names --------------------------------------------------------------------------------------------------------


def test_lookup(place: Place, kernel: FakeKernel) -> None:
    entry = kernel.lookup(place.node, "file")
    st = (place.lower / "file").stat()
    assert (entry.attr.size, entry.attr.mode, entry.attr.ino) == (14, st.st_mode, st.st_ino)
    assert kernel.lookup(place.node, "file") == entry
    assert kernel.lookup(place.node, "missing").node == 0


def test_names_of_one_file_are_one_node(place: Place, kernel: FakeKernel) -> None:
    entry, other = kernel.lookup(place.node, "file"), kernel.lookup(place.node, "second name")
    assert (entry.node, entry.attr) == (other.node, other.attr)
    assert entry.attr.nlink == 2


def test_a_node_that_nobody_knows(kernel: FakeKernel) -> None:
    assert error_of(kernel.getattr, 1 << 50) == errno.ESTALE


def test_forgotten_and_found_again(place: Place, kernel: FakeKernel) -> None:
    before = kernel.lookup(place.node, "private")
    kernel.forget(before.node)
    assert kernel.lookup(place.node, "private").attr == before.attr
    kernel.forget(1 << 50)  # nobody is told
    assert kernel.getattr(place.node).nlink


def test_mkdir(place: Place, kernel: FakeKernel) -> None:
    entry = kernel.mkdir(place.node, "new", 0o777, 0o027)
    assert entry.attr.mode == stat.S_IFDIR | 0o750
    assert stat.S_IMODE((place.upper / "new").stat().st_mode) == 0o750
    assert error_of(kernel.mkdir, place.node, "new", 0o755) == errno.EEXIST
    assert error_of(kernel.mkdir, place.node, "file", 0o755) == errno.EEXIST
    assert kernel.names(entry.node) == []


def test_mknod(place: Place, kernel: FakeKernel) -> None:
    fifo = kernel.mknod(place.node, "fifo", stat.S_IFIFO | 0o666, umask=0o022)
    assert fifo.attr.mode == stat.S_IFIFO | 0o644
    device = kernel.mknod(place.node, "device", stat.S_IFCHR | 0o600, p.encode_device(os.makedev(5, 300)))
    assert device.attr.rdev == p.encode_device(os.makedev(5, 300))
    assert (place.upper / "device").stat().st_rdev == os.makedev(5, 300)
    assert error_of(kernel.mknod, place.node, "file", stat.S_IFIFO | 0o600) == errno.EEXIST


def test_who_makes_something_owns_it(place: Place, kernel: FakeKernel) -> None:
    kernel.uid, kernel.gid = 1234, 2345
    for entry in (
        kernel.mkdir(place.node, "d", 0o755),
        kernel.mknod(place.node, "f", stat.S_IFREG | 0o644),
        kernel.symlink(place.node, "s", "file"),
        kernel.create(place.node, "c", os.O_WRONLY, 0o644)[0],
    ):
        assert (entry.attr.uid, entry.attr.gid) == (1234, 2345)


def test_symlink_and_readlink(place: Place, kernel: FakeKernel) -> None:
    entry = kernel.symlink(place.node, "new", "../somewhere")
    assert stat.S_ISLNK(entry.attr.mode)
    assert kernel.readlink(entry.node) == "../somewhere"
    assert kernel.readlink(place.at("link")) == "file"
    assert error_of(kernel.readlink, place.at("file")) == errno.EINVAL


def test_unlink(place: Place, kernel: FakeKernel) -> None:
    kernel.unlink(place.node, "private")
    assert kernel.lookup(place.node, "private").node == 0
    st = os.lstat(place.upper / "private")
    assert stat.S_ISCHR(st.st_mode)
    assert st.st_rdev == 0
    assert error_of(kernel.unlink, place.node, "private") == errno.ENOENT
    assert error_of(kernel.unlink, place.node, "dir") == errno.EISDIR
    assert "private" not in place.names()


def test_a_file_that_is_open_lives_on(place: Place, kernel: FakeKernel) -> None:
    node = place.at("private")
    handle = kernel.open(node, os.O_RDONLY)
    kernel.unlink(place.node, "private")
    assert kernel.read(node, handle, 0, 100) == b"secret"
    assert kernel.getattr(node).nlink == 0
    kernel.release(node, handle)


def test_rmdir(place: Place, kernel: FakeKernel) -> None:
    assert error_of(kernel.rmdir, place.node, "dir") == errno.ENOTEMPTY
    assert error_of(kernel.rmdir, place.node, "file") == errno.ENOTDIR
    node = place.at("dir")
    kernel.rmdir(node, "inner")
    kernel.unlink(node, "one")
    kernel.rmdir(place.node, "dir")
    assert kernel.lookup(place.node, "dir").node == 0
    again = kernel.mkdir(place.node, "dir", 0o755)
    assert kernel.names(again.node) == []


def test_rename_of_a_lower_file(place: Place, kernel: FakeKernel) -> None:
    node = place.at("private")
    kernel.rename(place.node, "private", place.at("dir"), "moved")
    assert kernel.lookup(place.node, "private").node == 0
    assert kernel.lookup(place.at("dir"), "moved").node == node
    assert kernel.contents(node) == b"secret"
    assert (place.upper / "dir" / "moved").read_text() == "secret"


def test_rename_of_a_large_lower_file(place: Place, kernel: FakeKernel) -> None:
    kernel.rename(place.node, "large", place.node, "moved")
    assert (place.upper / "moved").stat().st_size == _LARGE


def test_rename_of_a_lower_directory(place: Place, kernel: FakeKernel) -> None:
    kernel.rename(place.node, "dir", place.node, "moved")
    assert kernel.names(place.at("moved")) == ["inner", "one"]
    assert os.getxattr(place.upper / "moved", "trusted.overlay.redirect") == b"dir"
    assert error_of(kernel.rename, place.node, "dir", place.node, "elsewhere") == errno.ENOENT


def test_rename_over_something(place: Place, kernel: FakeKernel) -> None:
    kernel.rename(place.node, "private", place.node, "large")
    assert kernel.contents(place.at("large")) == b"secret"
    assert error_of(kernel.rename, place.node, "file", place.node, "dir") == errno.EISDIR
    assert error_of(kernel.rename, place.node, "dir", place.node, "file") == errno.ENOTDIR


def test_rename_with_flags(place: Place, kernel: FakeKernel) -> None:
    assert error_of(kernel.rename, place.node, "file", place.node, "private", RENAME_NOREPLACE) == errno.EEXIST
    kernel.rename(place.node, "dir", place.node, "private", RENAME_EXCHANGE)
    assert kernel.names(place.at("private")) == ["inner", "one"]
    assert kernel.contents(place.at("dir")) == b"secret"


def test_rename_after_a_change_of_owner(place: Place, kernel: FakeKernel) -> None:
    """Such a copy may not be on the disk yet: the rename has to see to it."""
    kernel.setattr(place.at("private"), SetAttr.UID, uid=7)
    kernel.rename(place.node, "private", place.node, "moved")
    assert "trusted.overlay.metacopy" not in os.listxattr(place.upper / "moved")
    assert kernel.lookup(place.node, "moved").attr.uid == 7


def test_link(place: Place, kernel: FakeKernel) -> None:
    node = place.at("private")
    entry = kernel.link(node, place.node, "third")
    assert entry.node == node
    assert entry.attr.nlink == 2
    assert (place.upper / "third").stat().st_ino == (place.upper / "private").stat().st_ino
    assert error_of(kernel.link, node, place.node, "file") == errno.EEXIST


# -- attributes ---------------------------------------------------------------------------------------------------


def test_getattr(place: Place, kernel: FakeKernel) -> None:
    for name in ("file", "dir", "link", "program"):
        st = (place.lower / name).lstat()
        attr = kernel.getattr(place.at(name))
        assert (attr.mode, attr.uid, attr.gid, attr.mtime_s) == (st.st_mode, st.st_uid, st.st_gid, int(st.st_mtime))


def test_setattr_of_a_lower_file(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    assert stat.S_IMODE(kernel.setattr(node, SetAttr.MODE, mode=0o640).mode) == 0o640
    attr = kernel.setattr(node, SetAttr.UID | SetAttr.GID, uid=11, gid=12)
    assert (attr.uid, attr.gid) == (11, 12)
    assert kernel.setattr(node, SetAttr.MTIME | SetAttr.ATIME, atime=5, mtime=77).mtime_s == 77
    st = (place.upper / "file").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime) == (0o640, 11, 12, 77)
    assert (place.upper / "file").read_text() == "lower contents"
    assert stat.S_IMODE((place.lower / "file").stat().st_mode) == 0o644


def test_times_that_are_now(place: Place, kernel: FakeKernel) -> None:
    valid = SetAttr.MTIME | SetAttr.MTIME_NOW | SetAttr.ATIME | SetAttr.ATIME_NOW
    now = int(time.time())  # which the kernel fills in all the same
    assert abs(kernel.setattr(place.at("file"), valid, atime=now, mtime=now).mtime_s - now) < 100


@pytest.mark.parametrize("size", [0, 5, 14, 100])
def test_truncate_a_lower_file(place: Place, kernel: FakeKernel, size: int) -> None:
    node = place.at("file")
    assert kernel.setattr(node, SetAttr.SIZE, size=size).size == size
    assert kernel.contents(node) == b"lower contents"[:size].ljust(size, b"\0")
    assert (place.upper / "file").stat().st_size == size
    assert kernel.getattr(place.at("second name")).size == size


def test_truncate_a_large_file(place: Place, kernel: FakeKernel) -> None:
    node = place.at("large")
    assert kernel.setattr(node, SetAttr.SIZE, size=_LARGE - 1).size == _LARGE - 1
    assert kernel.setattr(node, SetAttr.SIZE, size=1).size == 1
    assert (place.upper / "large").read_bytes() == b"x"


def test_a_new_owner_takes_setuid(place: Place, kernel: FakeKernel) -> None:
    assert stat.S_IMODE(kernel.setattr(place.at("program"), SetAttr.UID, uid=7).mode) == 0o755


def test_a_truncation_by_somebody_takes_setuid(place: Place, kernel: FakeKernel) -> None:
    node = place.at("program")
    kernel.setattr(node, SetAttr.UID, uid=_NOBODY)
    kernel.setattr(node, SetAttr.MODE, mode=0o6755)
    kernel.uid = _NOBODY
    handle = kernel.open(node, os.O_WRONLY | os.O_TRUNC, p.OPEN_KILL_SUIDGID)
    assert stat.S_IMODE(kernel.getattr(node).mode) == 0o755
    kernel.release(node, handle)


def test_statfs(kernel: FakeKernel, session: Session) -> None:
    blocks, *_, block_size, longest, _ = kernel.statfs()
    st = os.statvfs(session.root / "upper")
    assert (blocks * block_size, longest) == (st.f_blocks * st.f_bsize, st.f_namemax)


# -- extended attributes ------------------------------------------------------------------------------------------


def test_xattrs(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    assert kernel.getxattr(node, "user.colour") == b"red"
    assert kernel.listxattr(node) == ["user.colour"]
    assert error_of(kernel.getxattr, node, "user.other") == errno.ENODATA
    kernel.setxattr(node, "user.other", b"value")
    assert kernel.getxattr(node, "user.other") == b"value"
    assert sorted(kernel.listxattr(node)) == ["user.colour", "user.other"]
    kernel.removexattr(node, "user.colour")
    assert error_of(kernel.removexattr, node, "user.colour") == errno.ENODATA
    assert os.listxattr(place.lower / "file") == ["user.colour"]
    assert os.getxattr(place.upper / "file", "user.other") == b"value"


def test_removing_what_is_not_there_copies_nothing(place: Place, kernel: FakeKernel) -> None:
    assert error_of(kernel.removexattr, place.at("private"), "user.none") == errno.ENODATA
    assert not (place.upper / "private").exists()


def test_sizes_of_xattrs(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    assert p.U32.unpack_from(kernel.getxattr(node, "user.colour", 0))[0] == 3
    assert error_of(kernel.getxattr, node, "user.colour", 2) == errno.ERANGE
    assert error_of(kernel.listxattr, node, 3) == errno.ERANGE


def test_overlays_own_xattrs_are_hidden(place: Place, kernel: FakeKernel) -> None:
    kernel.setattr(place.at("dir"), SetAttr.MODE, mode=0o700)
    assert "trusted.overlay.origin" in os.listxattr(place.upper / "dir")
    assert kernel.listxattr(place.at("dir")) == []


# -- files --------------------------------------------------------------------------------------------------------


def test_read(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    handle = kernel.open(node, os.O_RDONLY)
    assert kernel.read(node, handle, 0, 4096) == b"lower contents"
    assert kernel.read(node, handle, 6, 4) == b"cont"
    assert kernel.read(node, handle, 14, 4096) == b""
    kernel.release(node, handle)
    node = place.at("large")
    handle = kernel.open(node, os.O_RDONLY)
    assert kernel.read(node, handle, _LARGE - 10, 1 << 17) == b"x" * 10
    assert kernel.read(node, handle, 0, 1 << 17) == b"x" * (1 << 17)
    kernel.release(node, handle)


def test_create_and_write(place: Place, kernel: FakeKernel) -> None:
    entry, handle = kernel.create(place.node, "new", os.O_RDWR, 0o666, 0o022)
    assert entry.attr.mode == stat.S_IFREG | 0o644
    assert kernel.write(entry.node, handle, 0, b"hello") == 5
    assert kernel.write(entry.node, handle, 5, b" again") == 6
    assert kernel.read(entry.node, handle, 0, 100) == b"hello again"
    kernel.release(entry.node, handle)
    assert (place.upper / "new").read_text() == "hello again"
    assert kernel.getattr(entry.node).size == 11


def test_open_for_writing_copies_up(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    reader = kernel.open(node, os.O_RDONLY)
    handle = kernel.open(node, os.O_RDWR)
    assert (place.upper / "file").read_text() == "lower contents"
    assert kernel.write(node, handle, 0, b"LOWER") == 5
    assert kernel.read(node, reader, 0, 100) == b"LOWER contents", "who had it open sees the copy"
    kernel.release(node, handle)
    kernel.release(node, reader)
    assert (place.lower / "file").read_text() == "lower contents"


def test_open_for_writing_of_a_large_file(place: Place, kernel: FakeKernel) -> None:
    """Two programs at once, and a third one that is answered meanwhile."""
    node, other = place.at("large"), place.at("file")
    writers = [
        kernel.send(p.Opcode.OPEN, node, p.OPEN_IN.pack(os.O_WRONLY, 0)),
        kernel.send(p.Opcode.OPEN, node, p.OPEN_IN.pack(os.O_RDWR, 0)),
    ]
    assert kernel.contents(other) == b"lower contents"
    for writer in writers:
        (handle,) = p.U64.unpack_from(kernel.answer(writer))
        assert kernel.write(node, handle, 0, b"y") == 1
        kernel.release(node, handle)
    assert (place.upper / "large").read_bytes() == b"y" + b"x" * (_LARGE - 1)


def test_a_lower_file_that_takes_long_to_open_holds_nobody_up(place: Place, kernel: FakeKernel) -> None:
    """As on a network file system; here somebody has a lease on it, which the kernel has to take away first."""
    node, other = place.at("large"), place.at("file")
    with (place.lower / "large").open("r+b") as leased:
        fcntl.fcntl(leased, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        writer = kernel.send(p.Opcode.OPEN, node, p.OPEN_IN.pack(os.O_WRONLY, 0))
        assert kernel.contents(other) == b"lower contents"
        assert writer not in kernel.early
    (handle,) = p.U64.unpack_from(kernel.answer(writer))
    kernel.release(node, handle)


def test_open_that_truncates(place: Place, kernel: FakeKernel) -> None:
    node = place.at("large")
    handle = kernel.open(node, os.O_WRONLY | os.O_TRUNC)
    assert (place.upper / "large").stat().st_size == 0
    assert kernel.getattr(node).size == 0
    kernel.release(node, handle)


def test_fsync(place: Place, kernel: FakeKernel) -> None:
    entry, handle = kernel.create(place.node, "new", os.O_RDWR, 0o644)
    kernel.write(entry.node, handle, 0, b"data")
    kernel.fsync(entry.node, handle)
    kernel.fsync(entry.node, handle, data_only=True)
    kernel.release(entry.node, handle)
    lower = place.at("file")
    handle = kernel.open(lower, os.O_RDONLY)
    kernel.fsync(lower, handle)
    kernel.release(lower, handle)
    kernel.fsync_directory(place.node)


def test_a_name_that_was_found_is_a_link_after_a_sync(place: Place, kernel: FakeKernel) -> None:
    node = place.at("file")
    handle = kernel.open(node, os.O_RDWR)
    kernel.write(node, handle, 0, b"LOWER")
    kernel.release(node, handle)
    assert kernel.lookup(place.node, "second name").node == node
    assert not (place.upper / "second name").exists(), "a look-up changed something"
    kernel.fsync_directory(ROOT)
    assert (place.upper / "second name").samefile(place.upper / "file")


def test_errors_of_open(place: Place, kernel: FakeKernel) -> None:
    assert error_of(kernel.open, 1 << 50, os.O_RDONLY) == errno.ESTALE
    entry, handle = kernel.create(place.node, "new", os.O_RDWR, 0o644)
    kernel.release(entry.node, handle)
    assert error_of(kernel.create, place.node, "new", os.O_RDWR | os.O_EXCL, 0o644) == errno.EEXIST


# -- directories --------------------------------------------------------------------------------------------------

_NAMES = ["dir", "file", "large", "link", "private", "program", "second name"]


def test_listing(place: Place, kernel: FakeKernel) -> None:
    assert place.names() == _NAMES
    kernel.unlink(place.node, "file")
    kernel.mkdir(place.node, "new", 0o755)
    assert place.names() == sorted({*_NAMES, "new"} - {"file"})


def test_listing_with_attributes(place: Place, kernel: FakeKernel) -> None:
    entries = kernel.entries(place.node)
    assert sorted(entries) == _NAMES
    for name, entry in entries.items():
        assert entry == kernel.lookup(place.node, name)


def test_listing_in_small_pieces(place: Place, kernel: FakeKernel) -> None:
    for number in range(100):
        kernel.mknod(place.node, f"new{number}", stat.S_IFREG | 0o644)
    names = place.kernel.names(place.node, 512)
    assert names == sorted([*_NAMES, *(f"new{number}" for number in range(100))])


def test_listing_while_names_come_and_go(place: Place, kernel: FakeKernel) -> None:
    """What is there all the time is told once."""
    directory = kernel.mkdir(place.node, "many", 0o755).node
    for number in range(200):
        kernel.mknod(directory, f"stays{number}", stat.S_IFREG | 0o644)
        kernel.mknod(directory, f"goes{number}", stat.S_IFREG | 0o644)
    handle = kernel.open_directory(directory)
    found: list[str] = []
    offset = turn = 0
    while data := kernel.ask(p.Opcode.READDIRPLUS, directory, p.READ_IN.pack(handle, offset, 2048, 0, 0, 0, 0)):
        while data:
            data = data[p.ENTRY.size + p.ATTR.size :]
            _, offset, length, _ = p.DIRENT.unpack_from(data)
            found.append(data[p.DIRENT.size : p.DIRENT.size + length].decode())
            data = data[p.DIRENT.size + (length + 7 & ~7) :]
        kernel.unlink(directory, f"goes{turn}")
        kernel.mknod(directory, f"comes{turn}", stat.S_IFREG | 0o644)
        turn += 1
    kernel.close_directory(directory, handle)
    assert turn > 5
    assert sorted(name for name in found if name.startswith("stays")) == sorted(f"stays{n}" for n in range(200))
    assert len(set(found)) == len(found)


def test_the_root(kernel: FakeKernel) -> None:
    assert stat.S_ISDIR(kernel.getattr(ROOT).mode)
    assert len(kernel.names(ROOT)) == _PLACES
