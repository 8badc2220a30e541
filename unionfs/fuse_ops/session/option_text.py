"""The text after ``-o``: how it becomes :class:`MountOptions`, and how values are written for it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from unionfs.errors import OptionError
from unionfs.fuse_ops.options import SPEEDUPS, MountOptions, RedirectMode, XattrPermissions, default_fuse_options
from unionfs.overlay.idmap import IdMap, IdRange


class ParsedOptions(NamedTuple):
    """What ``parse_options`` found: the mount, and the options that mean nothing to us."""

    options: MountOptions
    ignored: list[str]


# A layer path given twice is a mistake worth an error even when both are equal; a setting repeated with the same
# value is what configuration files produce.
_ONCE = frozenset({"lowerdir", "upperdir", "workdir"})
_REPEATED = frozenset({"lowerdir+", "datadir+"})
_SETTINGS = _ONCE | {
    "quota",
    "uidmapping",
    "gidmapping",
    "squash_to_root",
    "squash_to_uid",
    "squash_to_gid",
    "static_nlink",
    "noacl",
    "noxattrs",
    "xattr_permissions",
    "volatile",
    "fsync",
    "timeout",
    "redirect_dir",
    "metacopy",
    "index",
    "nfs_export",
    "verity",
    "xino",
    "userxattr",
    "context",
    "writeback",
    "passthrough",
    "transport",
    "speedups",
    "debug",
    "exclusive",
    "fsname",
}

# Options of the FUSE mount, by the property they decide: the last one for a property counts, as in mount(8).
_FUSE_PROPERTIES = {
    "ro": "ro",
    "rw": "ro",
    "suid": "suid",
    "nosuid": "suid",
    "dev": "dev",
    "nodev": "dev",
    "exec": "exec",
    "noexec": "exec",
    "atime": "atime",
    "noatime": "atime",
    "sync": "sync",
    "async": "sync",
    "dirsync": "dirsync",
    "allow_other": "allow",
    "allow_root": "allow",
    "default_permissions": "default_permissions",
    "auto_unmount": "auto_unmount",
}

# Options that callers of other union mounts give, which have nothing to decide here: pyfuse3 and the kernel
# negotiate buffer sizes and splicing by themselves, and requests are always served concurrently.
# ``max_read`` must not reach libfuse: it refuses the session when its user does not repeat the number.
_NOTHING_TO_DO = frozenset(
    {
        "defaults",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
        "silent",
        "kernel_cache",
        "auto_cache",
        "ac_attr_timeout",
        "splice_read",
        "no_splice_read",
        "splice_write",
        "no_splice_write",
        "splice_move",
        "no_splice_move",
        "max_read",
        "max_write",
        "max_readahead",
        "max_background",
        "max_threads",
        "max_idle_threads",
        "congestion_threshold",
        "async_read",
        "sync_read",
        "async_dio",
        "big_writes",
        "clone_fd",
        "threaded",
        "fast_ino",
        "fast_ino_check",
        "ino32_t",
        "plugins",
        "uuid",
        "fscontext",
        "defcontext",
        "rootcontext",
    }
)

_SIZE_UNITS = "bkmgtp"
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+) ?(?P<unit>[a-z]*)\Z", re.ASCII)
_MAX_SIZE_BYTES = (1 << 63) - 1
_MAX_ID = 2**32 - 2  # (uid_t)-1 means "no change" to chown(2), so nothing can be owned by it


def parse_size(text: str) -> int:
    """A size in bytes from ``50M``, ``1.5 GiB``, ``1024``: units are powers of 1024, in any case.

    Raises:
        OptionError: it is no size, or too large for a file system.
    """
    match = _SIZE.match(text.strip().lower())
    if match is None:
        raise OptionError(f"invalid size: '{text}'; write a number and a unit, such as 10G")
    unit = match["unit"]
    if unit and not (unit[0] in _SIZE_UNITS and (unit[1:] in ("", "b", "ib")) and unit not in ("bb", "bib")):
        raise OptionError(f"invalid suffix: '{unit}'; use one of b, k, m, g, t, p")
    size = float(match["number"]) * 1024 ** (_SIZE_UNITS.index(unit[0]) if unit else 0)
    if not math.isfinite(size) or size > _MAX_SIZE_BYTES:
        raise OptionError(f"invalid size: '{text}' is too large; use less than 8 EiB")
    return int(size)


def escape_value(value: str) -> str:
    r"""Write ``value`` for use after ``name=`` in ``-o``: ``\`` before what would end it."""
    escaped = _SPECIAL.sub(r"\\\g<0>", value)
    # Quotation marks matter only as the first character.
    return "\\" + escaped if escaped.startswith('"') else escaped


def format_layers(lowerdirs: Iterable[str], datadirs: Iterable[str] = ()) -> str:
    """The value of ``lowerdir=`` for these directories, each list top first."""
    lowers = ":".join(escape_value(path) for path in lowerdirs)
    return lowers + "".join("::" + escape_value(path) for path in datadirs)


def remount_options(texts: Iterable[str]) -> list[str] | None:
    """The options in ``texts``, one for each ``-o``, if they ask for a change of a mount that exists; else None."""
    options = [option for text in texts for option in _split(text, ",")]
    return options if "remount" in options else None


def parse_options(
    texts: Iterable[str],
    source: str | None = None,
    *,
    cwd: str | None = None,
    privileged: bool | None = None,
) -> ParsedOptions:
    """Make a mount description of ``texts``, one for each ``-o`` on the command line.

    ``source`` is what the mount table shows as the mounted device. Relative paths are taken from ``cwd``, the
    working directory unless given. They are not normalized: a ``..`` after a symbolic link, as engines write
    them, means the parent of the link's target.
    """
    given = _Given()
    for text in texts:
        for option in _split(text, ","):
            given.add(option)
    return ParsedOptions(_to_options(given, source, cwd, privileged), given.ignored)


class _Given:
    """The options given so far, and typed access to them."""

    def __init__(self) -> None:
        self.ignored: list[str] = []
        self.fuse: dict[str, str] = {}
        self._settings: dict[str, str | None] = {}
        self._repeated: dict[str, list[str]] = {}

    def add(self, option: str) -> None:
        if not option:
            return  # engines leave nothing between two commas where a list of theirs was empty
        key, equals, raw = option.partition("=")
        value = _unquote(raw, option) if equals else None
        if key == "sync" and value is not None:
            key = "fsync"  # fuse-overlayfs 2.0's name; without a value it is mount(8)'s
        if key in _FUSE_PROPERTIES and value is None:
            self.fuse[_FUSE_PROPERTIES[key]] = key
        elif key in _REPEATED:
            self._repeated.setdefault(key, []).append(_needed(key, value))
        elif key in _SETTINGS:
            self._set(key, value)
        elif key not in _NOTHING_TO_DO:
            self.ignored.append(option)

    def _set(self, key: str, value: str | None) -> None:
        if key in self._settings:
            earlier = self._settings[key]
            if key in _ONCE or earlier != value:
                raise OptionError(
                    f"option {key} is given twice ({_shown(key, earlier)} and {_shown(key, value)}); keep one"
                )
        self._settings[key] = value

    def has(self, key: str) -> bool:
        return key in self._settings

    def repeated(self, key: str) -> list[str]:
        return [_unescape(value) for value in self._repeated.get(key, [])]

    def raw(self, key: str) -> str | None:
        """The value with its escapes, or None when the option is absent."""
        if key not in self._settings:
            return None
        return _needed(key, self._settings[key])

    def text(self, key: str) -> str | None:
        value = self.raw(key)
        return None if value is None else _unescape(value)

    def choice(self, key: str, allowed: Iterable[str], default: str) -> str:
        value = self.text(key)
        if value is None:
            return default
        if value not in allowed:
            raise OptionError(f"option {_shown(key, value)}: write {key}= with one of {', '.join(allowed)}")
        return value

    def speedups(self) -> frozenset[str]:
        """``on``, ``off``, or names with ``+`` between them."""
        value = self.text("speedups")
        if value in (None, "on"):
            return SPEEDUPS
        if value == "off":
            return frozenset()
        assert value is not None
        names = frozenset(value.split("+"))
        if not names <= SPEEDUPS:
            raise OptionError(
                f"option {_shown('speedups', value)}: write speedups=on, speedups=off, or some of "
                f"{'+'.join(sorted(SPEEDUPS))}"
            )
        return names

    def switch(self, key: str, default: bool = False) -> bool:
        """``on`` or ``off``."""
        return self.choice(key, ("on", "off"), "on" if default else "off") == "on"

    def flag(self, key: str, default: bool = False) -> bool:
        """The name alone, or with 0 or 1."""
        if key not in self._settings:
            return default
        value = self._settings[key]
        if value not in (None, "0", "1"):
            raise OptionError(f"option {_shown(key, value)}: write {key}=0 or {key}=1")
        return value != "0"

    def user_id(self, key: str) -> int | None:
        value = self.text(key)
        return None if value is None else _number(key, value, value, 0, _MAX_ID)

    def size(self, key: str) -> int:
        """A number of bytes; 0 when the option is absent."""
        value = self.text(key)
        try:
            return 0 if value is None else parse_size(value)
        except OptionError as error:
            raise OptionError(f"option {_shown(key, value)}: {error}") from None

    def id_map(self, key: str) -> IdMap:
        value = self.text(key)
        if value is None:
            return IdMap()
        fields = value.removeprefix(":").split(":")
        if len(fields) % 3:
            raise OptionError(
                f"option {_shown(key, value)}: a mapping is triples container-id:host-id:count, "
                f"but there are {len(fields)} numbers; write for example {key}=0:100000:65536"
            )
        ranges = []
        for at in range(0, len(fields), 3):
            disk = _number(key, value, fields[at], 0, _MAX_ID)
            shown = _number(key, value, fields[at + 1], 0, _MAX_ID)
            length = _number(key, value, fields[at + 2], 1, _MAX_ID + 1 - max(disk, shown))
            ranges.append(IdRange(container=disk, host=shown, count=length))
        return IdMap(ranges)

    def seconds(self, key: str, default: float) -> float:
        value = self.text(key)
        if value is None:
            return default
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise OptionError(
                f"option {_shown(key, value)}: {value!r} is not a number of seconds; write for example {key}=60"
            )
        return seconds


def _to_options(given: _Given, source: str | None, cwd: str | None, privileged: bool | None) -> MountOptions:
    for key in ("index", "nfs_export"):
        if given.switch(key):
            raise OptionError(f"option {key}=on is not supported here; leave it out or write {key}=off")
    if given.choice("verity", ("off", "on", "require"), "off") != "off":
        raise OptionError("option verity is not supported here: digests would not be checked; leave it out")

    lowerdirs, datadirs = _layers(given)
    upperdir, workdir = given.text("upperdir"), given.text("workdir")
    if upperdir is not None and workdir is None:
        raise OptionError(
            f"option upperdir={upperdir} needs a workdir; add workdir=DIR, an empty directory on the same file system"
        )
    if upperdir == "" or workdir == "":
        raise OptionError("options upperdir and workdir need a directory each, but one is empty")

    redirect_dir = RedirectMode(
        given.choice("redirect_dir", [mode.value for mode in RedirectMode], RedirectMode.ON.value)
    )
    metacopy = given.switch("metacopy")
    if metacopy and redirect_dir is not RedirectMode.ON:
        # A metadata-only copy that is renamed finds its data through a redirect.
        raise OptionError(
            f"options metacopy=on and redirect_dir={redirect_dir.value} exclude each other; "
            "write redirect_dir=on or metacopy=off"
        )

    if privileged is None:
        privileged = os.geteuid() == 0
    fuse = {_FUSE_PROPERTIES[option]: option for option in default_fuse_options(privileged)} | given.fuse
    if not privileged:
        # fusermount3 would print a warning of its own for each.
        for option in ("suid", "dev"):
            if fuse.get(option) == option:
                del fuse[option]
                given.ignored.append(option)
    # Without an upper the kernel can refuse writes by itself.
    read_only = upperdir is None or fuse.get("ro") == "ro"
    if read_only:
        fuse["ro"] = "ro"

    quota_bytes = given.size("quota")
    if quota_bytes:
        # The kernel would take what is written before anybody asks whether there is room.
        for key in ("writeback", "passthrough"):
            if given.has(key) and given.flag(key):
                raise OptionError(f"options quota and {key}=1 exclude each other; leave one of them out")

    def absolute(path: str) -> str:
        return path if path.startswith("/") else os.path.join(os.getcwd() if cwd is None else cwd, path)

    squash = given.flag("squash_to_root")
    squash_uid, squash_gid = given.user_id("squash_to_uid"), given.user_id("squash_to_gid")
    return MountOptions(
        lowerdirs=tuple(absolute(path) for path in lowerdirs),
        datadirs=tuple(absolute(path) for path in datadirs),
        upperdir=None if upperdir is None else absolute(upperdir),
        # A work directory alone has nothing to work for, and must not be emptied.
        workdir=None if workdir is None or upperdir is None else absolute(workdir),
        quota_bytes=0 if read_only else quota_bytes,
        uid_map=given.id_map("uidmapping"),
        gid_map=given.id_map("gidmapping"),
        squash_uid=0 if squash and squash_uid is None else squash_uid,
        squash_gid=0 if squash and squash_gid is None else squash_gid,
        static_nlink=given.flag("static_nlink"),
        acl=not given.flag("noacl"),
        xattrs=not given.flag("noxattrs"),
        xattr_permissions=XattrPermissions(int(given.choice("xattr_permissions", ("0", "1", "2"), "0"))),
        volatile=given.flag("volatile"),
        fsync=given.flag("fsync", default=True),
        timeout_s=given.seconds("timeout", 1e9),
        redirect_dir=redirect_dir,
        metacopy=metacopy,
        xino=given.choice("xino", ("on", "off", "auto"), "auto"),
        userxattr=given.flag("userxattr"),
        writeback=given.flag("writeback", default=not quota_bytes),
        passthrough=given.flag("passthrough", default=not quota_bytes),
        speedups=given.speedups(),
        transport=given.choice("transport", ("auto", "direct", "pyfuse3"), "auto"),
        read_only=read_only,
        debug=given.flag("debug"),
        exclusive=given.flag("exclusive"),
        source=source or given.text("fsname") or "unionfs",
        context=given.text("context"),
        fuse_options=tuple(fuse.values()),
    )


def _layers(given: _Given) -> tuple[list[str], list[str]]:
    """The lower directories and the data-only ones, top first."""
    joined = given.raw("lowerdir")
    lowerdirs, datadirs = given.repeated("lowerdir+"), given.repeated("datadir+")
    if joined is None:
        if not lowerdirs:
            raise OptionError("no lowerdir is given; add -o lowerdir=TOP:...:BOTTOM, the directories to stack")
    elif lowerdirs or datadirs:
        raise OptionError("options lowerdir= and lowerdir+= or datadir+= exclude each other; use one form")
    else:
        # An empty name between two colons says that what follows holds data only.
        names = _split(joined, ":")
        data_only = False
        for at, name in enumerate(names):
            if name and data_only and names[at - 1]:
                raise OptionError(
                    f"option lowerdir: {_unescape(name)} follows a data-only layer; write :: before it, "
                    "or move it before the first ::"
                )
            if name:
                (datadirs if data_only else lowerdirs).append(_unescape(name))
            elif not lowerdirs or at == len(names) - 1 or not names[at + 1]:
                raise OptionError(
                    f"option lowerdir={_abbreviated(joined)}: a directory name is empty; remove the extra "
                    "colon, or write \\: for a colon in a name"
                )
            else:
                data_only = True
    if "" in lowerdirs or "" in datadirs:
        raise OptionError("options lowerdir+ and datadir+ need a directory each, but one is empty")
    return lowerdirs, datadirs


_SPECIAL = re.compile(r"[\\,:]")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# What separates options: everything up to the separator, a backslash taking the next character with it, and a
# value in quotation marks being one piece.
_QUOTED = re.compile(r'[^\\,="]*="(?:[^"\\]|\\.)*"(?=,|\Z)', re.DOTALL)


def _split(text: str, separator: str) -> list[str]:
    """The pieces of ``text`` between unescaped separators, their escapes kept."""
    plain = re.compile(rf"(?:[^\\{separator}]|\\.|\\\Z)*", re.DOTALL)
    pieces = []
    at = 0
    while True:
        match = (_QUOTED.match(text, at) if separator == "," else None) or plain.match(text, at)
        assert match is not None  # ``plain`` matches nothing at all too
        pieces.append(match.group())
        at = match.end()
        if at == len(text):
            return pieces
        at += 1


def _unquote(value: str, option: str) -> str:
    if not value.startswith('"'):
        return value
    if len(value) < 2 or not _QUOTED.fullmatch(option):
        raise OptionError(f'option {_abbreviated(option)}: the quotation mark is not closed; add a " at the end')
    return value[1:-1]


def _unescape(value: str) -> str:
    return _ESCAPE.sub(r"\1", value)


def _needed(key: str, value: str | None) -> str:
    if value is None:
        raise OptionError(f"option {key} needs a value; write {key}=...")
    return value


def _shown(key: str, value: str | None) -> str:
    return key if value is None else f"{key}={_abbreviated(value)}"


def _abbreviated(text: str) -> str:
    """Layer lists reach 100 KB, which is no use in a message."""
    return text if len(text) <= 200 else text[:160] + "..." + text[-30:]


def _number(key: str, value: str, digits: str, low: int, high: int) -> int:
    # int() also takes signs, spaces, underscores and other scripts' digits, none of which any caller means.
    if not (digits.isascii() and digits.isdigit()):
        raise OptionError(f"option {_shown(key, value)}: {digits!r} is not a number; write digits only")
    number = int(digits) if len(digits) <= 20 else high + 1
    if not low <= number <= high:
        raise OptionError(f"option {_shown(key, value)}: {digits} is not between {low} and {high}; change it")
    return number
