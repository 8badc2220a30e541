"""Archives made from directories and change lists: moby's tests by name, exact headers, reproducibility."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import stat
import struct
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.archive.trees import opaque, whiteout, write
from unionfs.archive.changes import Change, ChangeKind, changes_of_trees, changes_of_upper
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.pack import PackOptions, XattrSelection, pack_changes, pack_tree
from unionfs.archive.stream import PieceStream
from unionfs.archive.tar_format import TarEntry, encode_entry
from unionfs.archive.tar_reader import TarReader
from unionfs.errors import ArchiveError
from unionfs.overlay.idmap import IdRange

CAPABILITY_2 = bytes.fromhex("0100000200200000000000000000000000000000")
CAPABILITY_3 = bytes.fromhex("0100000300200000000000000000000000000000e8030000")


def tar(pieces: Iterator[bytes]) -> bytes:
    return b"".join(pieces)


def entries(archive: bytes) -> list[TarEntry]:
    return list(TarReader(io.BytesIO(archive)))


def names(archive: bytes) -> list[bytes]:
    return [entry.name for entry in entries(archive)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_order_of_a_tree_and_of_changes(root: Path) -> None:
    for name in ("a/x", "a-b", "a.d/y"):
        write(root / name, "1")
    assert names(tar(pack_tree(str(root)))) == [b"a/", b"a/x", b"a-b", b"a.d/", b"a.d/y"]
    changes = changes_of_trees(str(root), None)
    assert names(tar(pack_changes(changes))) == [b"a/", b"a-b", b"a.d/", b"a.d/y", b"a/x"]


def test_same_tree_same_bytes(tmp_path: Path, root: Path) -> None:
    for i in (3, 1, 2):
        write(root / f"d{i}/file", str(i), mtime=1000.5)
        os.utime(root / f"d{i}", (1000, 1000))
    other = tmp_path / "other"
    subprocess.run(["cp", "-a", root, other], check=True)
    os.utime(other / "d1/file", (7, 1000))  # the access time is no part of it
    assert tar(pack_tree(str(root))) == tar(pack_tree(str(other)))


def test_header_bytes_are_those_of_gos_writer(root: Path) -> None:
    """Taken apart field by field (Go: octal fields with a NUL, names of owners empty, devices zero)."""
    write(root / "file", "hello", mode=0o4755, mtime=1500000000.75)
    os.chown(root / "file", 1000, 1001)
    (root / "file").chmod(0o4755)
    archive = tar(pack_tree(str(root)))
    block = archive[:512]
    assert block[:100].rstrip(b"\0") == b"file"
    assert block[100:108] == b"0004755\0"
    assert block[108:116] == b"0001750\0"
    assert block[116:124] == b"0001751\0"
    assert block[124:136] == b"00000000005\0"
    assert block[136:148] == b"%011o\0" % 1500000000
    assert block[148:156] == b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    assert block[156:157] == b"0"
    assert block[257:265] == b"ustar\x0000"
    assert block[265:329] == bytes(64)
    assert block[329:345] == b"0000000\x000000000\0"
    assert archive[512:] == b"hello".ljust(512, b"\0") + bytes(1024)


def test_empty_directory_is_the_empty_layer(root: Path) -> None:
    digest = hashlib.sha256(tar(pack_tree(str(root)))).hexdigest()
    assert digest == "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


@pytest.mark.parametrize(
    ("entry", "records"),
    [
        (TarEntry(b"p" * 100), b""),
        (TarEntry(b"d/" * 20 + b"x" * 90), b""),  # fits ustar's prefix and name
        (TarEntry(b"p" * 101), b"111 path=" + b"p" * 101 + b"\n"),
        (TarEntry(b"\xc3\xa9"), b"11 path=\xc3\xa9\n"),
        (TarEntry(b"\xff"), b"9 path=\xff\n"),
        (TarEntry(b"a", uid=0o10000000), b"15 uid=2097152\n"),
        (TarEntry(b"a", mtime_ns=-1), b"12 mtime=-1\n"),
        (TarEntry(b"a", size=1 << 33), b"19 size=8589934592\n"),
        (TarEntry(b"a", kind=b"2", linkname=b"l" * 101), b"115 linkpath=" + b"l" * 101 + b"\n"),
        (
            TarEntry(b"a", gid=2097152, xattrs={"user.b": b"\0\n", "security.capability": b"x"}),
            b"38 SCHILY.xattr.security.capability=x\n26 SCHILY.xattr.user.b=\0\n\n15 gid=2097152\n",
        ),
    ],
)
def test_pax_records(entry: TarEntry, records: bytes) -> None:
    encoded = encode_entry(entry)
    if not records:
        assert len(encoded) == 512
        return
    assert encoded[156:157] == b"x"
    size = int(encoded[124:135], 8)
    found = encoded[512 : 512 + size]
    assert found == records


def test_long_name_of_the_pax_header_itself() -> None:
    encoded = encode_entry(TarEntry(b"dir/sub/\xff" + b"n" * 120))
    assert encoded[:100].rstrip(b"\0") == (b"dir/sub/PaxHeaders.0/" + b"n" * 120)[:100]


def test_python_reads_what_we_write(root: Path) -> None:
    write(root / ("long" * 60), "x")
    os.setxattr(root / ("long" * 60), "security.capability", CAPABILITY_2)
    os.symlink("t" * 150, root / "link")
    with tarfile.open(fileobj=io.BytesIO(tar(pack_tree(str(root)))), errorlevel=2) as archive:
        assert sorted(archive.getnames()) == sorted(["link", "long" * 60])
        assert archive.getmember("link").linkname == "t" * 150


def test_tar_with_hard_link(root: Path) -> None:
    """TestTarWithHardLink: the first name carries the data."""
    write(root / "b", "data")
    os.link(root / "b", root / "a")
    (root / "c").mkdir()
    os.link(root / "b", root / "c/d")
    found = entries(tar(pack_tree(str(root))))
    assert [(e.name, e.kind, e.linkname, e.size) for e in found if e.kind != b"5"] == [
        (b"a", b"0", b"", 4),
        (b"b", b"1", b"a", 0),
        (b"c/d", b"1", b"a", 0),
    ]


def test_hard_link_order(tmp_path: Path) -> None:
    """TestHardLinkOrder: a change list in any order gives the same hard links."""
    old, new = tmp_path / "old", tmp_path / "new"
    for base in (old, new):
        for name in ("file1", "file2", "file3"):
            write(base / name, "1", mtime=1000)
    write(new / "file1", "two", mtime=1000)
    for i in (3, 1, 2):
        os.link(new / "file1", new / f"link{i}")
    changes = list(changes_of_trees(str(new), str(old)))
    forward = tar(pack_changes(changes))
    assert tar(pack_changes(changes[::-1])) == forward
    assert [e.linkname for e in entries(forward) if e.kind == b"1"] == [b"file1"] * 3


def test_changes_out_of_order_are_refused_from_an_iterator(root: Path) -> None:
    write(root / "a")
    write(root / "b")
    changes = list(changes_of_trees(str(root), None))
    with pytest.raises(ArchiveError, match="path order"):
        tar(pack_changes(iter(changes[::-1])))


def test_tar_with_block_char_fifo(root: Path) -> None:
    """TestTarWithBlockCharFifo"""
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    os.mknod(root / "char", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    os.mkfifo(root / "fifo")
    found = {e.name: (e.kind, e.major, e.minor) for e in entries(tar(pack_tree(str(root))))}
    assert found == {b"block": (b"4", 8, 1), b"char": (b"3", 300, 70000), b"fifo": (b"6", 0, 0)}


def test_sockets_are_skipped_with_a_log_line(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "socket"))
    write(root / "z")
    assert names(tar(pack_tree(str(root)))) == [b"z"]
    assert "socket" in caplog.text


def test_xattrs(root: Path) -> None:
    """TestTarUntarWithXattr's first half: only the capability, and in its portable revision."""
    for name, value in (("2", CAPABILITY_2), ("3", CAPABILITY_3)):
        write(root / name)
        os.setxattr(root / name, "security.capability", value)
        os.setxattr(root / name, "user.note", b"n")
        os.setxattr(root / name, "trusted.overlay.origin", b"o")
    found = {e.name: e.xattrs for e in entries(tar(pack_tree(str(root))))}
    two = struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0)
    assert two == CAPABILITY_2
    assert found == {b"2": {"security.capability": two}, b"3": {"security.capability": two}}
    everything = {e.name: e.xattrs for e in entries(tar(pack_tree(str(root), PackOptions(xattrs=XattrSelection.ALL))))}
    assert everything[b"2"] == {"security.capability": two, "user.note": b"n"}


