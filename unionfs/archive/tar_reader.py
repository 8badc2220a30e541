"""Reading a tar stream entry by entry, in constant memory and without trusting it.

Understood: v7, ustar, star's and GNU's headers (base-256 numbers, long names and links, old sparse files) and PAX
extended headers (names, sizes, owners, times, ``SCHILY.xattr.*``, GNU sparse 0.0, 0.1 and 1.0). Global PAX headers are
passed over, as Docker does. Every header is bounded: an extended one at 1 MiB, a sparse map likewise.

Python's ``tarfile`` is not used. It keeps every member, decodes names, follows what a header says about
sizes into memory, strips slashes, and gives no access to the raw header bytes that exact re-assembly needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol
from zlib import adler32

from unionfs.archive.tar_format import (
    BLOCK_BYTES,
    BLOCK_DEVICE,
    CHAR_DEVICE,
    CONTIGUOUS,
    DIRECTORY,
    GNU_LONG_LINK,
    GNU_LONG_NAME,
    GNU_SPARSE,
    HEADER_ONLY_TYPES,
    MAX_SPECIAL_BYTES,
    NS_PER_S,
    OLD_REGULAR,
    PAX_GLOBAL_HEADER,
    PAX_HEADER,
    REGULAR,
    XATTR_RECORD_PREFIX,
    TarEntry,
    show,
)
from unionfs.errors import ArchiveError

_PIECE_BYTES = 1 << 20
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_MAX_OFFSET = (1 << 63) - 1
_MAX_SPARSE_PIECES = 1 << 16
_MAX_ID = (1 << 32) - 1
# Numbers that may be negative, and how far: macOS has -1 and -2 for owners, a mode is cut to its bits anyhow.
_LOWEST = {"uid": -(1 << 31), "gid": -(1 << 31), "mode": -(1 << 63)}

RawSink = Callable[[bytes], None]
"""Gets every byte of the stream that is not contents: headers, padding, the end."""


class Readable(Protocol):
    """A binary stream; ``read`` may give fewer bytes than asked for, and gives none at the end."""

    def read(self, size: int, /) -> bytes | None: ...


class _Source:
    """Exact reads from a stream, buffered."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._buffer = b""
        self._at = 0
        self.offset = 0  # in the stream, for messages

    def up_to(self, size: int) -> bytes:
        """Between 1 and ``size`` bytes; none at the end of the stream."""
        if self._at == len(self._buffer):
            try:
                self._buffer = self._stream.read(_PIECE_BYTES) or b""
            except OSError as error:
                # Told apart from what goes wrong where the entries are put.
                raise ArchiveError(
                    f"the archive cannot be read (at byte {self.offset}): {error.strerror or error}; "
                    "check where it comes from and try again"
                ) from error
            self._at = 0
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
        self.offset += len(piece)
        return piece

    def exactly(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end of the stream."""
        piece = self.up_to(size)
        if len(piece) == size:
            return piece
        pieces = [piece]
        missing = size - len(piece)
        while missing and piece:
            piece = self.up_to(missing)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


class TarReader:
    """Iterates over the entries of a tar stream.

    The contents of an entry are read with :meth:`contents` before going on to the next; the rest of them is
    skipped.

    Args:
        stream: the uncompressed archive.
        raw: gets all bytes but contents, in order; contents lie between two calls exactly where they were.

    Raises:
        ArchiveError: while iterating or reading contents, for a damaged, cut off or hostile stream.
    """

    def __init__(self, stream: Readable, raw: RawSink | None = None) -> None:
        self._source = _Source(stream)
        self._raw = raw
        self._unread = 0  # contents of the current entry
        self._padding = 0
        self._done = False
        self._last_name = b""

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self.next()) is not None:
            yield entry

    def next(self) -> TarEntry | None:
        """The next entry; None at the end of the archive, more than once if asked."""
        if self._done:
            return None
        self._finish()
        pax: dict[bytes, bytes] = {}
        sparse_numbers: list[bytes] = []
        long_name: bytes | None = None
        long_link: bytes | None = None
        while True:
            block = self._header_block()
            if block is None:
                if pax or long_name is not None or long_link is not None:
                    raise self._broken("ends after an extended header, before the entry that it describes")
                self._done = True
                return None
            kind = block[156:157]
            if kind in (PAX_HEADER, PAX_GLOBAL_HEADER, GNU_LONG_NAME, GNU_LONG_LINK):
                body = self._special(block, kind)
                if kind == PAX_HEADER:
                    pax, sparse_numbers = self._pax(body)
                elif kind == GNU_LONG_NAME:
                    long_name = body.split(b"\0", 1)[0]
                elif kind == GNU_LONG_LINK:
                    long_link = body.split(b"\0", 1)[0]
                continue
            entry = self._basic(block, kind)
            if long_name is not None:
                entry.name = long_name
            if long_link is not None:
                entry.linkname = long_link
            self._apply_pax(entry, pax)
            self._last_name = entry.name
            self._sizes(entry)
            self._unread = entry.stored_size
            self._padding = -entry.stored_size % BLOCK_BYTES
            if kind == GNU_SPARSE:
                self._old_sparse(entry, block)
            elif entry.kind == REGULAR and (b"GNU.sparse.major" in pax or b"GNU.sparse.map" in pax or sparse_numbers):
                self._pax_sparse(entry, pax, sparse_numbers)
            return entry

    def contents(self) -> Iterator[bytes]:
        """The stored bytes of the current entry, in pieces; for a sparse entry those of its pieces, end to end."""
        while self._unread:
            piece = self._source.up_to(min(self._unread, _PIECE_BYTES))
            if not piece:
                raise self._broken(f"is cut off in the contents of {show(self._last_name)}")
            self._unread -= len(piece)
            yield piece

    def drain(self) -> None:
        """Read the rest of the stream: what writes it may wait for that, and a digest may cover it."""
        while piece := self._source.up_to(_PIECE_BYTES):
            if self._raw is not None:
                self._raw(piece)

    def _broken(self, what: str) -> ArchiveError:
        return ArchiveError(f"the archive {what} (at byte {self._source.offset}); fetch or make it again")

    def _finish(self) -> None:
        """Go past what is left of the current entry."""
        for _ in self.contents():
            pass
        if self._padding:
            pad = self._source.exactly(self._padding)
            self._padding = 0
            # Some writers leave out the padding of the very last entry; Go's reader accepts that too.
            if self._raw is not None:
                self._raw(pad)

    def _header_block(self) -> bytes | None:
        """The next header block; None at the end of the archive."""
        block = self._take_block()
        if block is None:
            return None
        if block == _ZERO_BLOCK:
            second = self._take_block()
            if second is None or second == _ZERO_BLOCK:
                return None
            raise self._broken("has a block of zeros between two entries")
        stored = _octal(block[148:156])
        # Adler-32's lower half is one more than the sum of the bytes, modulo 65521: exact for up to 256 of them, and a
        # tenth of the time that adding them up takes here.
        total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
        total += 8 * 0x20 - sum(block[148:156])
        if stored != total:
            # Some old writers summed signed bytes; there are none above 127 in most headers, so this is rare.
            high = sum(1 for byte in block if byte > 127) - sum(1 for byte in block[148:156] if byte > 127)
            if stored != total - 256 * high:
                raise self._broken("has a header with a wrong checksum, it is damaged or not a tar archive")
        return block

    def _take_block(self) -> bytes | None:
        block = self._source.exactly(BLOCK_BYTES)
        if self._raw is not None and block:
            self._raw(block)
        if not block:
            return None
        if len(block) < BLOCK_BYTES:
            raise self._broken("is cut off in a header")
        return block

    def _special(self, block: bytes, kind: bytes) -> bytes:
        """The contents of an extended header."""
        size = self._number(block[124:136], "size")
        if size > MAX_SPECIAL_BYTES:
            raise self._broken(f"has an extended header of {size} bytes, more than the 1 MiB allowed")
        padded = size + -size % BLOCK_BYTES
        body = self._source.exactly(padded)
        if self._raw is not None and body:
            self._raw(body)
        if len(body) < size:
            raise self._broken("is cut off in an extended header")
        return body[:size]

    def _number(self, field: bytes, what: str) -> int:
        """A number field, octal or base-256; see ``_LOWEST`` for what can be negative."""
        if field[0] & 0x80:
            value = int.from_bytes(field, "big") & ~(0x80 << (8 * (len(field) - 1)))
            if field[0] & 0x40:
                value -= 1 << (8 * len(field) - 1)
        else:
            parsed = _octal(field)
            if parsed is None:
                raise self._broken(f"has a header whose {what} is not a number")
            value = parsed
        if not _LOWEST.get(what, 0) <= value <= _MAX_OFFSET and what != "mtime":
            raise self._broken(f"has a header whose {what} is out of range")
        return value

    def _basic(self, block: bytes, kind: bytes) -> TarEntry:
        name = _text(block[0:100])
        magic = block[257:265]
        if magic == b"ustar\x0000":
            # star keeps times where POSIX has the last bytes of the prefix, and says so at the very end.
            prefix = _text(block[345:476] if block[508:512] == b"tar\0" else block[345:500])
            if prefix:
                name = prefix + b"/" + name
        if kind == OLD_REGULAR:
            # Before there was a type for directories, a slash at the end made one.
            kind = DIRECTORY if name.endswith(b"/") else REGULAR
        size = self._number(block[124:136], "size")
        # Writers leave anything in the device fields of what is no device.
        device = kind in (CHAR_DEVICE, BLOCK_DEVICE) and magic[:5] == b"ustar"
        return TarEntry(
            name=name,
            kind=kind,
            # Docker 23 and older put the file type into the mode too.
            mode=self._number(block[100:108], "mode") & 0o7777,
            uid=self._number(block[108:116], "uid"),
            gid=self._number(block[116:124], "gid"),
            size=size,
            stored_size=size,
            mtime_ns=self._number(block[136:148], "mtime") * NS_PER_S,
            linkname=_text(block[157:257]),
            major=self._number(block[329:337], "device number") if device else 0,
            minor=self._number(block[337:345], "device number") if device else 0,
        )

    def _pax(self, body: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
        """The records of an extended header, and the numbers of a GNU sparse 0.0 map, whose keys repeat."""
        records: dict[bytes, bytes] = {}
        sparse: list[bytes] = []
        at = 0
        while at < len(body):
            space = body.find(b" ", at, at + 20)
            digits = body[at:space] if space > 0 else b""
            end = at + int(digits) if digits.isdigit() else 0
            key, equals, value = body[space + 1 : end - 1].partition(b"=")
            if end <= space + 1 or end > len(body) or body[end - 1 : end] != b"\n" or not equals or not key:
                raise self._broken("has a PAX header with a malformed record")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                if len(sparse) % 2 != (key == b"GNU.sparse.numbytes"):
                    raise self._broken("has a sparse map with its numbers out of order")
                sparse.append(value)
            elif key in (b"path", b"linkpath") and b"\0" in value:
                raise self._broken("has a name with a NUL in it")
            else:
                records[key] = value
            at = end
        return records, sparse

    def _apply_pax(self, entry: TarEntry, pax: dict[bytes, bytes]) -> None:
        for key, value in pax.items():
            if key.startswith(XATTR_RECORD_PREFIX):
                name = key[len(XATTR_RECORD_PREFIX) :].decode("utf-8", "surrogateescape")
                entry.xattrs[name] = value
            elif not value:
                continue  # an empty record leaves what the header says (as Go reads it)
            elif key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.linkname = value
            elif key == b"size":
                entry.size = entry.stored_size = self._pax_number(key, value)
            elif key == b"uid":
                entry.uid = self._pax_id(key, value)
            elif key == b"gid":
                entry.gid = self._pax_id(key, value)
            elif key == b"mtime":
                entry.mtime_ns = self._pax_time(key, value)
            elif key == b"atime":
                entry.atime_ns = self._pax_time(key, value)

    def _pax_number(self, key: bytes, value: bytes) -> int:
        if value.isdigit() and len(value) <= 19 and int(value) <= _MAX_OFFSET:
            return int(value)
        raise self._broken(f"has a PAX header whose {show(key)} is not a number in range")

    def _pax_id(self, key: bytes, value: bytes) -> int:
        sign = -1 if value.startswith(b"-") else 1
        number = sign * self._pax_number(key, value[1:] if sign < 0 else value)
        if number < _LOWEST[key.decode()]:
            raise self._broken(f"has a PAX header whose {show(key)} is not a number in range")
        return number

    def _pax_time(self, key: bytes, value: bytes) -> int:
        """Nanoseconds of a decimal number of seconds, exactly: a float would lose the last digits."""
        sign = -1 if value.startswith(b"-") else 1
        whole, _, fraction = value.lstrip(b"-").partition(b".")
        if not whole.isdigit() or len(whole) > 19 or (fraction and not fraction.isdigit()):
            raise self._broken(f"has a PAX header whose {show(key)} is not a time")
        return sign * (int(whole) * NS_PER_S + int(fraction[:9].ljust(9, b"0")))

    def _sizes(self, entry: TarEntry) -> None:
        if entry.kind in HEADER_ONLY_TYPES:
            entry.size = entry.stored_size = 0
        elif entry.kind == CONTIGUOUS:
            entry.kind = REGULAR  # a hint to the file system, of no meaning on Linux
        if entry.uid > _MAX_ID or entry.gid > _MAX_ID:
            raise ArchiveError(
                f"{entry.shown_name()}: owner {entry.uid}:{entry.gid} is no id that Linux has; make the archive again"
            )
        entry.uid, entry.gid = _linux_id(entry.uid), _linux_id(entry.gid)

    def _old_sparse(self, entry: TarEntry, block: bytes) -> None:
        """GNU's own sparse format: four pieces in the header, more in blocks after it."""
        entry.kind = REGULAR
        numbers: list[int] = []
        more = self._sparse_fields(block[386:482], numbers) and block[482] != 0
        size = self._number(block[483:495], "size")
        while more:
            extension = self._take_block()
            if extension is None:
                raise self._broken("is cut off in a sparse map")
            more = self._sparse_fields(extension[:504], numbers) and extension[504] != 0
        self._set_sparse(entry, numbers, size)

    def _sparse_fields(self, fields: bytes, numbers: list[int]) -> bool:
        """Add the map entries in ``fields``; whether there may be more."""
        for at in range(0, len(fields), 24):
            pair = fields[at : at + 24]
            if pair[0] == 0:
                return False
            numbers += (self._number(pair[:12], "sparse offset"), self._number(pair[12:], "sparse length"))
            if len(numbers) > 2 * _MAX_SPARSE_PIECES:
                raise self._broken("has a sparse file with too many pieces")
        return True

    def _pax_sparse(self, entry: TarEntry, pax: dict[bytes, bytes], repeated: list[bytes]) -> None:
        name = pax.get(b"GNU.sparse.name")
        if name:
            entry.name = self._last_name = name
        size_key = b"GNU.sparse.realsize" if b"GNU.sparse.realsize" in pax else b"GNU.sparse.size"
        size = self._pax_number(size_key, pax.get(size_key, b""))
        if pax.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map_in_contents(entry)
        else:
            texts = repeated or [text for text in pax.get(b"GNU.sparse.map", b"").split(b",") if text]
            numbers = [self._pax_number(b"GNU.sparse.map", text) for text in texts]
        self._set_sparse(entry, numbers, size)

    def _sparse_map_in_contents(self, entry: TarEntry) -> list[int]:
        """Sparse 1.0: decimal numbers, one a line, the count of pieces first, padded to whole blocks."""
        numbers: list[int] = []
        wanted = 1
        rest = b""
        read = 0
        while len(numbers) < wanted:
            if read >= MAX_SPECIAL_BYTES or self._unread < BLOCK_BYTES:
                raise self._broken(f"has a sparse map that does not end, in {entry.shown_name()}")
            block = self._source.exactly(BLOCK_BYTES)
            if len(block) < BLOCK_BYTES:
                raise self._broken("is cut off in a sparse map")
            read += BLOCK_BYTES
            self._unread -= BLOCK_BYTES
            entry.stored_size -= BLOCK_BYTES
            if self._raw is not None:
                self._raw(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if len(numbers) == wanted:
                    break
                numbers.append(self._pax_number(b"sparse map", line))
                if len(numbers) == 1:
                    if numbers[0] > _MAX_SPARSE_PIECES:
                        raise self._broken("has a sparse file with too many pieces")
                    wanted = 1 + 2 * numbers[0]
        return numbers[1:]

    def _set_sparse(self, entry: TarEntry, numbers: list[int], size: int) -> None:
        """Check the map against the sizes, so that who writes the file need not."""
        pieces = list(zip(numbers[::2], numbers[1::2], strict=False))
        end = 0
        for offset, length in pieces:
            if offset < end or offset + length > size:
                raise self._broken(f"has a sparse map that contradicts itself, in {entry.shown_name()}")
            end = offset + length
        if len(numbers) % 2 or sum(length for _, length in pieces) != self._unread:
            raise self._broken(f"has a sparse map that does not match the contents of {entry.shown_name()}")
        entry.sparse = pieces
        entry.size = size


@functools.lru_cache(maxsize=4096)  # modes, owners and times are the same from entry to entry
def _octal(field: bytes) -> int | None:
    """An octal field, surrounded by spaces or NULs; empty counts as zero, as everywhere."""
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        digits = field.strip(b" \0")
        if not digits:
            return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _linux_id(number: int) -> int:
    """The id that chown(2) makes of a number: ids have 32 bits, and -1 leaves the owner, who is root here.

    Negative ones are macOS': nobody is -2 there.
    """
    return 0 if number & _MAX_ID == _MAX_ID else number & _MAX_ID


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]
