"""Who may do what: modes, ACLs, setuid bits, id mappings and squashing."""

from __future__ import annotations

import os
import stat
import struct
import subprocess

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import snapshot
from tests.support.users import as_user

pytest_plugins = ["tests.support.sandbox"]
needs_root()

ALICE, BOB = 4001, 4002
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def mode(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def refused(uid: int, call: object, *args: object, groups: tuple[int, ...] = ()) -> bool:
    def attempt() -> bool:
        try:
            call(*args)  # type: ignore[operator]
        except PermissionError:
            return True
        return False

    return as_user(uid, attempt, groups=groups)


def opened(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def test_modes_decide(box: Sandbox) -> None:
    low = box.lower().file("private", "x", mode=0o600, owner=(ALICE, ALICE)).file("group", "x", 0o660, (0, 50))
    low.dir("closed", mode=0o700).file("closed/f", "x", mode=0o666).dir("closed", mode=0o700)
    low.file("readable", "x", mode=0o644)
    with box.mount():
        assert not refused(ALICE, opened, box.at("private"), os.O_RDWR)
        assert refused(BOB, opened, box.at("private"), os.O_RDONLY)
        assert refused(BOB, opened, box.at("group"), os.O_RDWR)
        assert not refused(BOB, opened, box.at("group"), os.O_RDWR, groups=(50,))
        assert refused(BOB, os.stat, box.at("closed/f"))
        assert refused(BOB, opened, box.at("readable"), os.O_RDWR)
        assert refused(BOB, os.chmod, box.at("readable"), 0o777)
        assert refused(BOB, os.unlink, box.at("readable"))
        assert refused(BOB, os.mkdir, box.at("new"))
        assert refused(BOB, os.rename, box.at("readable"), box.at("x"))
        assert not refused(ALICE, os.chmod, box.at("private"), 0o640)


def test_sticky_directories(box: Sandbox) -> None:
    low = box.lower().dir("tmp", mode=0o1777).file("tmp/alice", "x", owner=(ALICE, ALICE), mode=0o666)
    low.dir("tmp", mode=0o1777)
    with box.mount():
        assert refused(BOB, os.unlink, box.at("tmp/alice"))
        assert refused(BOB, os.rename, box.at("tmp/alice"), box.at("tmp/bob"))
        as_user(BOB, lambda: os.mkdir(box.at("tmp/bob")))
        assert os.stat(box.at("tmp/bob")).st_uid == BOB
        assert refused(ALICE, os.rmdir, box.at("tmp/bob"))
        assert not refused(ALICE, os.unlink, box.at("tmp/alice"))
        assert mode(box.at("tmp")) == 0o1777


def test_new_objects_belong_to_the_caller(box: Sandbox) -> None:
    low = box.lower().dir("open", mode=0o777).dir("setgid", mode=0o2777, owner=(0, 50))
    assert low
    os.chmod(low.at("setgid"), 0o2777)

    def make() -> None:
        for d in ("open", "setgid"):
            os.close(os.open(box.at(d + "/f"), os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(box.at(d + "/d"))
            os.symlink("x", box.at(d + "/l"))
            os.mkfifo(box.at(d + "/p"))

    with box.mount():
        old = os.umask(0o027)
        try:
            as_user(ALICE, make)
        finally:
            os.umask(old)
        for name in ("f", "d", "l", "p"):
            st = os.lstat(box.at("open/" + name))
            assert (st.st_uid, st.st_gid) == (ALICE, ALICE)
            st = os.lstat(box.at("setgid/" + name))
            assert (st.st_uid, st.st_gid) == (ALICE, 50)
        assert mode(box.at("open/f")) == 0o640
        assert mode(box.at("open/d")) == 0o750
        assert mode(box.at("setgid/d")) == 0o2750
    box.assert_kernel_agrees()


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("how", ["write", "truncate", "open_truncate", "chown_root", "chown_owner"])
@pytest.mark.parametrize("options", [(), ("writeback=0", "passthrough=0")], ids=["", "uncached"])
def test_setuid_bits_and_capabilities_go_when_they_must(
    box: Sandbox, where: str, how: str, options: tuple[str, ...]
) -> None:
    low = box.lower().file("f", "content", mode=0o6777, owner=(ALICE, ALICE))
    low.xattr("f", "security.capability", CAPABILITY)
    os.chmod(low.at("f"), 0o6777)
    with box.mount(*options):
        path = box.at("f")
        if where == "upper":
            os.setxattr(path, "user.k", b"v")
            assert mode(path) == 0o6777
            assert os.getxattr(path, "security.capability") == CAPABILITY

        def change() -> None:
            if how == "write":
                with open(path, "r+b") as f:
                    f.write(b"x")
            elif how == "truncate":
                os.truncate(path, 1)
            elif how == "open_truncate":
                with open(path, "wb"):
                    pass
            else:
                os.chown(path, -1, ALICE)

        if how == "chown_root":
            os.chown(path, 0, 0)
        elif how == "chown_owner":
            as_user(ALICE, change)
        else:
            as_user(BOB, change)
        assert mode(path) == 0o777, oct(mode(path))
        assert "security.capability" not in os.listxattr(path)
    assert stat.S_IMODE(os.stat(box.in_upper("f")).st_mode) == 0o777
    box.assert_kernel_agrees()


def test_roots_writes_keep_setuid_bits(box: Sandbox) -> None:
    low = box.lower().file("f", "content")
    os.chmod(low.at("f"), 0o6755)
    with box.mount():
        with open(box.at("f"), "r+b") as f:
            f.write(b"x")
        assert mode(box.at("f")) == 0o6755
        os.truncate(box.at("f"), 2)
        assert mode(box.at("f")) == 0o6755
    box.assert_kernel_agrees()


def test_chmod_by_a_stranger_to_the_group_clears_setgid(box: Sandbox) -> None:
    box.lower().file("f", "x", owner=(ALICE, 50))
    with box.mount():
        as_user(ALICE, lambda: os.chmod(box.at("f"), 0o2755))
        assert mode(box.at("f")) == 0o755
        as_user(ALICE, lambda: os.chmod(box.at("f"), 0o2755), groups=(50,))
        assert mode(box.at("f")) == 0o2755
    box.assert_kernel_agrees()


def acl(path: str) -> str:
    words = ["getfacl", "-cpEn", path]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def test_acls_decide(box: Sandbox) -> None:
    low = box.lower().file("f", "x", mode=0o600).file("g", "x", mode=0o644)
    subprocess.run(["setfacl", "-m", f"u:{ALICE}:rw", low.at("f")], check=True)
    with box.mount():
        assert not refused(ALICE, opened, box.at("f"), os.O_RDWR)
        assert refused(BOB, opened, box.at("f"), os.O_RDONLY)
        subprocess.run(["setfacl", "-m", f"u:{BOB}:---", box.at("g")], check=True)
        assert refused(BOB, opened, box.at("g"), os.O_RDONLY)
        assert not refused(ALICE, opened, box.at("g"), os.O_RDONLY)
        os.chmod(box.at("f"), 0o640)
        assert "mask::r--" in acl(box.at("f"))
        subprocess.run(["setfacl", "-b", box.at("g")], check=True)
        assert not refused(BOB, opened, box.at("g"), os.O_RDONLY)
        subprocess.run(["setfacl", "-m", "g::rwx", box.at("g")], check=True)
        assert mode(box.at("g")) == 0o674
    box.assert_kernel_agrees()


def test_default_acls_are_inherited(box: Sandbox) -> None:
    low = box.lower().dir("d", mode=0o777)
    subprocess.run(["setfacl", "-d", "-m", f"u:{ALICE}:rwx,g::r-x,o::---", low.at("d")], check=True)

    def make() -> None:
        os.close(os.open(box.at("d/f"), os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(box.at("d/sub"), 0o777)
        os.close(os.open(box.at("d/sub/g"), os.O_CREAT | os.O_WRONLY, 0o640))
        os.mkfifo(box.at("d/p"))
        os.symlink("f", box.at("d/l"))

    def make_unmasked() -> None:
        # Of a mode the kernel applies the umask before it asks us, although a default ACL should replace it.
        os.umask(0)
        make()

    with box.mount():
        os.chmod(box.at("d"), 0o777)
        as_user(BOB, make_unmasked)
        assert f"user:{ALICE}:rwx" in acl(box.at("d/f"))
        assert f"default:user:{ALICE}:rwx" in acl(box.at("d/sub"))
        ours = {n: acl(box.at(n)) for n in ("d/f", "d/sub", "d/sub/g", "d/p")}
    box.fresh_upper("upper2")
    with box.kernel():
        os.chmod(box.at("d"), 0o777)
        as_user(BOB, make_unmasked)
        theirs = {n: acl(box.at(n)) for n in ours}
    assert ours == theirs


def test_noacl_still_mounts(box: Sandbox) -> None:
    box.lower().file("f", "x")
    with box.mount("noacl"):
        os.chmod(box.at("f"), 0o600)
        assert mode(box.at("f")) == 0o600


def test_id_mappings_go_both_ways(box: Sandbox) -> None:
    """Each triple is container:host:length: host ids on disk are shown as container ids and stored back."""
    box.lower().file("root", "x", owner=(0, 0)).file("user", "x", owner=(100, 200)).file("far", owner=(70_000, 0))
    with box.mount("uidmapping=0:100000:65536", "gidmapping=0:200000:65536"):
        st = os.stat(box.at("root"))
        assert (st.st_uid, st.st_gid) == (100_000, 200_000)
        st = os.stat(box.at("user"))
        assert (st.st_uid, st.st_gid) == (100_100, 200_200)
        assert os.stat(box.at("far")).st_uid == 65534
        os.chown(box.at("user"), 100_001, 200_002)
        st = os.stat(box.at("user"))
        assert (st.st_uid, st.st_gid) == (100_001, 200_002)
        os.chmod(box.at("root"), 0o600)
        assert os.stat(box.at("root")).st_uid == 100_000
        os.chmod(box.target, 0o777)
        as_user(100_005, lambda: os.mkdir(box.at("new")), gid=200_006)
        assert os.stat(box.at("new")).st_uid == 100_005
    st = os.stat(box.in_upper("user"))
    assert (st.st_uid, st.st_gid) == (1, 2)
    assert os.stat(box.in_upper("root")).st_uid == 0
    st = os.stat(box.in_upper("new"))
    assert (st.st_uid, st.st_gid) == (5, 6)


def test_a_caller_outside_of_the_mapping_is_stored_unchanged(box: Sandbox) -> None:
    """[uidmap]: podman --uidmap makes files as the host's root; the container's root must be able to open them."""
    box.lower().file("f", "x")
    with box.mount("uidmapping=:0:200000:65536", "gidmapping=:0:200000:65536"):
        with open(box.at("made"), "w") as f:
            f.write("by the engine")
        assert os.stat(box.at("made")).st_uid == 200_000
        assert not refused(200_000, opened, box.at("made"), os.O_RDWR)
    assert os.stat(box.in_upper("made")).st_uid == 0


def test_acl_ids_are_mapped(box: Sandbox) -> None:
    low = box.lower().file("f", "x", mode=0o600)
    subprocess.run(["setfacl", "-m", "u:5:rw", low.at("f")], check=True)
    with box.mount("uidmapping=0:100000:65536", "gidmapping=0:100000:65536"):
        assert "user:100005:rw-" in acl(box.at("f"))
        subprocess.run(["setfacl", "-m", "u:100006:r", box.at("f")], check=True)
        assert not refused(100_006, opened, box.at("f"), os.O_RDONLY)
        assert refused(100_007, opened, box.at("f"), os.O_RDONLY)
    assert "user:6:r--" in acl(box.in_upper("f"))


@pytest.mark.parametrize(
    ("options", "shown"),
    [(("squash_to_root",), (0, 0)), (("squash_to_uid=5", "squash_to_gid=6"), (5, 6)), (("squash_to_uid=7",), None)],
)
def test_squash(box: Sandbox, options: tuple[str, ...], shown: tuple[int, int] | None) -> None:
    box.lower().file("f", "x", owner=(ALICE, BOB)).dir("d", owner=(BOB, ALICE))
    with box.mount(*options):
        if shown is None:
            assert {e.uid for e in snapshot(box.target).values()} == {7}
            return
        assert {(e.uid, e.gid) for e in snapshot(box.target).values()} == {shown}
        os.chown(box.at("f"), 1, 2)  # without effect, but no error
        with open(box.at("new"), "w"):
            pass
        assert {(e.uid, e.gid) for e in snapshot(box.target).values()} == {shown}


@pytest.mark.parametrize("options", [(), ("writeback=0", "passthrough=0")], ids=["", "uncached"])
def test_root_writes_without_taking_setuid_away(box: Sandbox, options: tuple[str, ...]) -> None:
    """A write takes capabilities whoever writes; setuid and setgid stay when it is root."""
    low = box.lower().file("f", "content", mode=0o6711)
    low.xattr("f", "security.capability", CAPABILITY)
    os.chmod(low.at("f"), 0o6711)
    with box.mount(*options):
        with open(box.at("f"), "ab") as f:
            f.write(b"x")
        assert mode(box.at("f")) == 0o6711
        assert "security.capability" not in os.listxattr(box.at("f"))
    box.assert_kernel_agrees()


@pytest.mark.parametrize("uid", [0, ALICE])
def test_a_change_of_owner_that_changes_nothing_takes_setuid(box: Sandbox, uid: int) -> None:
    box.lower().file("f", "content", mode=0o6711, owner=(ALICE, ALICE))
    with box.mount():
        as_user(uid, lambda: os.chown(box.at("f"), -1, -1))
        assert mode(box.at("f")) == 0o711
    box.assert_kernel_agrees()


def test_suid_programs_run_with_their_owners_rights(box: Sandbox) -> None:
    low = box.lower()
    with open("/usr/bin/id", "rb") as f:
        low.file("id", f.read(), mode=0o755, owner=(ALICE, ALICE))
    os.chmod(low.at("id"), 0o4755)
    with box.mount():
        out = as_user(BOB, lambda: subprocess.run([box.at("id"), "-u"], capture_output=True, text=True, check=True))
        assert out.stdout.strip() == str(ALICE)


def test_xattr_permissions_keep_owner_and_mode_aside(box: Sandbox) -> None:
    """``force_mask`` of containers/storage: the real ids are in an attribute, the files all belong to one user."""
    low = box.lower().dir("d").file("d/f", "x", mode=0o755)
    for path, value in (("", b"0:0:0755:dir"), ("d", b"12:34:1700:dir"), ("d/f", b"56:78:4711:file")):
        os.setxattr(low.at(path) if path else low.root, "user.containers.override_stat", value)
    with box.mount("xattr_permissions=2"):
        st = os.stat(box.at("d"))
        assert (st.st_uid, st.st_gid, mode(box.at("d"))) == (12, 34, 0o1700)
        st = os.stat(box.at("d/f"))
        assert (st.st_uid, st.st_gid, mode(box.at("d/f"))) == (56, 78, 0o4711)
        os.chown(box.at("d/f"), 99, 98)
        os.chmod(box.at("d/f"), 0o640)
        st = os.stat(box.at("d/f"))
        assert (st.st_uid, st.st_gid, mode(box.at("d/f"))) == (99, 98, 0o640)
        assert os.listxattr(box.at("d/f")) == []
    assert os.stat(box.in_upper("d/f")).st_uid == 0
    assert os.getxattr(box.in_upper("d/f"), "user.containers.override_stat").startswith(b"99:98:0640")
