"""Reading archives: every header format, made by GNU tar, Python and by hand; damage is told, never obeyed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.archive.tars import archive, directory, entry
from tests.archive.trees import describe, write
from unionfs.archive.pack import PackOptions, XattrSelection, pack_tree
from unionfs.archive.tar_format import TarEntry, encode_entry
from unionfs.archive.tar_reader import TarReader
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.errors import ArchiveError

KEEP = UnpackOptions(whiteouts=WhiteoutMode.KEEP, include_root=True)
needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")


def read(data: bytes) -> list[tuple[TarEntry, bytes]]:
    reader = TarReader(io.BytesIO(data))
    return [(found, b"".join(reader.contents())) for found in reader]


def patched(block: bytes, at: int, value: bytes) -> bytes:
    """``block`` with a field changed and the checksum made right."""
    block = block[:at] + value + block[at + len(value) :]
    total = sum(block[:148]) + sum(block[156:512]) + 256
    return block[:148] + b"%06o\0 " % total + block[156:]


@pytest.fixture
def odd_tree(tmp_path: Path) -> Path:
    """Everything that two programs should agree about."""
    root = tmp_path / "odd"
    write(root / "plain", "data", mode=0o640, mtime=1234567890)
    write(root / "empty", "")
    write(root / ("n" * 200) / ("m" * 200), "long", mtime=5)
    write(root / "ümlaut", "x")
    with open(os.fsencode(root) + b"/\xff\xfe bytes\n", "wb") as file:
        file.write(b"y")
    os.symlink("t" * 300, root / "symlink")
    os.link(root / "plain", root / "zz-link")
    os.mkfifo(root / "fifo")
    os.mknod(root / "dev", 0o020600, os.makedev(1, 3))
    os.chown(root / "empty", 3_000_000, 4_000_000)
    write(root / "suid", "x")
    (root / "suid").chmod(0o6755)
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    os.setxattr(root / "plain", "user.note", b"v\0\xff")
    os.setxattr(root / "plain", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    with open(root / "sparse", "wb") as file:
        for offset in (1 << 20, 3 << 20, 6 << 20):
            file.seek(offset)
            file.write(b"island")
        file.truncate(8 << 20)
    for base, dirs, files in os.walk(root):
        for name in dirs + files:
            if name not in ("plain",):
                os.utime(os.path.join(base, name), (1000, 1000), follow_symlinks=False)
    return root


@needs_tar
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=gnu", "--sparse"],
        ["--format=posix", "--xattrs", "--xattrs-include=*"],
        ["--format=posix", "--sparse", "--sparse-version=0.0"],
        ["--format=posix", "--sparse", "--sparse-version=0.1"],
        ["--format=posix", "--sparse", "--sparse-version=1.0", "--xattrs"],
        ["--format=posix", "--numeric-owner", "--sort=name"],
    ],
    ids=" ".join,
)
def test_gnu_tar_archives_are_unpacked(tmp_path: Path, odd_tree: Path, options: list[str]) -> None:
    made = subprocess.run(["tar", "-C", odd_tree, *options, "-cf", "-", "."], capture_output=True, check=True)
    target = tmp_path / "target"
    target.mkdir()
    unpack(io.BytesIO(made.stdout), str(target), KEEP)
    expected, found = describe(odd_tree), describe(target)
    if "--xattrs-include=*" not in options:
        for tree in (expected, found):
            for node in tree.values():
                node.pop("xattrs")
    assert found == expected
    if "--sparse" in options:
        assert (target / "sparse").stat().st_blocks * 512 < 1 << 20


@needs_tar
def test_gnu_tar_unpacks_ours(tmp_path: Path, odd_tree: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    data = b"".join(pack_tree(str(odd_tree), PackOptions(xattrs=XattrSelection.ALL)))
    command = ["tar", "-C", str(target), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"]
    run = subprocess.run(command, input=data, capture_output=True, check=True)
    assert run.stderr == b""
    assert describe(target) == describe(odd_tree)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_python_archives_are_unpacked(tmp_path: Path, format_: int) -> None:
    root = tmp_path / "root"
    write(root / ("d" * 90) / ("f" * 90), "x", mtime=7)
    os.symlink("target", root / "link")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as made:
        made.add(root, arcname=".")
    target = tmp_path / "target"
    target.mkdir()
    buffer.seek(0)
    unpack(buffer, str(target), KEEP)
    assert describe(target, times=False) == describe(root, times=False)


def test_old_header_without_magic() -> None:
    block = patched(encode_entry(TarEntry(b"dir/", kind=b"\0", mode=0o755)), 257, bytes(8))
    ((found, _),) = read(archive(block))
    assert (found.name, found.kind) == (b"dir/", b"5")


def test_star_header_does_not_read_times_as_prefix() -> None:
    block = encode_entry(TarEntry(b"name"))
    block = patched(block, 345, b"prefix".ljust(131, b"\0") + b"00000000001 00000000002 ")
    ((plain, _),) = read(archive(block))
    assert plain.name.startswith(b"prefix")
    ((star, _),) = read(archive(patched(block, 508, b"tar\0")))
    assert star.name == b"prefix/name"


def test_untar_ustar_gnu_conflict() -> None:
    """TestUntarUstarGnuConflict: GNU's magic has times where ustar has its prefix."""
    block = patched(encode_entry(TarEntry(b"name")), 257, b"ustar  \0")
    block = patched(block, 345, b"00000000001\x0000000000002\0")
    ((found, _),) = read(archive(block))
    assert found.name == b"name"