def test_overlay_layer_becomes_aufs_form(root: Path) -> None:
    """TestOverlayTarUntar's first half: names, modes, no records."""
    opaque(root / "d1")
    (root / "d1").chmod(0o700)
    write(root / "d1/f1", "x")
    opaque(root / "d2")
    (root / "d2").chmod(0o750)
    write(root / "d2/f1", "x")
    whiteout(root / "d3/f1")
    archive = tar(pack_tree(str(root), PackOptions(convert_whiteouts=True)))
    assert [(e.name, e.mode, e.kind) for e in entries(archive)] == [
        (b"d1/", 0o700, b"5"),
        (b"d1/.wh..wh..opq", 0o700, b"0"),
        (b"d1/f1", 0o644, b"0"),
        (b"d2/", 0o750, b"5"),
        (b"d2/.wh..wh..opq", 0o750, b"0"),
        (b"d2/f1", 0o644, b"0"),
        (b"d3/", 0o755, b"5"),
        (b"d3/.wh.f1", 0o600, b"0"),
    ]
    assert b"PaxHeaders" not in archive
    assert all(e.major == 0 and e.minor == 0 for e in entries(archive))


def test_without_conversion_a_whiteout_is_a_device(root: Path) -> None:
    whiteout(root / "f")
    assert [(e.name, e.kind) for e in entries(tar(pack_tree(str(root))))] == [(b"f", b"3")]


