"""The tar format's entries, and their headers as bytes.

Headers are written as Go's ``archive/tar`` writes them for Docker, so that an archive of the same tree has the
same digest whoever made it: plain ustar where everything fits, else one PAX extended header whose records are
sorted by key. Source of the layout: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; of
the choices: the behaviour of Go's writer.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from unionfs.errors import ArchiveError

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)

REGULAR = b"0"
HARD_LINK = b"1"
SYMLINK = b"2"
CHAR_DEVICE = b"3"
BLOCK_DEVICE = b"4"
DIRECTORY = b"5"
FIFO = b"6"
CONTIGUOUS = b"7"
PAX_HEADER = b"x"
PAX_GLOBAL_HEADER = b"g"
GNU_LONG_NAME = b"L"
GNU_LONG_LINK = b"K"
GNU_SPARSE = b"S"
OLD_REGULAR = b"\0"

# These carry no contents, whatever their size field says.
HEADER_ONLY_TYPES = frozenset({HARD_LINK, SYMLINK, CHAR_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO})

XATTR_RECORD_PREFIX = b"SCHILY.xattr."

# A PAX or long-name header bigger than this is an attack on memory (the limit of Go's archive/tar).
MAX_SPECIAL_BYTES = 1 << 20

NS_PER_S = 1_000_000_000

_NAME_BYTES = 100
_PREFIX_BYTES = 155
_MAX_OCTAL_7 = 0o7777777
_MAX_OCTAL_11 = 0o77777777777

_KIND_OF_TYPE = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}


@dataclass(slots=True)
class TarEntry:
    """One entry of an archive.

    Attributes:
        name: path in the archive, as in its header; a directory's ends with a slash when it is written.
        kind: the type flag, one byte.
        mode: permission bits, 07777 at most.
        uid, gid: owner, as numbers of the archive (container ids).
        size: length of the file in bytes once unpacked.
        stored_size: bytes of contents that follow the header; differs from ``size`` for sparse entries.
        mtime_ns: modification time in nanoseconds since 1970.
        atime_ns: access time likewise, None when the archive does not give it.
        linkname: target of a symlink or hard link.
        major, minor: device numbers.
        xattrs: extended attributes by full name.
        sparse: (offset, length) in bytes of the pieces that are stored, for a sparse entry.
    """

    name: bytes
    kind: bytes = REGULAR
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    stored_size: int = 0
    mtime_ns: int = 0
    atime_ns: int | None = None
    linkname: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    sparse: list[tuple[int, int]] | None = None

    def shown_name(self) -> str:
        """The name for a message."""
        return show(self.name)


def show(name: bytes) -> str:
    """``name`` for a message: one printable line whatever its bytes are."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "(empty name)"


def kind_of_mode(mode: int) -> bytes | None:
    """The type flag for a file of this ``st_mode``; None for a socket, which tar cannot represent."""
    return _KIND_OF_TYPE.get(stat.S_IFMT(mode))


def padding(size: int) -> bytes:
    """The zero bytes that fill the last block of ``size`` bytes of contents."""
    return bytes(-size % BLOCK_BYTES)


def encode_entry(entry: TarEntry) -> bytes:
    """The header block of ``entry``, after its PAX extended header where one is needed.

    Times are cut to whole seconds, access times and owners' names left out, as Docker does.

    Raises:
        ArchiveError: a value that no header can hold (a NUL in a name, a device number above 21 bits).
    """
    records: dict[bytes, bytes] = {}
    prefix = b""
    name, linkname = entry.name, entry.linkname
    if b"\0" in name or b"\0" in linkname:
        raise ArchiveError(f"{entry.shown_name()}: a tar archive cannot hold a name with a NUL; rename it")
    if len(name) > _NAME_BYTES or not _is_ascii(name):
        split = _split_name(name)
        # A record is written whenever the name does not fit the old field, but only counts when the split does
        # not do either (or another value needs an extended header anyway).
        records[b"path"] = name
        if split is not None:
            prefix, name = split
    if len(linkname) > _NAME_BYTES or not _is_ascii(linkname):
        records[b"linkpath"] = linkname
    mtime_s = entry.mtime_ns // NS_PER_S
    for key, value, limit in (
        (b"uid", entry.uid, _MAX_OCTAL_7),
        (b"gid", entry.gid, _MAX_OCTAL_7),
        (b"size", entry.size, _MAX_OCTAL_11),
        (b"mtime", mtime_s, _MAX_OCTAL_11),
    ):
        if not 0 <= value <= limit:
            records[key] = b"%d" % value
    for xattr, content in entry.xattrs.items():
        key = XATTR_RECORD_PREFIX + xattr.encode("utf-8", "surrogateescape")
        if b"=" in key:
            raise ArchiveError(f"{entry.shown_name()}: the xattr name {xattr!r} has a '='; remove that xattr")
        records[key] = content
    for number in (entry.major, entry.minor):
        if not 0 <= number <= _MAX_OCTAL_7:
            raise ArchiveError(f"{entry.shown_name()}: device number {number} does not fit a tar header; remove it")

    if not records or (prefix and records.keys() == {b"path"}):
        return _block(entry, name, prefix, mtime_s)
    extended = b"".join(_record(key, records[key]) for key in sorted(records))
    if len(extended) > MAX_SPECIAL_BYTES:
        raise ArchiveError(f"{entry.shown_name()}: its xattrs exceed the 1 MiB of a PAX header; remove some")
    return b"".join(
        (
            _pax_block(entry.name, len(extended)),
            extended,
            padding(len(extended)),
            _block(entry, entry.name, b"", mtime_s),
        )
    )