def test_base_256_numbers() -> None:
    block = patched(encode_entry(TarEntry(b"f")), 108, b"\x80\0\0\0\0\x2d\xc6\xc0")
    block = patched(block, 136, b"\xff" * 11 + b"\xfe")
    ((found, _),) = read(archive(block))
    assert (found.uid, found.mtime_ns) == (3_000_000, -2_000_000_000)


@pytest.mark.parametrize(
    ("field", "record", "uid"),
    [
        (-1, b"", 0),
        (-2, b"", 4294967294),
        (4294967295, b"", 0),
        (4294967294, b"", 4294967294),
        (0, b"10 uid=-1\n", 0),
        (0, b"10 uid=-2\n", 4294967294),
        (0, b"18 uid=4294967295\n", 0),
        (5, b"8 uid=0\n", 0),
    ],
)
def test_owners_below_zero(field: int, record: bytes, uid: int) -> None:
    """macOS' nobody is -2; -1 leaves the owner to chown(2), as every engine does (golang's archive/tar, umoci)."""
    block = patched(encode_entry(TarEntry(b"f")), 108, (field & (1 << 64) - 1 | (1 << 63)).to_bytes(8, "big"))
    block = patched(block, 116, (field & (1 << 64) - 1 | (1 << 63)).to_bytes(8, "big"))
    header = entry("p", record + record.replace(b"uid", b"gid"), kind=b"x") if record else b""
    ((found, _),) = read(archive(header + block))
    assert (found.uid, found.gid) == (uid, uid)


def test_mode_below_zero() -> None:
    ((found, _),) = read(archive(patched(encode_entry(TarEntry(b"f")), 100, b"\xff" * 7 + b"\xed")))
    assert found.mode == 0o7755


def test_signed_checksum_of_old_writers() -> None:
    block = encode_entry(TarEntry(b"f"))
    block = b"\xe9" + block[1:]
    signed = sum(b if b < 128 else b - 256 for b in block[:148] + block[156:512]) + 256
    ((found, _),) = read(archive(block[:148] + b"%06o\0 " % signed + block[156:]))
    assert found.name == b"\xe9"


def test_mode_with_file_type_bits() -> None:
    """Docker 23 and older put S_IFREG into the mode field."""
    ((found, _),) = read(archive(patched(encode_entry(TarEntry(b"f")), 100, b"0100755\0")))
    assert found.mode == 0o755


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), bytes(1024) + b"junk after the end"])
def test_ends_of_archives(end: bytes) -> None:
    assert [found.name for found, _ in read(entry("f", b"x") + end)] == [b"f"]