@pytest.mark.parametrize("xattr", ["redirect", "metacopy"])
def test_contents_in_other_layers_are_refused(root: Path, xattr: str) -> None:
    write(root / "d/file")
    os.setxattr(root / ("d" if xattr == "redirect" else "d/file"), f"trusted.overlay.{xattr}", b"/x")
    with pytest.raises(ArchiveError, match=r"d.*pack its changes"):
        tar(pack_tree(str(root), PackOptions(convert_whiteouts=True)))


def test_changes_carry_redirected_and_metadata_only_contents(tmp_path: Path, root: Path) -> None:
    lower = tmp_path / "lower"
    write(lower / "usr/file", "from below")
    write(lower / "etc/conf", "data")
    (root / "opt").mkdir()
    os.setxattr(root / "opt", "trusted.overlay.redirect", b"/usr")
    whiteout(root / "usr")
    write(root / "etc/conf", bytes(4), mode=0o600)
    os.setxattr(root / "etc/conf", "trusted.overlay.metacopy", b"")
    archive = tar(pack_changes(changes_of_upper(str(root), [str(lower)])))
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        assert found.getnames() == ["etc", "etc/conf", "opt", "opt/file", ".wh.usr"]
        assert found.extractfile("opt/file").read() == b"from below"  # type: ignore[union-attr]
        assert found.extractfile("etc/conf").read() == b"data"  # type: ignore[union-attr]
        assert found.getmember("etc/conf").mode == 0o600


def test_deletion_is_an_empty_file_of_mode_and_time_zero() -> None:
    (entry,) = entries(tar(pack_changes([Change(b"/a/b", ChangeKind.DELETE)])))
    assert entry == TarEntry(b"a/.wh.b", mode=0)


def test_metadata_only_copy_without_its_data(root: Path) -> None:
    write(root / "f")
    os.setxattr(root / "f", "trusted.overlay.metacopy", b"")
    with pytest.raises(ArchiveError, match="metadata-only"):
        tar(pack_changes(changes_of_upper(str(root), [])))


def test_owners_are_mapped_but_not_of_whiteouts(root: Path) -> None:
    write(root / "f")
    os.chown(root / "f", 100005, 100006)
    write(root / ".wh.x")
    mapping = IdMapping([IdRange(0, 100000, 65536)], [IdRange(0, 100000, 65536)])
    found = {
        e.name: (e.uid, e.gid)
        for e in entries(tar(pack_tree(str(root), PackOptions(to_container=mapping.to_container))))
    }
    assert found == {b"f": (5, 6), b".wh.x": (0, 0)}


def test_unmapped_owner_is_named(root: Path) -> None:
    write(root / "f")
    mapping = IdMapping([IdRange(0, 100000, 65536)])
    with pytest.raises(ArchiveError, match=r"f: host ID 0 cannot be mapped to a container ID.*subuid"):
        tar(pack_tree(str(root), PackOptions(to_container=mapping.to_container)))


