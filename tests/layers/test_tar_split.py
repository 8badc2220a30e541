"""tar-split: records that give back every byte, in the format of the original, whatever the archive holds."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layers.archives import Member, archive, hard_link, member, symlink
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack
from unionfs.drivers.files import TreeFiles
from unionfs.errors import ArchiveError, LayerDamagedError, TarSplitError
from unionfs.layers.identity import diff_id_of
from unionfs.layers.tar_split import (
    FILE,
    Checksum,
    EntryWriter,
    SplitEntry,
    assemble,
    disassemble,
    read_entries,
    verified,
)


def record_of(tar: bytes) -> tuple[bytes, int]:
    """The record, made as the store makes it, and how many passes that took."""
    lines: list[bytes] = []
    first = disassemble(io.BytesIO(tar), lines.append)
    if not first.lost:
        return b"".join(lines), 1
    lines = []
    second = disassemble(io.BytesIO(tar), lines.append, embed=first.lost)
    assert not second.lost
    return b"".join(lines), 2


def entries_of(record: bytes) -> list[SplitEntry]:
    return list(read_entries(io.BytesIO(record), "record"))


def again(tar: bytes, root: Path, whiteouts: WhiteoutMode = WhiteoutMode.DELETE) -> tuple[bytes, bytes]:
    """Unpack ``tar`` into ``root``; its record, and what is assembled from both."""
    record, _ = record_of(tar)
    root.mkdir(exist_ok=True)
    unpack(io.BytesIO(tar), root.as_posix(), UnpackOptions(whiteouts=whiteouts))
    return record, b"".join(assemble(entries_of(record), TreeFiles(str(root))))


def file_names(record: bytes) -> list[bytes]:
    return [entry.name for entry in entries_of(record) if entry.kind == FILE]


ORDINARY = [
    member("etc/"),
    member("etc/passwd", "root:x:0:0\n"),
    member("etc/empty"),
    member("etc/block", b"b" * 512),
    member("etc/more", b"m" * 513),
    symlink("etc/link", "passwd"),
    hard_link("etc/hard", "etc/passwd"),
    member("etc/.wh.gone"),
    member("d" * 90 + "/" + "n" * 200, "a long name"),
    member("caf\u00e9 <&>\u2028", "not ASCII"),
    member("latin-\udce9", "not UTF-8"),
]

# The fixtures of the original's TestTarStream, by what is special about them.
STREAMS = {
    "pax": archive(ORDINARY),
    "gnu": archive(ORDINARY, tarfile.GNU_FORMAT),
    "ustar": archive(ORDINARY[:8], tarfile.USTAR_FORMAT),
    "global header": archive(ORDINARY, pax_headers={"comment": "of all"}),
    "no zeros at the end": archive(ORDINARY)[: -len(archive(ORDINARY)) % 512 or None].rstrip(b"\0").ljust(512, b"\0"),
    "one block of zeros": archive([member("a", b"x" * 512)])[: 3 * 512],
    "many zeros": archive(ORDINARY) + bytes(100_000),
    "junk behind": archive(ORDINARY) + b"junk" * 1000,
    "empty": bytes(1024),
    "nothing at all": b"",
    "only zeros": bytes(10240),
    "dot slash": archive([member("./"), member("./a", "1"), member("./b/"), member("./b//c", "2")]),
    "absolute": archive([member("/a", "1"), member("b/../c", "2")]),
}
STREAMS["no zeros at the end"] = archive([member("a", b"x" * 512)])[:1024]


@pytest.mark.parametrize("name", STREAMS)
def test_every_byte_comes_back(name: str, tmp_path: Path) -> None:
    """moby's TestTarStream."""
    tar = STREAMS[name]
    _, assembled = again(tar, tmp_path / "root")
    assert assembled == tar
    assert b"".join(verified([assembled], diff_id_of(tar))) == tar


