"""Extended attributes: flags, limits, and how overlayfs' own are hidden and escaped."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys

import pytest

from tests.support.mounts import mounted_overlay
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def box_with_file(box: Sandbox) -> Sandbox:
    box.lower().file("f", "x").xattr("f", "user.low", b"1").dir("d").symlink("l", "f")
    return box


def error_of(call: object, *args: object) -> str | None:
    try:
        call(*args)  # type: ignore[operator]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


def test_create_and_replace_flags(box_with_file: Sandbox) -> None:
    box = box_with_file
    with box.mount():
        for name in ("f", "d"):
            path = box.at(name)
            assert error_of(os.setxattr, path, "user.x", b"1", os.XATTR_REPLACE) == "ENODATA"
            os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
            assert error_of(os.setxattr, path, "user.x", b"2", os.XATTR_CREATE) == "EEXIST"
            os.setxattr(path, "user.x", b"2", os.XATTR_REPLACE)
            assert os.getxattr(path, "user.x") == b"2"
        assert error_of(os.setxattr, box.at("f"), "user.low", b"2", os.XATTR_CREATE) == "EEXIST"
        os.setxattr(box.at("f"), "user.low", b"2", os.XATTR_REPLACE)
        assert error_of(os.removexattr, box.at("f"), "user.none") == "ENODATA"
        assert error_of(os.getxattr, box.at("f"), "user.none") == "ENODATA"
        os.removexattr(box.at("f"), "user.low")
        assert os.listxattr(box.at("f")) == ["user.x"]
    box.assert_kernel_agrees()


def test_removing_what_is_not_there_copies_nothing_up(box_with_file: Sandbox) -> None:
    box = box_with_file
    with box.mount():
        assert error_of(os.removexattr, box.at("f"), "user.none") == "ENODATA"
    assert os.listdir(box.in_upper()) == []


def test_limits_are_those_of_the_upper_file_system(box_with_file: Sandbox) -> None:
    box = box_with_file
    cases = [
        ("user.empty", b""),
        ("user.small", b"x" * 100),
        ("user.page", b"x" * 3000),
        ("user.big", b"x" * 65536),
        ("user.huge", b"x" * 65537),
        ("user." + "n" * 250, b"v"),
        ("user." + "n" * 251, b"v"),
        ("bad.name", b"v"),
        ("user.", b"v"),
        ("system.unknown", b"v"),
        ("trusted.t", b"v"),
        ("security.s", b"v"),
    ]
    reference = os.path.join(box.root, "reference")
    with open(reference, "w"):
        pass
    with box.mount():
        for name, value in cases:
            expected = error_of(os.setxattr, reference, name, value)
            assert error_of(os.setxattr, box.at("f"), name, value) == expected, name
            if expected is None:
                assert os.getxattr(box.at("f"), name) == value
                os.removexattr(reference, name)
                os.removexattr(box.at("f"), name)


def test_many_attributes_are_all_listed(box_with_file: Sandbox) -> None:
    box = box_with_file
    names = sorted(f"user.attribute{n:03}" for n in range(60))
    with box.mount():
        for name in names:
            os.setxattr(box.at("d"), name, name.encode())
        assert sorted(os.listxattr(box.at("d"))) == names
    with box.mount():
        assert sorted(os.listxattr(box.at("d"))) == names
        assert {os.getxattr(box.at("d"), n) for n in names} == {n.encode() for n in names}


def test_too_small_a_buffer_is_erange(box_with_file: Sandbox) -> None:
    import ctypes

    box = box_with_file
    libc = ctypes.CDLL(None, use_errno=True)
    with box.mount():
        os.setxattr(box.at("f"), "user.x", b"12345")
        path = os.fsencode(box.at("f"))
        buffer = ctypes.create_string_buffer(100)
        assert libc.getxattr(path, b"user.x", buffer, 0) == 5
        assert libc.getxattr(path, b"user.x", buffer, 5) == 5
        assert libc.getxattr(path, b"user.x", buffer, 4) == -1
        assert ctypes.get_errno() == errno.ERANGE
        size = sum(len(name) + 1 for name in os.listxattr(path))
        assert libc.listxattr(path, buffer, 0) == libc.listxattr(path, buffer, size) == size
        assert libc.listxattr(path, buffer, size - 1) == -1
        assert ctypes.get_errno() == errno.ERANGE


def test_overlays_own_attributes_are_hidden(box: Sandbox) -> None:
    box.lower().file("d/old").file("merged/x").file("e/f", "x")
    with box.mount("redirect_dir=on", "metacopy=on"):
        os.rename(box.at("d"), box.at("moved"))
        os.mkdir(box.at("d"))
        os.chmod(box.at("e/f"), 0o600)
        os.rename(box.at("e/f"), box.at("merged/f"))
        for path in (".", "moved", "d", "merged", "merged/f", "merged/x", "e"):
            assert os.listxattr(box.at(path)) == [], path
            for name in ("opaque", "redirect", "origin", "impure", "metacopy"):
                assert error_of(os.getxattr, box.at(path), "trusted.overlay." + name) == "ENODATA"
    assert any(n.startswith("trusted.overlay.") for n in os.listxattr(box.in_upper("moved")))


def test_overlay_attributes_of_clients_are_escaped(box_with_file: Sandbox) -> None:
    """What a nested overlay stores through us is kept under one more ``overlay.``, as the kernel does."""
    box = box_with_file
    with box.mount():
        for name in ("opaque", "redirect", "x", "overlay.deeper"):
            os.setxattr(box.at("d"), "trusted.overlay." + name, b"v")
            assert os.getxattr(box.at("d"), "trusted.overlay." + name) == b"v"
            assert "trusted.overlay." + name in os.listxattr(box.at("d"))
        os.removexattr(box.at("d"), "trusted.overlay.x")
        assert error_of(os.getxattr, box.at("d"), "trusted.overlay.x") == "ENODATA"
    stored = {n for n in os.listxattr(box.in_upper("d")) if n.startswith("trusted.overlay.overlay.")}
    assert stored == {"trusted.overlay.overlay." + n for n in ("opaque", "redirect", "overlay.deeper")}
    box.assert_kernel_agrees()


def test_escaped_attributes_of_layers_are_shown_unescaped(box: Sandbox) -> None:
    low = box.lower().dir("d").file("d/f")
    low.xattr("d", "trusted.overlay.overlay.opaque", b"y").xattr("d/f", "trusted.overlay.overlay.overlay.x", b"z")
    box.lower().file("d/below")
    with box.mount():
        assert os.getxattr(box.at("d"), "trusted.overlay.opaque") == b"y"
        assert os.path.exists(box.at("d/below")), "an escaped mark is not ours"
        assert os.getxattr(box.at("d/f"), "trusted.overlay.overlay.x") == b"z"
        os.utime(box.at("d/f"), ns=(1, 1))
        assert os.getxattr(box.at("d/f"), "trusted.overlay.overlay.x") == b"z"
    box.assert_kernel_agrees()


def test_a_union_of_a_union(box: Sandbox) -> None:
    """The outer mount's directories as layers of an inner union: whiteouts and marks stay apart."""
    from tests.support.mounts import mounted_union

    box.lower().file("image/d/old", "o").file("image/f", "f")
    with box.mount():
        for name in ("upper", "work", "mnt"):
            os.mkdir(box.at(name))
        inner_mnt = box.at("mnt")
        with mounted_union([box.at("image")], box.at("upper"), box.at("work"), inner_mnt):
            os.rename(inner_mnt + "/d", inner_mnt + "/moved")
            os.mkdir(inner_mnt + "/d")
            os.chmod(inner_mnt + "/f", 0o600)
            assert os.listdir(inner_mnt + "/d") == []
            assert os.listdir(inner_mnt + "/moved") == ["old"]
        with mounted_union([box.at("image")], box.at("upper"), box.at("work"), inner_mnt):
            assert os.listdir(inner_mnt + "/d") == []
            assert os.listdir(inner_mnt + "/moved") == ["old"]
            assert sorted(os.listdir(inner_mnt)) == ["d", "f", "moved"]