def test_owner_for_all(root: Path) -> None:
    write(root / "f")
    assert [(e.uid, e.gid) for e in entries(tar(pack_tree(str(root), PackOptions(owner=(7, 8)))))] == [(7, 8)]


def test_root_entry_on_request(root: Path) -> None:
    root.chmod(0o711)
    (entry,) = entries(tar(pack_tree(str(root), PackOptions(include_root=True))))
    assert (entry.name, entry.mode) == (b"./", 0o711)


def test_sparse_file_is_dense_and_its_holes_are_not_read(root: Path) -> None:
    with open(root / "sparse", "wb") as file:
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(20 << 20)
    (entry,) = entries(archive := tar(pack_tree(str(root))))
    assert entry.size == 20 << 20
    expected = bytes(5 << 20) + b"middle" + bytes((15 << 20) - 6)
    assert archive[512 : 512 + (20 << 20)] == expected


def test_memory_does_not_grow_with_the_contents(root: Path) -> None:
    with open(root / "big", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    tracemalloc.start()
    try:
        for _ in pack_tree(str(root)):
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_file_that_shrinks_is_an_error(root: Path) -> None:
    write(root / "big", os.urandom(3 << 20))
    pieces = pack_tree(str(root))
    next(pieces)
    next(pieces)
    os.truncate(root / "big", 10)
    with pytest.raises(ArchiveError, match=r"big: the file shrank"):
        tar(pieces)


def test_file_that_grows_is_cut_at_its_size(root: Path) -> None:
    write(root / "log", b"1" * 100)
    pieces = pack_tree(str(root))
    header = next(pieces)
    with open(root / "log", "ab") as file:
        file.write(b"2" * 100)
    archive = header + tar(pieces)
    assert len(archive) == 512 * 4
    assert b"2" not in archive[512:]


def test_entry_that_goes_away_is_skipped(root: Path) -> None:
    write(root / "a", "x")
    write(root / "b", "x")
    write(root / "c/d", "x")
    pieces = pack_tree(str(root))
    first = next(pieces)
    os.unlink(root / "b")
    subprocess.run(["rm", "-r", root / "c"], check=True)
    assert names(first + tar(pieces)) == [b"a"]


@pytest.mark.parametrize("after", [1, 4])
def test_symlink_swapped_in_is_not_followed(tmp_path: Path, root: Path, after: int) -> None:
    write(tmp_path / "elsewhere/key", "TOP SECRET")
    write(root / "a", "x")
    write(root / "d/aa", "mine")
    write(root / "d/key", "mine")
    pieces = pack_tree(str(root))
    start = b"".join(next(pieces) for _ in range(after))
    os.rename(root / "d", tmp_path / "moved")
    os.symlink(tmp_path / "elsewhere", root / "d")
    assert b"TOP SECRET" not in start + tar(pieces)


def test_stream(root: Path) -> None:
    write(root / "f", os.urandom(3 << 20))
    stream = io.BufferedReader(PieceStream(pack_tree(str(root))))
    assert stream.read() == tar(pack_tree(str(root)))
    before = len(os.listdir("/proc/self/fd"))
    stream = io.BufferedReader(PieceStream(pack_tree(str(root))))
    stream.read(1 << 20)
    assert len(os.listdir("/proc/self/fd")) > before
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"nowhere.*existing directory"):
        tar(pack_tree(str(tmp_path / "nowhere")))


def test_id_mapping_both_ways() -> None:
    mapping = IdMapping([IdRange(0, 1000, 1), IdRange(1, 100000, 10)], [IdRange(0, 50, 5)])
    assert mapping.to_host(0, 4) == (1000, 54)
    assert mapping.to_host(10, 0) == (100009, 50)
    assert mapping.to_container(100009, 50) == (10, 0)
    assert mapping.root() == (1000, 50)
    assert IdMapping().to_host(5, 6) == (5, 6)
    with pytest.raises(ArchiveError, match="container ID 11 cannot be mapped to a host ID"):
        mapping.to_host(11, 0)
    with pytest.raises(ArchiveError, match="host ID 1001 cannot be mapped to a container ID"):
        mapping.to_container(1001, 50)
