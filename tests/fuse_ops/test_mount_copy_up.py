"""Copy-up through a mount: what is copied, what is not, and that nothing of an object is lost."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess

import pytest

from tests.support.layers import OLD_NS
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import allocated_bytes, assert_same, read_xattrs, snapshot, upper_entries
from tests.support.syscalls import renameat2

pytest_plugins = ["tests.support.sandbox"]
needs_root()

# Linux capability attribute, version 2: CAP_NET_RAW permitted and effective.
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def every_type(box: Sandbox) -> list[str]:
    low = box.lower()
    low.file("d/file", "data", mode=0o640, owner=(1000, 50), mtime_ns=OLD_NS + 1)
    low.dir("d/dir", mode=0o1751, owner=(3, 4), mtime_ns=OLD_NS + 2)
    low.symlink("d/symlink", "file", owner=(5, 6), mtime_ns=OLD_NS + 3)
    low.node("d/fifo", stat.S_IFIFO, mode=0o600).socket("d/socket")
    low.node("d/char", stat.S_IFCHR, 1, 3).node("d/block", stat.S_IFBLK, 259, 1_000_000)
    return ["d/" + n for n in ("file", "dir", "symlink", "fifo", "socket", "char", "block")]


def test_every_type_is_copied_with_its_metadata(box: Sandbox) -> None:
    paths = every_type(box)
    with box.mount():
        before = snapshot(box.target)
        for path in paths:
            # A change that leaves everything as it was, but cannot be made in the lower layer.
            if path == "d/dir":
                os.chmod(box.at(path), 0o1751)
            else:
                os.link(box.at(path), box.at(path + ".l"), follow_symlinks=False)
                os.unlink(box.at(path + ".l"))
        after = snapshot(box.target)
        for path in paths:
            assert after[path] == before[path], path
    assert set(paths) <= set(upper_entries(box.in_upper()))
    box.assert_kernel_agrees()


def test_chown_of_every_type(box: Sandbox) -> None:
    paths = every_type(box)
    with box.mount():
        for path in paths:
            os.chown(box.at(path), 77, 88, follow_symlinks=False)
            st = os.lstat(box.at(path))
            assert (st.st_uid, st.st_gid) == (77, 88)
    box.assert_kernel_agrees()


@pytest.mark.parametrize("mtime_ns", [OLD_NS, -1, -1_000_000_000, -1_234_567_890_123_456_789, 1])
def test_times_survive_copy_up_to_the_nanosecond(box: Sandbox, mtime_ns: int) -> None:
    """Before 1970 too: fuse-overlayfs 2.0 dies on such a file."""
    low = box.lower()
    low.file("f", "x", mtime_ns=mtime_ns).symlink("l", "f", mtime_ns=mtime_ns).node("p", stat.S_IFIFO)
    low.dir("d", mtime_ns=mtime_ns)
    with box.mount():
        for name in ("f", "l", "d"):
            assert os.lstat(box.at(name)).st_mtime_ns == mtime_ns
            os.chown(box.at(name), 1, 1, follow_symlinks=False)
            assert os.lstat(box.at(name)).st_mtime_ns == mtime_ns
        os.utime(box.at("p"), ns=(mtime_ns, mtime_ns))
        assert os.lstat(box.at("p")).st_mtime_ns == mtime_ns
    for name in ("f", "l", "d", "p"):
        assert os.lstat(box.in_upper(name)).st_mtime_ns == mtime_ns
    box.assert_kernel_agrees()


def test_a_symlink_keeps_its_time_on_copy_up(box: Sandbox) -> None:
    """fuse-overlayfs loses a symlink's mtime (and owner) on copy-up."""
    box.lower().symlink("d/l", "target", owner=(12, 34), mtime_ns=OLD_NS + 7)
    with box.mount():
        os.rename(box.at("d/l"), box.at("d/m"))
        st = os.lstat(box.at("d/m"))
        assert (st.st_mtime_ns, st.st_uid, st.st_gid) == (OLD_NS + 7, 12, 34)
        assert os.readlink(box.at("d/m")) == "target"
    st = os.lstat(box.in_upper("d/m"))
    assert (st.st_mtime_ns, st.st_uid, st.st_gid) == (OLD_NS + 7, 12, 34)


def test_parent_directories_keep_their_metadata(box: Sandbox) -> None:
    low = box.lower().file("a/b/c/f", "x").dir("a/b", mode=0o2750, owner=(9, 10)).dir("a", mode=0o1777)
    low.xattr("a/b", "user.k", b"v")
    with box.mount():
        before = snapshot(box.target)
        os.chmod(box.at("a/b/c/f"), 0o600)
        after = snapshot(box.target)
        for path in ("a", "a/b", "a/b/c"):
            assert after[path] == before[path]
    box.assert_kernel_agrees()


