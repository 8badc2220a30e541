"""tar-split: a tar stream recorded without the contents of its files, and put together again byte for byte.

A record has one JSON object a line. Type 2 is a segment: bytes of the stream as they are (headers, padding, the end).
Type 1 is a file: its name, its size, and the checksum of contents that lie elsewhere, in the tree that the stream was
unpacked into. Docker keeps one such record for each layer, as ``tar-split.json.gz``. Source:
github.com/vbatts/tar-split, ``tar/storage``.

The tree cannot give back contents that a later entry of the same stream replaced or removed, nor those that were never
unpacked (AUFS' own files, a whiteout with contents). tar-split refuses archives with two entries of one name; here such
contents are recorded in full instead. :class:`PayloadTracker` finds them.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, BinaryIO, Protocol

from fastcrc import crc64

from unionfs.archive.tar_format import DIRECTORY, PAX_GLOBAL_HEADER, SYMLINK, TarEntry, show
from unionfs.archive.tar_reader import Readable, TarReader
from unionfs.archive.target import MAX_LINK_STEPS, MAX_LINKS
from unionfs.archive.unpacking import clean_name
from unionfs.errors import LayerDamagedError, TarSplitError
from unionfs.layers.identity import ALGORITHM
from unionfs.overlay.format import MARK, META_MARK, OPAQUE_MARK

FILE = 1
SEGMENT = 2

_RECORD_PIECE_BYTES = 1 << 18
# Old versions of tar-split wrote whatever followed an archive as one segment, so lines may be long; but a line that
# takes the machine's memory is an attack (CVE-2017-14992).
_MAX_LINE_BYTES = 1 << 28

# Go's JSON encoder writes these so that the text can stand in HTML; doing the same gives the same record.
_GO_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


@dataclass(frozen=True, slots=True)
class SplitEntry:
    """One line.

    Attributes:
        kind: :data:`FILE` or :data:`SEGMENT`.
        payload: a segment's bytes, or the eight bytes of a file's checksum; empty for a file without contents.
        name: a file's name as in its header.
        size: a file's length in bytes.
    """

    kind: int
    payload: bytes = b""
    name: bytes = b""
    size: int = 0


class Checksum:
    """CRC-64 with the ISO 3309 polynomial, as Go's ``hash/crc64`` computes it."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = crc64.go_iso(data, self._value)

    def digest(self) -> bytes:
        """The checksum of everything so far, most significant byte first."""
        return self._value.to_bytes(8, "big")


