"""The on-disk vocabulary: attribute names, escaping for nesting, origin handles as the kernel writes them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.mounts import mounted_overlay
from unionfs.host.syscalls import FileHandle, file_handle
from unionfs.overlay.format import OverlayXattrs, decode_origin, encode_origin, inode_in_handle


@given(st.binary(min_size=1, max_size=40), st.booleans())
def test_a_program_gets_back_the_name_it_used(suffix: bytes, user: bool) -> None:
    names = OverlayXattrs(user=user)
    for shown in (b"user." + suffix, names.prefix + suffix, names.escape + suffix):
        stored = names.to_stored(shown)
        assert not names.is_private(stored)
        assert names.to_shown(stored) == shown


def test_only_the_own_name_space_is_private() -> None:
    root = OverlayXattrs(user=False)
    assert root.is_private(b"trusted.overlay.opaque")
    assert not root.is_private(b"user.overlay.opaque")
    assert not root.is_private(b"trusted.overlay.overlay.opaque")
    assert OverlayXattrs(user=True).is_private(b"user.overlay.opaque")


@given(st.integers(0, 255), st.binary(min_size=1, max_size=100), st.binary(min_size=16, max_size=16))
def test_origin_round_trip(kind: int, data: bytes, uuid: bytes) -> None:
    assert decode_origin(encode_origin(FileHandle(kind, data), uuid)) == (FileHandle(kind, data), uuid)


def test_values_that_are_no_origin() -> None:
    good = encode_origin(FileHandle(1, b"12345678"), bytes(16))
    assert decode_origin(good) is not None
    assert decode_origin(b"") is None
    assert decode_origin(good[:-1]) is None
    assert decode_origin(b"\1" + good[1:]) is None  # a version to come
    assert decode_origin(good[:3] + b"\4" + good[4:]) is None  # the handle of an upper file
    assert decode_origin(good[:3] + b"\1" + good[4:]) is None  # of a machine with the other byte order


def test_the_origin_is_what_the_kernel_writes(tmp_path: Path) -> None:
    lower, upper, work, target = (tmp_path / n for n in ("lower", "upper", "work", "target"))
    for directory in (lower, upper, work, target):
        directory.mkdir()
    (lower / "f").write_text("x")
    with mounted_overlay([str(lower)], str(upper), str(work), str(target)):
        os.chmod(target / "f", 0o600)
    value = os.getxattr(upper / "f", "trusted.overlay.origin")
    decoded = decode_origin(value)
    assert decoded is not None
    handle, uuid = decoded
    fd = os.open(lower, os.O_RDONLY)
    try:
        assert file_handle(fd, b"f") == handle
    finally:
        os.close(fd)
    assert encode_origin(handle, uuid) == value
    assert inode_in_handle(handle) == os.stat(lower / "f").st_ino


def test_the_inode_number_in_handles_of_other_file_systems(tmp_path: Path) -> None:
    for make in (["mkfs.xfs", "-q"], ["mkfs.btrfs", "-q"], None):
        mount_point = tmp_path / "mnt"
        mount_point.mkdir(exist_ok=True)
        if make is None:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount_point], check=True)
        else:
            image = tmp_path / f"{make[0]}.img"
            with open(image, "wb") as file:
                file.truncate(400 << 20)
            subprocess.run([*make, image], check=True)
            subprocess.run(["mount", "-o", "loop", image, mount_point], check=True)
        try:
            (mount_point / "f").write_text("x")
            fd = os.open(mount_point, os.O_RDONLY)
            try:
                handle = file_handle(fd, b"f")
            finally:
                os.close(fd)
            assert inode_in_handle(handle) == os.stat(mount_point / "f").st_ino, make
        finally:
            subprocess.run(["umount", mount_point], check=True)
    assert inode_in_handle(FileHandle(0x99, b"x" * 8)) is None