def test_a_record_of_no_bytes() -> None:
    record, _ = record_of(b"")
    assert record == b'{"type":2,"payload":"","position":0}\n'  # what Docker 20.10 writes
    # Until now nothing was written for it.
    assert list(read_entries(io.BytesIO(gzip.compress(b"")), "record")) == []
    positions = [json.loads(line).get("position") for line in record.splitlines()]
    assert positions == list(range(len(positions)))


def test_lines_are_those_of_the_original() -> None:
    lines: list[bytes] = []
    writer = EntryWriter(lines.append)
    writer.segment(b"how")
    writer.segment(b"")
    writer.file(b"./hurr.txt", 20, bytes.fromhex("0274a4b1abec6b4e"))
    writer.file(b'a<b>&c"\\\xe2\x80\xa8', 0, bytes(8))
    writer.file(b"\xe9", 0, bytes(8))
    assert [line.decode() for line in lines] == [
        '{"type":2,"payload":"aG93","position":0}\n',
        '{"type":1,"name":"./hurr.txt","size":20,"payload":"AnSksavsa04=","position":1}\n',
        '{"type":1,"name":"a\\u003cb\\u003e\\u0026c\\"\\\\\\u2028","payload":null,"position":2}\n',
        '{"type":1,"name_raw":"6Q==","payload":null,"position":3}\n',
    ]
    entries = entries_of(b"".join(lines))
    assert [entry.name for entry in entries] == [b"", b"./hurr.txt", b'a<b>&c"\\\xe2\x80\xa8', b"\xe9"]
    assert entries[1].size == 20


@pytest.mark.parametrize(
    ("text", "checksum"),
    [
        ("123456789", "b90956c775a41001"),
        ("imma hurr til I derp", "0274a4b1abec6b4e"),
        ("caf\u00e9 con leche, por favor", "7e4859efe6fca0bb"),
        ("", "0" * 16),
    ],
)
def test_checksum(text: str, checksum: str) -> None:
    """Row 102: CRC-64/GO-ISO, whole and in pieces."""
    data = text.encode()
    whole, pieces = Checksum(), Checksum()
    whole.update(data)
    for at in range(len(data)):
        pieces.update(data[at : at + 1])
    assert whole.digest().hex() == pieces.digest().hex() == checksum


def test_order_of_entries() -> None:
    record, _ = record_of(archive([member("a", "12345"), member("d/")]))
    shapes = [(entry.kind, entry.name, entry.size) for entry in entries_of(record)]
    assert shapes == [(2, b"", 0), (1, b"a", 5), (2, b"", 0), (1, b"d/", 0), (2, b"", 0), (2, b"", 0)]
    # The header; padding with the next header; the two blocks of zeros; the rest.
    assert [len(e.payload) for e in entries_of(record) if e.kind == 2] == [512, 507 + 512, 1024, 10240 - 4 * 512 - 512]


def test_changed_contents_are_noticed(tmp_path: Path) -> None:
    """moby's TestTarStreamMangledGetterPutter."""
    tar = archive([member("a", "contents"), member("b", "more")])
    record, _ = again(tar, tmp_path / "root")
    for changed in (b"CONTENTS", b"content", b"contents!", b""):
        (tmp_path / "root" / "a").write_bytes(changed)
        with pytest.raises(LayerDamagedError, match='file integrity checksum failed for "a"'):
            b"".join(assemble(entries_of(record), TreeFiles(str(tmp_path / "root"))))
    (tmp_path / "root" / "a").unlink()
    with pytest.raises(LayerDamagedError, match='checksum failed for "a": the file is not there'):
        b"".join(assemble(entries_of(record), TreeFiles(str(tmp_path / "root"))))


def test_verified_raises_at_the_end_only() -> None:
    pieces = verified([b"a", b"b"], diff_id_of(b"something else"))
    assert next(pieces) == b"a"
    assert next(pieces) == b"b"
    with pytest.raises(LayerDamagedError, match=f"could not verify layer data for: {diff_id_of(b'something else')}"):
        next(pieces)