def test_our_mount_as_lower_of_the_kernels_overlay(box: Sandbox) -> None:
    box.lower().file("image/d/f", "f").file("image/g", "g").symlink("image/l", "g")
    upper, work, target = (box.new_dir("kernel_" + n) for n in ("upper", "work", "mnt"))
    with box.mount(), mounted_overlay([box.at("image")], upper, work, target):
        assert sorted(os.listdir(target)) == ["d", "g", "l"]
        with open(target + "/d/f", "a") as f:
            f.write("more")
        os.unlink(target + "/g")
        with open(target + "/d/f") as f:
            assert f.read() == "fmore"
        assert not os.path.lexists(target + "/g")


def test_noxattrs_refuses_them(box_with_file: Sandbox) -> None:
    box = box_with_file
    with box.mount("noxattrs"):
        assert error_of(os.setxattr, box.at("f"), "user.x", b"1") == errno.errorcode[errno.EOPNOTSUPP]
        os.chmod(box.at("f"), 0o600)


def test_capabilities_of_a_new_file(box: Sandbox) -> None:
    """It has none, which is known without looking, until it is given some."""
    box.lower()
    capability = struct.pack("<5I", 0x0200_0000, 1 << 10, 0, 0, 0)
    with box.mount():
        with open(box.at("new"), "w") as file:
            file.write("#")
        with pytest.raises(OSError, match="No data"):
            os.getxattr(box.at("new"), "security.capability")
        os.setxattr(box.at("new"), "security.capability", capability)
        os.link(box.at("new"), box.at("second"))
        assert os.getxattr(box.at("second"), "security.capability") == capability
        os.chown(box.at("new"), 1, 1)  # takes them away
        with pytest.raises(OSError, match="No data"):
            os.getxattr(box.at("second"), "security.capability")
        os.setxattr(box.at("new"), "security.capability", capability)
    with box.mount():
        assert os.getxattr(box.at("new"), "security.capability") == capability
    box.assert_kernel_agrees()


LIST = "import os, sys; print(*sorted(os.listxattr(sys.argv[1])))"
WITHOUT_PRIVILEGE = {
    "root": [],
    "root of a container": ["setpriv", "--bounding-set=-sys_admin"],
    "root of a user namespace": ["unshare", "--user", "--map-root-user"],
    "user": ["setpriv", "--reuid=65534", "--clear-groups"],
}


def test_trusted_attributes_are_listed_for_who_may_read_them(box: Sandbox) -> None:
    """That is CAP_SYS_ADMIN, and not user 0."""
    box.lower().file("f", b"text").xattr("f", "trusted.t", b"1").xattr("f", "user.u", b"1")

    def listed() -> dict[str, str]:
        found = {}
        for who, words in WITHOUT_PRIVILEGE.items():
            command = [*words, sys.executable, "-c", LIST, box.at("f")]
            found[who] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return found

    with box.kernel():
        expected = listed()
    assert expected.pop("root") == "trusted.t user.u\n"
    assert set(expected.values()) == {"user.u\n"}
    box.fresh_upper("again")
    with box.mount():
        assert listed() == expected | {"root": "trusted.t user.u\n"}
