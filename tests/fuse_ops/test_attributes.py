"""Owners as the mount shows them: id maps, squashing, overrides in attributes, ids in ACLs."""

from __future__ import annotations

import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.tree.attributes import Override, Ownership, format_override, parse_override
from unionfs.overlay.idmap import OVERFLOW_ID, IdMap, IdRange

CONTAINER = IdMap([IdRange(container=0, host=200_000, count=1000), IdRange(container=5000, host=5000, count=10)])


def test_ids_are_mapped_both_ways() -> None:
    assert CONTAINER.to_mount_id(0) == 200_000
    assert CONTAINER.to_mount_id(999) == 200_999
    assert CONTAINER.to_mount_id(5009) == 5009
    assert CONTAINER.to_layer_id(200_999) == 999


def test_ids_outside_of_the_map() -> None:
    assert CONTAINER.to_mount_id(1000) == OVERFLOW_ID
    assert CONTAINER.to_layer_id(0) == 0, "the engine's own root must find again what it stores"


@given(st.integers(0, 2**32 - 2))
def test_an_empty_map_changes_nothing(owner: int) -> None:
    assert IdMap().to_mount_id(owner) == IdMap().to_layer_id(owner) == owner


def test_squash_beats_the_map() -> None:
    ownership = Ownership(MountOptions(lowerdirs=("/",), uid_map=CONTAINER, gid_map=CONTAINER, squash_uid=7))
    assert ownership.to_mount_ids(5, 6) == (7, 200_006)
    assert ownership.to_layer_ids(-1, 200_001) == (-1, 1)


KINDS = st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK])
DEVICES = st.sampled_from([stat.S_IFCHR, stat.S_IFBLK])


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 0o7777), KINDS)
def test_override_round_trip(uid: int, gid: int, mode: int, kind: int) -> None:
    override = Override(uid, gid, mode | kind)
    assert parse_override(format_override(override)) == override


@given(DEVICES, st.integers(0, 511), st.integers(0, 2**20 - 1))
def test_override_of_a_device_round_trip(kind: int, major: int, minor: int) -> None:
    override = Override(1, 2, 0o640 | kind, os.makedev(major, minor))
    assert parse_override(format_override(override)) == override


def test_overrides_of_containers_storage() -> None:
    assert parse_override(b"0:0:0755") == Override(0, 0, 0o755)
    assert parse_override(b"10:20:0644:file\0") == Override(10, 20, 0o644 | stat.S_IFREG)
    assert parse_override(b"0:0:0600:block-8-1") == Override(0, 0, 0o600 | stat.S_IFBLK, os.makedev(8, 1))


@pytest.mark.parametrize("value", [b"", b"0:0", b"a:0:0755", b"0:0:999", b"0:0:0755:thing", b"0:0:0755:char-1"])
def test_damaged_overrides_are_not_believed(value: bytes) -> None:
    assert parse_override(value) is None


def test_acl_ids_are_mapped_and_others_kept() -> None:
    ownership = Ownership(MountOptions(lowerdirs=("/",), uid_map=CONTAINER, gid_map=CONTAINER))
    header = struct.pack("<I", 2)
    entries = [(0x01, 7, 0xFFFFFFFF), (0x02, 6, 5), (0x08, 4, 9), (0x10, 7, 0xFFFFFFFF)]
    stored = header + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    shown = ownership.map_acl(stored, to_disk=False)
    assert struct.unpack_from("<HHI", shown, 12) == (0x02, 6, 200_005)
    assert struct.unpack_from("<HHI", shown, 20) == (0x08, 4, 200_009)
    assert struct.unpack_from("<HHI", shown, 4) == (0x01, 7, 0xFFFFFFFF)
    assert ownership.map_acl(shown, to_disk=True) == stored
    with pytest.raises(OSError, match="malformed"):
        ownership.map_acl(stored[:-1], to_disk=True)