# Row 103: what the tree cannot give back is in the record. Each case: members, names that the record has as files.
CONFLICTS: dict[str, tuple[list[Member], list[bytes], int]] = {
    "twice": ([member("a", "first"), member("a", "second!")], [b"a"], 2),
    "three times": ([member("a", "1"), member("./a", "22"), member("a", "333")], [b"a"], 2),
    "empty, then not": ([member("a"), member("a", "now")], [b"a"], 2),
    "not, then empty": ([member("a", "now"), member("a")], [b"a"], 2),
    "directory twice": (
        [member("d/"), member("d/a", "1"), member("./d/"), member("d/b", "2")],
        [b"d/", b"d/a", b"d/b"],
        1,
    ),
    "file, then directory": ([member("d", "1"), member("d/"), member("d/a", "2")], [b"d/", b"d/a"], 2),
    "file, then symlink": ([member("d", "1"), symlink("d", "a"), member("a", "2")], [b"d", b"a"], 2),
    "directory, then file": (
        [member("d/"), member("d/a", "1"), member("d/e/"), member("d/e/b", "2"), member("d", "3")],
        [b"d/e/", b"d"],
        2,
    ),
    "whiteout of an earlier file": ([member("a", "1"), member(".wh.a"), member("b", "2")], [b".wh.a", b"b"], 2),
    "whiteout of an earlier directory": (
        [member("d/"), member("d/a", "1"), member(".wh.d"), member("b", "2")],
        [b"d/", b".wh.d", b"b"],
        2,
    ),
    "opaque keeps this stream's": (
        [member("d/"), member("d/a", "1"), member("d/.wh..wh..opq")],
        [b"d/", b"d/a", b"d/.wh..wh..opq"],
        1,
    ),
    "through a symlink": (
        [member("usr/"), member("usr/a", "1"), symlink("lib", "usr"), member("lib/a", "2")],
        [b"usr/", b"lib", b"lib/a"],
        2,
    ),
    "through an absolute symlink": (
        [member("x/"), member("x/a", "1"), symlink("l", "/x"), member("l/a", "2")],
        [b"x/", b"l", b"l/a"],
        2,
    ),
    "through a symlink upwards": (
        [member("x/a", "1"), symlink("y/l", "../x"), member("y/l/a", "2"), member("x/b", "3")],
        [b"y/l", b"y/l/a", b"x/b"],
        2,
    ),
    "the symlink goes": (
        [member("d/"), symlink("l", "d"), member("l/a", "1"), member("l/"), member("l/b", "2")],
        [b"d/", b"l", b"l/b"],
        2,
    ),
    "hard link over a file": ([member("a", "1"), member("b", "22"), hard_link("a", "b")], [b"b", b"a"], 2),
    "hard link stays": ([member("a", "1"), hard_link("b", "a"), member("a", "22")], [b"b", b"a"], 2),
    "aufs": ([member(".wh..wh.plnk/1.2", "stashed"), hard_link("h", ".wh..wh.plnk/1.2")], [b"h"], 1),
    "a whiteout with contents": ([member(".wh.x", "contents?"), member("a", "1")], [b"a"], 1),
}


@pytest.mark.parametrize("whiteouts", [WhiteoutMode.DELETE, WhiteoutMode.OVERLAY])
@pytest.mark.parametrize("name", CONFLICTS)
def test_contents_that_are_gone_from_the_tree(name: str, whiteouts: WhiteoutMode, tmp_path: Path) -> None:
    members, names, passes = CONFLICTS[name]
    tar = archive(members)
    record, taken = record_of(tar)
    assert taken == passes
    assert file_names(record) == names
    assert again(tar, tmp_path / "root", whiteouts)[1] == tar