def _is_ascii(name: bytes) -> bool:
    return name.isascii()


def _split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """``name`` as ustar's prefix and name fields; None when it does not fit or is not ASCII."""
    length = len(name)
    if length <= _NAME_BYTES or not name.isascii():
        return None
    if length > _PREFIX_BYTES + 1:
        length = _PREFIX_BYTES + 1
    elif name.endswith(b"/"):
        length -= 1
    cut = name.rfind(b"/", 0, length)
    rest = len(name) - cut - 1
    if cut <= 0 or not 0 < rest <= _NAME_BYTES or cut > _PREFIX_BYTES:
        return None
    return name[:cut], name[cut + 1 :]


def _record(key: bytes, value: bytes) -> bytes:
    """One PAX record; its length counts the digits of the length itself."""
    body = len(key) + len(value) + 3  # the space, the "=" and the newline
    size = body + len(b"%d" % body)
    size = body + len(b"%d" % size)
    return b"%d %s=%s\n" % (size, key, value)


def _octal(value: int, digits: int) -> bytes:
    # What does not fit is in a PAX record; the field then holds zero, as Go leaves it.
    if not 0 <= value < 8**digits:
        value = 0
    return b"%0*o\0" % (digits, value)


def _field(value: bytes, size: int) -> bytes:
    """``value`` in a header field of ``size`` bytes, best effort: a PAX record holds what does not fit."""
    if not value.isascii():
        value = bytes(byte for byte in value if byte < 0x80)
    if len(value) > size:
        cut = value[:size]
        # Old readers take a name that ends with a slash for a directory's.
        value = cut[: size - 1].rstrip(b"/") if cut.endswith(b"/") else cut
    return value.ljust(size, b"\0")


def _block(entry: TarEntry, name: bytes, prefix: bytes, mtime_s: int) -> bytes:
    block = b"".join(
        (
            _field(name, _NAME_BYTES),
            _octal(entry.mode & 0o7777, 7),
            _octal(entry.uid, 7),
            _octal(entry.gid, 7),
            _octal(entry.size, 11),
            _octal(mtime_s, 11),
            b"        ",  # the checksum counts its own field as spaces
            entry.kind,
            _field(entry.linkname, _NAME_BYTES),
            b"ustar\x0000",
            bytes(64),  # owners' names: left empty, they are the host's
            _octal(entry.major, 7),
            _octal(entry.minor, 7),
            prefix.ljust(_PREFIX_BYTES, b"\0"),
            bytes(12),
        )
    )
    return _checksummed(block)


def _pax_block(name: bytes, size: int) -> bytes:
    """The header block of a PAX extended header of ``size`` bytes for the entry ``name``."""
    parent, _, base = name.rpartition(b"/")
    shown = b"/".join(part for part in (*_clean(parent), b"PaxHeaders.0", base) if part)
    if name.startswith(b"/"):
        shown = b"/" + shown
    shown = bytes(byte for byte in shown if byte < 0x80)[:_NAME_BYTES].rstrip(b"/")
    block = b"".join(
        (
            shown.ljust(_NAME_BYTES, b"\0"),
            _octal(0, 7) * 3,
            _octal(size, 11),
            _octal(0, 11),
            b"        ",
            PAX_HEADER,
            bytes(_NAME_BYTES),
            b"ustar\x0000",
            bytes(64 + 16 + _PREFIX_BYTES + 12),
        )
    )
    return _checksummed(block)


def _clean(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _checksummed(block: bytes) -> bytes:
    return b"%s%06o\0 %s" % (block[:148], sum(block), block[156:])
