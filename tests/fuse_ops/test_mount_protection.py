"""Immutable and append-only files and directories: the kernel's overlayfs says what the flags forbid.

They are set in the lower layer, or in the upper directory by an earlier mount, and by chattr(1) in the mount.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import RENAME_EXCHANGE, fallocate, renameat2

pytest_plugins = ["tests.support.sandbox"]
needs_root()

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
IMMUTABLE, APPEND, NOATIME, NODUMP, SYNC = 0x10, 0x20, 0x80, 0x40, 0x08
PROTATTR = "trusted.overlay.protattr"
KEEP_SIZE = 1


def chattr(change: str, *paths: str) -> None:
    subprocess.run(["chattr", change, *paths], check=True, capture_output=True)


def flags_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, b"\0" * 4))[0])
    finally:
        os.close(fd)


def outcome(call: Callable[..., object], *args: object) -> str:
    try:
        result = call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if isinstance(result, int) and not isinstance(result, bool):
        os.close(result)
    return "done"


def append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def clear_append(path: str) -> None:
    """An append-only file stays one for whoever has it open already."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"OVER", 0)
    finally:
        os.close(fd)


def allocate(path: str, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        fallocate(fd, mode, 0, 100_000)
    finally:
        os.close(fd)


def on_file(top: str, path: str) -> dict[str, str]:
    """What can be done with a file, by name of what is tried. ``top`` has files for it to be mixed with."""
    other = os.path.join(top, "other")
    found = {
        "read": outcome(os.open, path, os.O_RDONLY),
        "write": outcome(os.open, path, os.O_WRONLY),
        "read and write": outcome(os.open, path, os.O_RDWR),
        "truncate at open": outcome(os.open, path, os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
        "truncate": outcome(os.truncate, path, 1),
        "chmod": outcome(os.chmod, path, 0o640),
        "chown": outcome(os.chown, path, 1, 1),
        "set times": outcome(lambda: os.utime(path, (1, 1))),
        "set attribute": outcome(os.setxattr, path, "user.new", b"x"),
        "remove attribute": outcome(os.removexattr, path, "user.old"),
        "link": outcome(os.link, path, path + " 2"),
        "rename": outcome(os.rename, path, path + " 3"),
        "replace": outcome(os.rename, other, path),
        "exchange": outcome(renameat2, other, path, RENAME_EXCHANGE),
        "unlink": outcome(os.unlink, path),
        "append": outcome(append, path),
        "allocate": outcome(allocate, path, 0),
        "allocate behind the end": outcome(allocate, path, KEEP_SIZE),
        "touch": outcome(os.utime, path),
    }
    if found["append"] == "done":
        with open(path, "rb") as file:
            found["contents"] = file.read(4).decode()
        found["no longer append"] = outcome(clear_append, path)
    return found


def write_in(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"x")


def names(path: str) -> str:
    return ",".join(sorted(os.listdir(path))) if os.path.isdir(path) else "gone"


def on_directory(top: str, path: str) -> dict[str, str]:
    other, other_dir = os.path.join(top, "other"), os.path.join(top, "other dir")
    inside, moved = os.path.join(path, "inside"), os.path.join(top, "moved " + os.path.basename(path))
    new = os.path.join(path, "new")
    return {
        "list": names(path),
        "chmod": outcome(os.chmod, path, 0o750),
        "set attribute": outcome(os.setxattr, path, "user.new", b"x"),
        "write what is in it": outcome(write_in, inside),
        "chmod what is in it": outcome(os.chmod, inside, 0o600),
        "unlink": outcome(os.unlink, inside),
        "rmdir": outcome(os.rmdir, os.path.join(path, "dir")),
        "rename in it": outcome(os.rename, inside, new),
        "rename out of it": outcome(os.rename, inside, moved),
        "exchange": outcome(renameat2, other, inside, RENAME_EXCHANGE),
        "replace": outcome(os.rename, other, inside),
        "rename itself": outcome(os.rename, path, moved),
        "replace itself": outcome(os.rename, other_dir, path),
        "remove itself": outcome(os.rmdir, path),
        "unnamed": outcome(os.open, path, os.O_TMPFILE | os.O_RDWR),
        "create": outcome(os.open, new, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "mkdir": outcome(os.mkdir, new + " dir"),
        "symlink": outcome(os.symlink, "x", new + " link"),
        "mknod": outcome(lambda: os.mknod(new + " pipe", stat.S_IFIFO | 0o600)),
        "link": outcome(os.link, other, new + " name"),
        "rename into it": outcome(os.rename, other, new + " other"),
        "list again": names(path),
        "touch": outcome(os.utime, path),
    }


class Trees:
    """Layers with protected files and directories: of the lower one by chattr, of the upper as an overlay keeps it."""

    NAMES = ("lower i", "lower a", "upper i", "upper a", "upper ai", "upper none")

    def __init__(self, box: Sandbox) -> None:
        self.box = box
        low = box.lower()
        self.protected: list[tuple[str, str]] = []
        for name in self.NAMES:
            place, flags = name.split()
            top = box.lowers[0] if place == "lower" else box.in_upper()
            file, directory = os.path.join(top, name), os.path.join(top, name + " dir")
            os.makedirs(os.path.join(directory, "dir"))
            for path in (file, os.path.join(directory, "inside")):
                with open(path, "wb") as f:
                    f.write(b"contents")
            os.setxattr(file, "user.old", b"x")
            for path in (file, directory):
                if place == "lower":
                    self.protected.append(("+" + flags, path))
                elif flags != "none":
                    os.setxattr(path, PROTATTR, flags.encode())
        low.file("other", "other").dir("other dir")
        for flags, path in self.protected:
            chattr(flags, path)

    def release(self) -> None:
        self.box.thaw()
        for _, path in self.protected:
            chattr("-ia", path)

    def outcomes(self) -> dict[str, dict[str, str]]:
        return {
            **{name: on_file(self.box.target, self.box.at(name)) for name in self.NAMES},
            **{name + " dir": on_directory(self.box.target, self.box.at(name + " dir")) for name in self.NAMES},
        }


@pytest.fixture
def trees(box: Sandbox) -> Iterator[Trees]:
    trees = Trees(box)
    try:
        yield trees
    finally:
        trees.release()


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, str]]:
    """What the kernel's overlayfs says."""
    from tests.support.sandbox import new_root

    box = Sandbox(new_root())
    trees = Trees(box)
    try:
        with box.kernel():
            return trees.outcomes()
    finally:
        trees.release()
        subprocess.run(["rm", "-rf", box.root], check=True)


def box_is_on(transport: str) -> bool:
    return os.environ["UNIONFS_TRANSPORT"] == transport


@pytest.mark.parametrize("option", ["passthrough=1", "passthrough=0"])
def test_as_the_kernel(box: Sandbox, trees: Trees, reference: dict[str, dict[str, str]], option: str) -> None:
    with box.mount(option):
        found = trees.outcomes()
    for name, expected in reference.items():
        if box_is_on("pyfuse3"):  # which has no requests for these
            for missing in {"allocate", "allocate behind the end", "unnamed"} & found[name].keys():
                found[name][missing] = expected[missing]
        assert found[name] == expected, name
    assert reference["lower i"]["unlink"] == reference["upper a dir"]["rmdir"] == "EPERM"
    assert reference["upper none"]["write"] == "done"


def test_flags_go_with_a_copy(box: Sandbox, trees: Trees) -> None:
    """Also of the directories above it; what we write is what the kernel's overlayfs reads."""
    with box.mount():
        append(box.at("lower a"))
        append(box.at("lower i dir/inside"))
    assert os.getxattr(box.in_upper("lower a"), PROTATTR) == b"a"
    assert os.getxattr(box.in_upper("lower i dir"), PROTATTR) == b"i"
    with pytest.raises(OSError):
        os.getxattr(box.in_upper("lower i dir/inside"), PROTATTR)
    with box.kernel():
        theirs = {name: flags_of(box.at(name)) for name in ("lower a", "lower i dir")}
    assert [flags & (IMMUTABLE | APPEND) for flags in theirs.values()] == [APPEND, IMMUTABLE]
    with box.mount():
        assert outcome(os.unlink, box.at("lower a")) == "EPERM"
        assert outcome(os.mkdir, box.at("lower i dir/new")) == "EPERM"


@pytest.mark.disk
def test_other_flags_go_with_a_copy(box: Sandbox) -> None:
    low = box.lower().file("f", "x").dir("d").file("d/inside", "x").file("plain", "x")
    chattr("+AS", low.at("f"), low.at("d"))
    with box.mount():
        for name in ("f", "d/inside", "plain"):
            append(box.at(name))
    ours = {name: flags_of(box.in_upper(name)) & (NOATIME | SYNC) for name in ("f", "d", "d/inside", "plain")}
    assert ours["f"] == ours["d"] == NOATIME | SYNC
    assert ours["plain"] == 0
    box.fresh_upper("kernel")
    with box.kernel():
        for name in ("f", "d/inside", "plain"):
            append(box.at(name))
    assert {name: flags_of(box.in_upper(name)) & (NOATIME | SYNC) for name in ours} == ours


def test_chattr(direct_box: Sandbox) -> None:
    box = direct_box
    box.lower().file("low", "x").dir("d").file("d/inside", "x").file("there", "x")
    with box.mount():
        with open(box.at("new"), "w") as file:
            file.write("x")
        for name in ("low", "new", "d"):
            chattr("+i", box.at(name))
            assert flags_of(box.at(name)) & IMMUTABLE
            assert outcome(os.unlink, box.at(name)) == "EPERM" or name == "d"
        assert outcome(os.rename, box.at("d/inside"), box.at("d/x")) == "EPERM"
        append(box.at("d/inside"))  # copied up into an immutable directory
        chattr("+d", box.at("low"))
        assert flags_of(box.at("low")) & (IMMUTABLE | NODUMP) == IMMUTABLE | NODUMP
        chattr("+a", box.at("there"))
        append(box.at("there"))
        assert outcome(os.open, box.at("there"), os.O_WRONLY) == "EPERM"
    for name in ("low", "new", "d", "there"):
        assert not flags_of(box.in_upper(name)) & (IMMUTABLE | APPEND), "flags on disk would be in our own way"
    assert flags_of(box.in_upper("low")) & NODUMP
    with box.kernel():
        assert outcome(os.unlink, box.at("low")) == "EPERM"
        assert flags_of(box.at("low")) & (IMMUTABLE | NODUMP) == IMMUTABLE | NODUMP
    with box.mount():
        assert flags_of(box.at("new")) & IMMUTABLE
        for name in ("low", "new", "d", "there"):
            chattr("-ia", box.at(name))
            assert not flags_of(box.at(name)) & (IMMUTABLE | APPEND)
        os.unlink(box.at("low"))
        os.rename(box.at("d"), box.at("e"))
    with pytest.raises(OSError):
        os.getxattr(box.in_upper("new"), PROTATTR)


def test_chattr_through_the_other_call(direct_box: Sandbox) -> None:
    """FS_IOC_FSSETXATTR, whose flags are other numbers; and whose project stays the host's business."""
    box = direct_box
    box.lower().file("f", "x")
    with box.mount():
        fd = os.open(box.at("f"), os.O_RDONLY)
        before = fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28))
        flags, *rest = struct.unpack("=5I8x", before)
        for kind, name in ((0x8, IMMUTABLE), (0x10, APPEND), (0x18, IMMUTABLE | APPEND)):
            fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("=5I8x", flags | kind, *rest))
            assert fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(28))[0] & 0x18 == kind
            assert flags_of(box.at("f")) & (IMMUTABLE | APPEND) == name
        with pytest.raises(PermissionError):
            fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("=5I8x", flags, rest[0], rest[1], rest[2] + 1, rest[3]))
        assert flags_of(box.at("f")) & (IMMUTABLE | APPEND) == IMMUTABLE | APPEND
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, before)
        os.close(fd)
        os.unlink(box.at("f"))


def test_a_protected_file_is_in_the_way_of_nothing_else(box: Sandbox, trees: Trees) -> None:
    """Its directory is moved, its copy is synced, the mount ends."""
    os.makedirs(box.in_upper("around"))
    os.rename(box.in_upper("upper i"), box.in_upper("around/file"))
    os.rename(box.in_upper("upper i dir"), box.in_upper("around/dir"))
    with box.mount():
        assert outcome(os.unlink, box.at("around/file")) == "EPERM"
        os.rename(box.at("around"), box.at("elsewhere"))
        os.chmod(box.at("elsewhere/dir/inside"), 0o600)
        fd = os.open(box.at("elsewhere/file"), os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    with box.mount():
        assert outcome(os.unlink, box.at("elsewhere/file")) == "EPERM"
        assert outcome(os.unlink, box.at("elsewhere/dir/inside")) == "EPERM"