def test_missing_padding_at_the_very_end() -> None:
    assert read(entry("f", b"x")[:513])[0][1] == b"x"


def test_nothing_at_all_is_an_empty_archive() -> None:
    assert read(b"") == []


def damaged() -> dict[str, bytes]:
    good = entry("f", b"x" * 600)
    pax = entry("p", b"12 path=abc\n", kind=b"x")
    return {
        "cut off in a header": good[:300],
        "cut off in the contents": good[:700],
        "cut off in an extended header": pax[:520],
        "checksum": b"\1" + good[1:],
        "not a tar archive": b"#!/bin/sh\n" * 100,
        "zeros between": good + bytes(512) + good,
        "size is not a number": patched(good, 124, b"9999999999x\0"),
        "size is out of range": patched(good, 124, b"\xff" * 12),
        "uid is out of range": patched(good, 108, b"\xff\xff\xff\xfe" + bytes(4)),
        "uid is not a number in range": archive(entry("p", b"19 uid=-4294967297\n", kind=b"x"), good),
        "no id that Linux has": patched(good, 108, b"\x80\0\0\1" + bytes(4)),
        "more than the 1 MiB": patched(pax, 124, b"00100000000\0"),
        "malformed record": archive(entry("p", b"99 path=abc\n", kind=b"x"), good),
        "malformed record ": archive(entry("p", b"0 path=abc\n", kind=b"x"), good),
        "malformed record  ": archive(entry("p", b"path", kind=b"x"), good),
        "malformed record   ": archive(entry("p", b"-12 path=abc\n", kind=b"x"), good),
        "NUL": archive(entry("p", b"12 path=a\0c\n", kind=b"x"), good),
        "size is not a number ": archive(entry("p", b"12 size=-10\n", kind=b"x"), good),
        "mtime is not a time": archive(entry("p", b"13 mtime=1e5\n", kind=b"x"), good),
        "ends after an extended header": archive(pax),
        "sparse map": archive(entry("p", b"22 GNU.sparse.major=1\n25 GNU.sparse.realsize=9\n", kind=b"x"), good),
        "sparse map ": archive(
            entry("p", b"26 GNU.sparse.map=5,5,1,1\n21 GNU.sparse.size=9\n", kind=b"x"), entry("f", b"123456")
        ),
    }


@pytest.mark.parametrize("what", damaged())
def test_damage_is_told(what: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        read(damaged()[what])
    assert what.strip() in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extended_header_is_not_read_beyond_its_bound() -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            piece = super().read(size)
            self.taken += len(piece)
            return piece

    header = patched(entry("p", b"", kind=b"L"), 124, b"00400000000\0")
    stream = Counting(header + bytes(32 << 20))
    with pytest.raises(ArchiveError, match="1 MiB"):
        list(TarReader(stream))
    assert stream.taken <= 2 << 20


def test_sparse_map_of_too_many_pieces() -> None:
    body = b"9999999\n".ljust(512, b"\0")
    records = b"22 GNU.sparse.major=1\n26 GNU.sparse.realsize=10\n"
    with pytest.raises(ArchiveError, match="too many pieces"):
        read(archive(entry("p", records, kind=b"x"), entry("f", body)))


def test_raw_bytes_and_contents_together_are_the_archive() -> None:
    """What exact re-assembly (tar-split) relies on."""
    data = archive(directory("d"), entry("d/" + "n" * 300, b"x" * 700), entry("g", b"1" * 512)) + b"tail"
    collected: list[bytes] = []
    reader = TarReader(io.BytesIO(data), raw=collected.append)
    for _ in reader:
        collected.extend(reader.contents())
    reader.drain()
    assert b"".join(collected) == data


def test_contents_may_be_left_unread() -> None:
    reader = TarReader(io.BytesIO(archive(entry("a", b"x" * 5000), entry("b"))))
    assert [found.name for found in reader] == [b"a", b"b"]
    assert reader.next() is None
    assert reader.next() is None