def test_large_contents_that_are_gone(tmp_path: Path) -> None:
    tar = archive([member("a", os.urandom(3_000_000)), member("a", b"x")])
    record, assembled = again(tar, tmp_path / "root")
    assert assembled == tar
    assert max(len(entry.payload) for entry in entries_of(record)) <= 1 << 20


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=1.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=0.0"],
    ],
)
def test_sparse_files(options: list[str], tmp_path: Path) -> None:
    """Row 104."""
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "holes", "wb") as file:
        for at in range(0, 50 << 20, 5 << 20):
            file.seek(at)
            file.write(b"data at %d" % at)
        file.truncate(60 << 20)
    (source / "plain").write_bytes(b"plain")
    tar = subprocess.run(
        ["tar", "-C", source, "-cS", *options, "."], check=True, capture_output=True, stdin=subprocess.DEVNULL
    ).stdout
    assert len(tar) < 1 << 20
    record, assembled = again(tar, tmp_path / "root")
    assert assembled == tar
    assert b"./plain" in file_names(record)
    assert not any(b"holes" in name for name in file_names(record))
    assert (tmp_path / "root" / "holes").read_bytes() == (source / "holes").read_bytes()


def test_header_only_entries_have_no_contents(tmp_path: Path) -> None:
    tar = bytearray(archive([member("d/"), member("a", "1")]))
    tar[124:135] = b"00000000777"  # a size, for a directory
    tar[148:156] = b"        "
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    assert again(bytes(tar), tmp_path / "root")[1] == bytes(tar)


@pytest.mark.parametrize(
    "tar",
    [b"no tar archive" * 100, archive([member("a", b"x" * 2000)])[:1500], archive([member("../a", "1")])],
    ids=["not tar", "cut off", "upwards"],
)
def test_bad_archives(tar: bytes) -> None:
    with pytest.raises(ArchiveError):
        disassemble(io.BytesIO(tar), lambda _: None)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (b"", "it is empty"),
        (b"not json\n", "a line is not an entry"),
        (b'{"type":3,"position":0}\n', "out of range"),
        (b'{"type":2,"payload":"!!","position":0}\n', "a line is not an entry"),
        (b'{"type":2,"payload":"aG93","position":7}\n', "entry 0 has the number 7"),
        (b'{"type":1,"name":"a","size":5,"payload":null,"position":0}\n', "a file has no checksum"),
        (b'{"type":1,"name":"a","size":-5,"payload":null,"position":0}\n', "out of range"),
        (b"[]\n", "a line is not an entry"),
        (gzip.compress(b'{"type":2,"payload":"aG93","position":0}\n', mtime=0)[:-9], "it is cut off"),
        (b"\x1f\x8b" + bytes(20), "unknown compression method"),
    ],
)
def test_damaged_records(record: bytes, what: str) -> None:
    with pytest.raises(TarSplitError, match=what) as caught:
        entries_of(record)
    assert "record: the tar-split record is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


class Zeros:
    """A stream that is an archive with a huge amount of zeros behind it."""

    def __init__(self, start: bytes, size: int) -> None:
        self._start = io.BytesIO(start)
        self._left = size
        self._piece = bytes(1 << 20)

    def read(self, size: int) -> bytes:
        if piece := self._start.read(size):
            return piece
        size = min(size, self._left, len(self._piece))
        self._left -= size
        return self._piece[:size]