def test_xattrs_acls_and_file_capabilities_are_copied(box: Sandbox) -> None:
    low = box.lower()
    low.file("f", "x").xattr("f", "user.a", b"1").xattr("f", "trusted.b", b"\0").xattr("f", "user.empty", b"")
    low.file("cap", "x", mode=0o755).xattr("cap", "security.capability", NET_RAW)
    low.dir("d").xattr("d", "user.d", b"2")
    subprocess.run(["setfacl", "-m", "u:1000:rw,g:50:r", low.at("f")], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", low.at("d")], check=True)
    with box.mount():
        before = {n: read_xattrs(box.at(n)) for n in ("f", "cap", "d")}
        assert {k for k, _ in before["f"]} == {
            "user.a",
            "trusted.b",
            "user.empty",
            "system.posix_acl_access",
        }
        for name in before:
            os.utime(box.at(name), ns=(1, 1))
        assert {n: read_xattrs(box.at(n)) for n in before} == before
        shown = subprocess.run(["getcap", box.at("cap")], check=True, capture_output=True, text=True).stdout
        assert "cap_net_raw=ep" in shown
    box.assert_kernel_agrees()


def test_holes_stay_holes(box: Sandbox) -> None:
    """fuse-overlayfs fills them: a sparse file takes its whole size on copy-up."""
    size = 80 << 20
    box.lower().sparse("sparse", size, 40 << 20, b"x" * 100_000).sparse("end", size, 0, b"start")
    with box.mount():
        for name in ("sparse", "end"):
            os.chmod(box.at(name), 0o600)
            assert os.stat(box.at(name)).st_size == size
        with open(box.at("sparse"), "rb") as f:
            f.seek((40 << 20) - 10)
            assert f.read(20) == b"\0" * 10 + b"x" * 10
    assert allocated_bytes(box.in_upper("sparse")) < 2 << 20
    assert allocated_bytes(box.in_upper("end")) < 2 << 20
    box.assert_kernel_agrees()


def test_a_file_truncated_at_open_is_not_copied(box: Sandbox) -> None:
    low = box.lower()
    low.file("big", os.urandom(1 << 20), mode=0o640, owner=(1000, 1000)).xattr("big", "user.k", b"v")
    huge = low.at("huge")
    with open(huge, "wb") as f:
        f.write(b"x" * (200 << 20))
    with box.mount():
        free = os.statvfs(box.in_upper()).f_bfree
        for name in ("big", "huge"):
            with open(box.at(name), "w") as f:
                f.write("short")
            with open(box.at(name)) as f:
                assert f.read() == "short"
        lost = (free - os.statvfs(box.in_upper()).f_bfree) * os.statvfs(box.in_upper()).f_bsize
        st = os.stat(box.at("big"))
        assert (stat.S_IMODE(st.st_mode), st.st_uid) == (0o640, 1000)
        assert os.getxattr(box.at("big"), "user.k") == b"v"
    # Others write to this disk as well, so the bound is wide; a copy would have been 200 MiB.
    assert lost < 100 << 20
    assert allocated_bytes(box.in_upper("huge")) <= 8192
    box.assert_kernel_agrees()


def test_truncate_to_a_small_size_copies_that_much(box: Sandbox) -> None:
    low = box.lower()
    with open(low.at("big"), "wb") as f:
        f.write(b"0123456789" * (5 << 20))
    with box.mount():
        os.truncate(box.at("big"), 5)
        with open(box.at("big"), "rb") as f:
            assert f.read() == b"01234"
    assert allocated_bytes(box.in_upper("big")) < 1 << 20


def test_removing_a_lower_file_copies_nothing(box: Sandbox) -> None:
    """fuse-overlayfs copies a file up before it unlinks it."""
    low = box.lower()
    for name in ("unlinked", "over", "dir/inside"):
        low.file(name, b"x" * (1 << 20))
    low.dir("empty").file("small", "s")
    with box.mount():
        os.unlink(box.at("unlinked"))
        os.rename(box.at("small"), box.at("over"))
        os.unlink(box.at("dir/inside"))
        os.rmdir(box.at("dir"))
        os.rmdir(box.at("empty"))
        # In the upper while the mount lives, too: nothing is moved aside to be deleted later.
        sizes = [
            os.lstat(os.path.join(base, f)).st_size
            for top in (box.upper, box.work)
            for base, _, files in os.walk(top or "")
            for f in files
        ]
        assert max(sizes) <= 1
    assert upper_entries(box.in_upper()) == {
        "unlinked": "whiteout",
        "over": "file",
        "small": "whiteout",
        "dir": "whiteout",
        "empty": "whiteout",
    }
    box.assert_kernel_agrees()


def test_reading_copies_nothing(box: Sandbox) -> None:
    paths = every_type(box)
    with box.mount():
        snapshot(box.target)
        for path in paths:
            os.lstat(box.at(path))
            os.listxattr(box.at(path), follow_symlinks=False)
        with open(box.at("d/file"), "rb+"):
            pass
    # Opening for writing copies up, as in the kernel; reading does not.
    assert set(upper_entries(box.in_upper())) <= {"d", "d/file"}


def test_rename_of_a_lower_file(box: Sandbox) -> None:
    low = box.lower().file("d/f", "data", mode=0o640, owner=(1, 2)).xattr("d/f", "user.k", b"v")
    low.file("e/over", "x")
    with box.mount():
        before = snapshot(box.target)["d/f"]
        os.rename(box.at("d/f"), box.at("e/over"))
        assert not os.path.lexists(box.at("d/f"))
        assert snapshot(box.target)["e/over"] == before
    assert upper_entries(box.in_upper())["d/f"] == "whiteout"
    box.assert_kernel_agrees()


def test_rename_flags(box: Sandbox) -> None:
    box.lower().file("a", "a").file("b", "b").file("d/x").file("e/y")
    with box.mount():
        with pytest.raises(FileExistsError):
            renameat2(box.at("a"), box.at("b"), 1)
        with pytest.raises(FileExistsError):
            renameat2(box.at("d"), box.at("e"), 1)
        renameat2(box.at("a"), box.at("new"), 1)
        renameat2(box.at("new"), box.at("b"), 2)
        with open(box.at("new")) as f, open(box.at("b")) as g:
            assert (f.read(), g.read()) == ("b", "a")
        renameat2(box.at("d"), box.at("e"), 2)
        assert (os.listdir(box.at("d")), os.listdir(box.at("e"))) == (["y"], ["x"])
        renameat2(box.at("d"), box.at("b"), 2)
        assert os.listdir(box.at("b")) == ["y"]
        with pytest.raises(FileNotFoundError):
            renameat2(box.at("b"), box.at("missing"), 2)
        with pytest.raises(OSError):
            renameat2(box.at("b"), box.at("b/inside"), 0)
    box.assert_kernel_agrees()


def test_rename_with_whiteout(box: Sandbox) -> None:
    """An overlay with its upper on our mount asks for it: the old name becomes a whiteout, to be seen by that one."""
    box.lower().file("low", "l")
    with box.mount():
        with open(box.at("up"), "w"):
            pass
        for name in ("up", "low"):
            renameat2(box.at(name), box.at(name + "2"), 4)
            assert os.path.isfile(box.at(name + "2"))
            st = os.lstat(box.at(name))
            assert stat.S_ISCHR(st.st_mode)
            assert st.st_rdev == 0
        tree = snapshot(box.target)
        assert sorted(tree) == [".", "low", "low2", "up", "up2"]
    assert_same(box.union_snapshot(), tree)


def test_the_mount_survives_copy_up_without_space(box: Sandbox) -> None:
    """ENOSPC is answered, the file stays readable as it was, and nothing half-done is left."""
    from tests.support.mounts import mounted_tmpfs

    low = box.lower().file("small", "s").file("big", b"x" * (8 << 20))
    with mounted_tmpfs(os.path.join(box.root, "small"), "size=4m") as small:
        box.upper, box.work = small + "/upper", small + "/work"
        os.mkdir(box.upper)
        os.mkdir(box.work)
        with box.mount():
            with pytest.raises(OSError, match="space"):
                os.close(os.open(box.at("big"), os.O_WRONLY))
            with open(box.at("big"), "rb") as f:
                assert f.read() == b"x" * (8 << 20)
            os.chmod(box.at("small"), 0o600)
            assert os.statvfs(box.target).f_bavail > 0
        assert "big" not in upper_entries(small + "/upper")
        box.upper = box.work = None
    assert os.path.exists(low.at("big"))


def test_work_directory_is_clean_after_use(box: Sandbox) -> None:
    paths = every_type(box)
    with box.mount():
        for path in paths:
            os.chown(box.at(path), 1, 1, follow_symlinks=False)
        shutil.rmtree(box.at("d"))
    left = [p for p in upper_entries(box.work or "") if p not in ("work", "work/incompat")]
    assert left == []


def test_copy_to_an_upper_on_another_file_system(box: Sandbox) -> None:
    """No reflink and no copy_file_range between file systems: the plain copy must do."""
    from tests.support.mounts import mounted_tmpfs

    data = os.urandom(3 << 20)
    box.lower().file("f", data, mode=0o4755, owner=(1, 2)).sparse("s", 10 << 20, 5 << 20, b"y" * 4096)
    with mounted_tmpfs(os.path.join(box.root, "tmpfs")) as top:
        box.upper, box.work = top + "/upper", top + "/work"
        os.mkdir(box.upper)
        os.mkdir(box.work)
        with box.mount():
            before = snapshot(box.target)
            for name in ("f", "s"):
                os.utime(box.at(name), ns=(OLD_NS, OLD_NS))
            assert_same(snapshot(box.target), before)
        assert allocated_bytes(box.in_upper("s")) < 1 << 20
        box.assert_kernel_agrees()
        box.upper = box.work = None