class EntryWriter:
    """Writes entries as lines, numbering them.

    Args:
        write: gets the encoded lines.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._position = 0

    def segment(self, payload: bytes) -> None:
        """Record bytes of the stream as they are; nothing for none."""
        if payload:
            self._line(b'{"type":2,"payload":"%s"' % _base64(payload))

    def file(self, name: bytes, size: int, checksum: bytes) -> None:
        """Record that the contents of ``name`` follow here: ``size`` bytes, with this checksum."""
        try:
            shown = b'"name":%s' % encode_basestring(name.decode()).translate(_GO_ESCAPES).encode()
        except UnicodeDecodeError:
            shown = b'"name_raw":"%s"' % _base64(name)
        if not name:
            shown = b""
        middle = b',"size":%d,"payload":"%s"' % (size, _base64(checksum)) if size else b',"payload":null'
        self._line(b'{"type":1%s%s%s' % (b"," if shown else b"", shown, middle))

    def end(self) -> None:
        """End the record. Of a stream without a single byte tar-split records one segment without any."""
        if not self._position:
            self._line(b'{"type":2,"payload":""')

    def _line(self, start: bytes) -> None:
        self._write(b'%s,"position":%d}\n' % (start, self._position))
        self._position += 1


def _base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)


def read_entries(stream: Readable, where: str) -> Iterator[SplitEntry]:
    """The entries of a record, gzip or plain.

    Args:
        stream: the record, from its start.
        where: the file's name for messages.

    Raises:
        TarSplitError: while iterating, when the record is damaged or cut off.
    """
    position = 0
    for line in _lines(_unzipped(stream, where), where):
        if not line.strip():
            continue
        entry, number = _decode(line, where)
        if number != position:
            raise _damaged(where, f"entry {position} has the number {number}")
        position += 1
        yield entry


def _decode(line: bytes, where: str) -> tuple[SplitEntry, int]:
    try:
        fields: dict[str, Any] = json.loads(line)
        kind = fields["type"]
        payload = binascii.a2b_base64(fields.get("payload") or "", strict_mode=True)
        raw = fields.get("name_raw")
        name = binascii.a2b_base64(raw, strict_mode=True) if raw else fields.get("name", "").encode()
        size, position = fields.get("size", 0), fields.get("position", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(where, f"a line is not an entry ({error})") from error
    if kind not in (FILE, SEGMENT) or not isinstance(size, int) or size < 0 or not isinstance(position, int):
        raise _damaged(where, "a line has values out of range")
    if kind == FILE and size and len(payload) != 8:
        raise _damaged(where, "a file has no checksum")
    return SplitEntry(kind, payload, name, size), position


def _unzipped(stream: Readable, where: str) -> Iterator[bytes]:
    first = stream.read(_RECORD_PIECE_BYTES) or b""
    if not first:
        raise _damaged(where, "it is empty")
    if not first.startswith(b"\x1f\x8b"):
        while first:
            yield first
            first = stream.read(_RECORD_PIECE_BYTES) or b""
        return
    decompressor = zlib.decompressobj(wbits=31)
    data = first
    while data:
        try:
            piece = decompressor.decompress(data, _RECORD_PIECE_BYTES)
        except zlib.error as error:
            raise _damaged(where, str(error)) from error
        if piece:
            yield piece
        data = decompressor.unconsumed_tail or stream.read(_RECORD_PIECE_BYTES) or b""
        if decompressor.eof:
            return
    if not decompressor.eof:
        raise _damaged(where, "it is cut off")


def _lines(pieces: Iterable[bytes], where: str) -> Iterator[bytes]:
    begun: list[bytes] = []
    size = 0
    for piece in pieces:
        head, *rest = piece.split(b"\n")
        begun.append(head)
        size += len(head)
        if size > _MAX_LINE_BYTES:
            raise _damaged(where, "a line is longer than 256 MiB")
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
            size = len(rest[-1])
    yield b"".join(begun)


def _damaged(where: str, what: str) -> TarSplitError:
    return TarSplitError(f"{where}: the tar-split record is damaged: {what}; remove the layer and register it again")


class _Node:
    __slots__ = ("children", "has_payload", "index", "left_out", "link", "through")

    def __init__(self) -> None:
        self.index = -1  # of the last entry with this name; -1: only a directory on the way
        self.left_out: list[int] = []  # entries after it that repeat the name and hold nothing either
        self.has_payload = False
        self.children: dict[bytes, _Node] = {}
        self.link: bytes | None = None
        self.through: list[int] = []  # entries with contents whose names lead through this link


class PayloadTracker:
    """Follows the entries of one stream and says which must not be recorded as files.

    The names of the stream are kept as a tree, and symbolic links in it are followed as unpacking follows them, so that
    ``lib/a`` and ``usr/lib/a`` are known to be one file when the stream made ``lib`` a link.

    Args:
        lost: what an earlier pass over the same stream found in :attr:`late`.

    Attributes:
        late: numbers of entries that :meth:`must_embed` was false for, and that turned out to be lost afterwards. When
            there are any the record is wrong: make it again, giving them as ``lost``.
    """

    def __init__(self, lost: frozenset[int] = frozenset()) -> None:
        self._lost = lost
        self._root = _Node()
        # A directory, the links on the way there, and whether all directories on it are this stream's.
        self._last: tuple[list[bytes], _Node, list[_Node], bool] = ([], self._root, [], True)
        self._same_base: dict[bytes, list[int]] = {}  # entries by the last component of their names
        self._unknown: set[bytes] = set()  # those components that follow one which may be a link of a layer below
        self.late: set[int] = set()

    def unsure(self) -> set[int]:
        """Entries that may be one file with another one, by a link of a layer below: those links are not known here."""
        several = (self._same_base[base] for base in self._unknown)
        return {index for same in several if len(same) > 1 for index in same}

    def must_embed(self, index: int, entry: TarEntry) -> bool:
        """Whether the entry's contents, if any, belong into the record, and no file entry for it.

        Args:
            index: the entry's number in the stream.
            entry: its header.

        Raises:
            BreakoutError: its name leads out of the archive.
        """
        if entry.kind == PAX_GLOBAL_HEADER:
            return False
        parts = clean_name(entry.name)
        hidden = any(part.startswith(MARK) for part in parts)
        if hidden:
            self._whiteout(parts)
        if not parts:
            node, links = self._root, list[_Node]()
        else:
            parent, links = self._directory(parts[:-1])
            node = parent.children.setdefault(parts[-1], _Node())
            self._same_base.setdefault(parts[-1], []).append(index)
            if not self._last[3]:
                self._unknown.add(parts[-1])
        if index in self._lost:
            self._become(node, entry)
            node.index, node.has_payload = -1, False
            return True
        sized = entry.stored_size > 0
        repeated = node.index >= 0
        if repeated and not sized and not node.has_payload:
            # Nothing to lose, but the original takes no second entry of this name.
            self._become(node, entry)
            node.left_out.append(index)
            return True
        if repeated:
            self.late.update((node.index, *node.left_out))
            node.left_out = []
        self._become(node, entry)
        if sized and (hidden or entry.sparse is not None):
            # What is read from a sparse file is not what the archive holds: its holes are not there.
            node.index, node.has_payload = -1, False
            return True
        node.index, node.has_payload = index, sized
        if sized:
            for link in links:
                link.through.append(index)
        return False

    def _become(self, node: _Node, entry: TarEntry) -> None:
        if entry.kind != DIRECTORY and node.children:
            self._lose(node)
        self._unlink(node)
        node.link = entry.linkname if entry.kind == SYMLINK else None
        self._last = ([], self._root, [], True)

    def _whiteout(self, parts: list[bytes]) -> None:
        base = parts[-1]
        if base == OPAQUE_MARK or base.startswith(META_MARK) or not base.startswith(MARK):
            return  # an opaque marker removes nothing that came from this stream
        parent, _ = self._directory(parts[:-1])
        node = parent.children.pop(base[len(MARK) :], None)
        if node is not None:
            self._note(node)
            self._lose(node)
            self._last = ([], self._root, [], True)

    def _lose(self, node: _Node) -> None:
        """Everything beneath ``node`` is removed."""
        for below in _descendants(node):
            self._note(below)
        node.children = {}

    def _note(self, node: _Node) -> None:
        if node.index >= 0 and node.has_payload:
            self.late.add(node.index)
        self._unlink(node)

    def _unlink(self, node: _Node) -> None:
        """If it is a link, it goes: the contents reached through it may stay, but their names lead nowhere."""
        self.late.update(node.through)
        node.through = []

    def _directory(self, parts: list[bytes]) -> tuple[_Node, list[_Node]]:
        """The directory that ``parts`` lead to, made where it is missing, and the links on the way."""
        if parts != self._last[0]:
            self._last = (parts, *self._follow(parts))
        return self._last[1:3]

    def _follow(self, parts: list[bytes]) -> tuple[_Node, list[_Node], bool]:
        todo = parts[::-1]
        way: list[_Node] = [self._root]
        links: list[_Node] = []
        steps = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(way) > 1:
                    way.pop()
                continue
            node = way[-1].children.setdefault(part, _Node())
            inner = node.link.split(b"/") if node.link is not None else []
            steps += len(inner)
            if inner and len(links) < MAX_LINKS and steps <= MAX_LINK_STEPS:
                links.append(node)
                if not inner[0]:
                    del way[1:]
                todo.extend(inner[::-1])
                continue
            if node.has_payload:
                # A file in the way of a directory: if unpacking allows that at all, the file is gone.
                self._note(node)
                node.index, node.has_payload = -1, False
            way.append(node)
        return way[-1], links, all(node.index >= 0 for node in way[1:])


def _descendants(node: _Node) -> Iterator[_Node]:
    todo = list(node.children.values())
    while todo:
        child = todo.pop()
        yield child
        todo.extend(child.children.values())


_SEGMENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Disassembled:
    """What came of it.

    Attributes:
        entries: how many entries the stream has.
        lost: numbers of entries that the record names as files although their contents are gone from the tree, because
            a later entry replaced them. If there are any, the record must be made again with them in ``embed``.
        unsure: further ones of which only the tree can tell that, see :func:`gone_from`; by their numbers.
    """

    entries: int
    lost: frozenset[int]
    unsure: dict[int, SplitEntry] = field(default_factory=dict)


def disassemble(
    stream: Readable, write: Callable[[bytes], object], *, embed: frozenset[int] = frozenset(), has_parent: bool = False
) -> Disassembled:
    """Read a tar stream to its end and write its record: everything but the contents of files.

    Memory does not grow with what the stream holds, only with the number of its names.

    Args:
        stream: the archive, uncompressed.
        write: gets the record, uncompressed.
        embed: numbers of entries whose contents go into the record, see :class:`Disassembled`.
        has_parent: whether it was unpacked over another layer, whose links it may follow.

    Raises:
        ArchiveError: the archive is damaged or hostile.
    """
    entries = EntryWriter(write)
    segment = _Segment(entries)
    reader = TarReader(stream, raw=segment.add)
    tracker = PayloadTracker(embed)
    files: dict[int, SplitEntry] = {}
    index = -1
    for entry in reader:
        index += 1
        if tracker.must_embed(index, entry):
            for piece in reader.contents():
                segment.add(piece)
            continue
        segment.flush()
        checksum = Checksum()
        for piece in reader.contents():
            checksum.update(piece)
        entries.file(entry.name, entry.stored_size, checksum.digest())
        if has_parent and entry.stored_size:
            files[index] = SplitEntry(FILE, checksum.digest(), entry.name, entry.stored_size)
    segment.flush()
    reader.drain()
    segment.flush()
    entries.end()
    unsure = {number: files[number] for number in tracker.unsure() if number in files}
    return Disassembled(index + 1, frozenset(tracker.late), unsure)


class _Segment:
    """Collects bytes that stand in the record as they are."""

    def __init__(self, entries: EntryWriter) -> None:
        self._entries = entries
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        while self._size + len(piece) > _SEGMENT_BYTES:
            fits = _SEGMENT_BYTES - self._size
            self._pieces.append(piece[:fits])
            piece = piece[fits:]
            self.flush()
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)

    def flush(self) -> None:
        self._entries.segment(b"".join(self._pieces))
        self._pieces = []
        self._size = 0


_PIECE_BYTES = 1 << 20


class FileSource(Protocol):
    """Where the contents of files are (:class:`unionfs.drivers.contract.FileGetCloser`)."""

    def get(self, name: bytes) -> BinaryIO: ...


def assemble(entries: Iterable[SplitEntry], files: FileSource) -> Iterator[bytes]:
    """The tar stream, in pieces of at most a segment or 1 MiB.

    Args:
        entries: the record (:func:`unionfs.layers.tar_split.read_entries`).
        files: the tree that the stream was unpacked into.

    Raises:
        LayerDamagedError: a file is missing, or is not what it was. Pieces of it were given out by then.
        TarSplitError: the record is damaged.
    """
    for entry in entries:
        if entry.kind != FILE:
            yield entry.payload
        elif entry.size:
            yield from _contents(entry, files)


def _contents(entry: SplitEntry, files: FileSource) -> Iterator[bytes]:
    shown = show(entry.name)
    try:
        file = files.get(b"/".join(clean_name(entry.name)))
    except OSError as error:
        raise LayerDamagedError(
            f'file integrity checksum failed for "{shown}": the file is not there any more ({error.strerror}); '
            "pull or register the layer again"
        ) from error
    checksum = Checksum()
    size = 0
    with file:
        # One byte more than there should be, so that a file that grew is noticed before it is given out whole.
        while size <= entry.size and (piece := file.read(min(_PIECE_BYTES, entry.size + 1 - size))):
            size += len(piece)
            checksum.update(piece)
            yield piece
    if size != entry.size or checksum.digest() != entry.payload:
        raise LayerDamagedError(
            f'file integrity checksum failed for "{shown}": its contents were changed in the layer store; '
            "pull or register the layer again"
        )


def gone_from(files: FileSource, entries: Mapping[int, SplitEntry]) -> frozenset[int]:
    """The numbers of those ``entries`` whose contents ``files`` do not have."""
    gone = set()
    for number, entry in entries.items():
        try:
            for _ in _contents(entry, files):
                pass
        except LayerDamagedError:
            gone.add(number)
    return frozenset(gone)


def verified(pieces: Iterable[bytes], diff_id: str) -> Iterator[bytes]:
    """``pieces``, with an error at the end if their digest is not ``diff_id``.

    Raises:
        LayerDamagedError: after the last piece.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if f"{ALGORITHM}:{digest.hexdigest()}" != diff_id:
        raise LayerDamagedError(
            f"could not verify layer data for: {diff_id}. This may be because internal files in the layer store were "
            "modified. Re-pulling or rebuilding this image may resolve the issue"
        )