def test_memory_is_bounded() -> None:
    """moby's TestLargeJunkPadding, and a file as large."""
    size = 1 << 29
    header = archive([member("big")])[:512]
    big = bytearray(header)
    big[124:136] = b"%011o\0" % size
    big[148:156] = b"        "
    big[148:156] = b"%06o\0 " % sum(big)
    written = 0

    def count(line: bytes) -> None:
        nonlocal written
        written += len(line)

    tracemalloc.start()
    try:
        assert disassemble(Zeros(bytes(big), size), count).entries == 1
        assert written < 2000
        disassemble(Zeros(archive([member("a", "1")]), size), count)
        assert written > size
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d", "d/a", "d/b", "d/e/a", "l/a", "l", ".wh.a", ".wh.d", "d/.wh.a", "d/.wh.e"]),
            st.sampled_from(["file", "empty", "dir", "link", "long"]),
        ),
        max_size=12,
    )
)
def test_any_mixture_of_conflicts(tmp_path_factory: pytest.TempPathFactory, choices: list[tuple[str, str]]) -> None:
    members = []
    for number, (name, kind) in enumerate(choices):
        if kind == "dir" and ".wh." not in name:
            members.append(member(name + "/"))
        elif kind == "link" and ".wh." not in name:
            members.append(symlink(name, "/d"))
        else:
            members.append(member(name, b"" if kind == "empty" else b"%d" % number * (700 if kind == "long" else 1)))
    tar = archive(members)
    try:
        assembled = again(tar, tmp_path_factory.mktemp("tree") / "root")[1]
    except ArchiveError as error:
        if isinstance(error, LayerDamagedError):
            raise
        return  # such an archive is not accepted at all
    assert assembled == tar


# The original's own program, as Debian has it.


def tar_split(*arguments: str | Path) -> None:
    subprocess.run(["tar-split", *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)


# Its version 0.11 cannot read the others itself, or writes an empty record.
INTERCHANGED = [name for name in STREAMS if name not in ("nothing at all", "absolute")]


@pytest.mark.parametrize("name", INTERCHANGED)
def test_the_original_reads_our_records(name: str, tmp_path: Path) -> None:
    tar = STREAMS[name]
    record, _ = again(tar, tmp_path / "root")
    (tmp_path / "record.gz").write_bytes(gzip.compress(record))
    tar_split("asm", "--input", tmp_path / "record.gz", "--path", tmp_path / "root", "--output", tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == tar


@pytest.mark.parametrize("name", INTERCHANGED)
def test_we_read_the_records_of_the_original(name: str, tmp_path: Path) -> None:
    tar = STREAMS[name]
    (tmp_path / "in.tar").write_bytes(tar)
    again(tar, tmp_path / "root")
    tar_split("disasm", "--no-stdout", "--output", tmp_path / "record.gz", tmp_path / "in.tar")
    theirs = (tmp_path / "record.gz").read_bytes()
    assert b"".join(assemble(entries_of(theirs), TreeFiles(str(tmp_path / "root")))) == tar


@pytest.mark.parametrize("name", ["pax", "gnu", "ustar", "dot slash"])
def test_our_record_is_theirs(name: str, tmp_path: Path) -> None:
    tar = STREAMS[name]
    (tmp_path / "in.tar").write_bytes(tar)
    tar_split("disasm", "--no-stdout", "--output", tmp_path / "record.gz", tmp_path / "in.tar")
    theirs = gzip.decompress((tmp_path / "record.gz").read_bytes()).splitlines()
    assert json.loads(theirs.pop())["payload"] in (None, "")  # this version ends with a segment of nothing
    assert record_of(tar)[0].splitlines() == theirs


# It resolves absolute links in the host's tree.
@pytest.mark.parametrize("name", [name for name in CONFLICTS if "absolute" not in name])
def test_the_original_reads_records_of_archives_it_refuses(name: str, tmp_path: Path) -> None:
    tar = archive(CONFLICTS[name][0])
    record, _ = again(tar, tmp_path / "root")
    (tmp_path / "record.gz").write_bytes(gzip.compress(record))
    tar_split("asm", "--input", tmp_path / "record.gz", "--path", tmp_path / "root", "--output", tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == tar


def test_records_are_base64_of_the_stream() -> None:
    """Nothing but the contents of files is missing from a record."""
    tar = archive([member("a", b"contents of a file")])
    record, _ = record_of(tar)
    assert base64.b64encode(b"contents of a file") not in record
    total = sum(len(entry.payload) if entry.kind != FILE else entry.size for entry in entries_of(record))
    assert total == len(tar)
    assert hashlib.sha256(tar).hexdigest() == diff_id_of(tar)[7:]
