"""What one directory of a layer says of a name, and what that means for the layers below it.

Layers are merged by these rules, by whoever merges them: mounts, change lists, archives. Each function asks the disk,
by a directory's descriptor and a name in it, and keeps nothing.

A whiteout hides what the layers below have under its name. So does any object but a directory, and an opaque
directory; other directories are merged with those below. Sources: Documentation/filesystems/overlayfs.rst and
fs/overlayfs/namei.c for devices and attributes, the layer specification of OCI for the ``.wh.`` marks of aufs:
``.wh.NAME`` hides what is below, not a NAME beside it, and ``.wh..wh..opq`` hides whatever the directories below the
one it is in have. Marks may stand in a layer's top directory, too, where attributes mean nothing.

``spaces`` are the name spaces of attributes that count, the most important one first.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NamedTuple

from unionfs.overlay.format import (
    FUSE_OVERLAYFS_OPAQUE,
    MARK,
    NAME_MAX,
    OPAQUE_MARK,
    OverlayXattrs,
    is_whiteout,
)

Spaces = tuple[OverlayXattrs, ...]
"""The name spaces of extended attributes that are an overlay's own."""

# Where there are no attributes, or none that we may see, there are no marks.
_NO_XATTRS: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM})
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})

WHITEOUT: Final = os.stat_result((0,) * 10)
"""What :func:`stat_entry` answers for a whiteout; compare with ``is``."""


class DirMarks(NamedTuple):
    """What the attributes of a directory say.

    ``opaque``: it hides the directories below. ``xwhiteouts``: files in it may be whiteouts by an attribute.
    ``redirect``: where the layers below have it, see :func:`check_redirect`. ``impure``: it may hold files with an
    origin. ``nested``: it may hold whiteouts of an overlay that is stacked on this one.
    """

    opaque: bool
    xwhiteouts: bool
    redirect: bytes | None
    impure: bool
    nested: bool


_NO_MARKS: Final = DirMarks(False, False, None, False, False)


class Entry(NamedTuple):
    """What one directory of a layer says of a name.

    Attributes:
        st: lstat(2) of the object; None if there is none, or a whiteout.
        hides: whether what the layers below have under this name is hidden, of a directory: not merged with it.
        redirect: the name or path to ask the layers below for instead, even if ``hides``; checked. Of directories and
            metacopies.
        metacopy: whether it is a file of which the layers below have the data.
        marks: of a directory, the rest of what its attributes say.
    """

    st: os.stat_result | None
    hides: bool
    redirect: bytes | None = None
    metacopy: bool = False
    marks: DirMarks = _NO_MARKS


def entry_path(dir_fd: int, name: bytes) -> bytes:
    """A path of ``name`` in ``dir_fd`` for calls that take no directory descriptor; not to be followed at its end."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


# -- names ----------------------------------------------------------------------------------------------------


def is_mark(name: bytes) -> bool:
    """Whether ``name`` is one of aufs' marks, and so never part of a merged tree."""
    return name.startswith(MARK)


def stat_entry(dir_fd: int, name: bytes, spaces: Spaces, *, xwhiteouts: bool) -> os.stat_result | None:
    """lstat(2) of the object ``name``; None if there is none, :data:`WHITEOUT` for a whiteout under that name.

    ``xwhiteouts``: see :class:`DirMarks`, of the directory ``dir_fd``.
    """
    try:
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    if is_whiteout(st) or (xwhiteouts and is_xattr_whiteout(entry_path(dir_fd, name), st, spaces)):
        return WHITEOUT
    return st


def is_whiteout_entry(dir_fd: int, item: os.DirEntry[bytes], spaces: Spaces, xwhiteouts: bool) -> bool:
    """Whether ``item``, which the directory ``dir_fd`` lists, is a whiteout under its name; asks only where it may be.

    ``xwhiteouts``: see :class:`DirMarks`, of that directory.
    """
    if item.is_dir(follow_symlinks=False) or item.is_symlink():
        return False
    if item.is_file(follow_symlinks=False) and not xwhiteouts:
        return False
    return stat_entry(dir_fd, item.name, spaces, xwhiteouts=xwhiteouts) is WHITEOUT


def is_xattr_whiteout(path: bytes, st: os.stat_result, spaces: Spaces) -> bool:
    """Whether the object at ``path``, in a directory that may have such, is a whiteout by an attribute."""
    return is_empty_file(st) and any(has_xattr(path, space.whiteout) for space in spaces)


def is_nested_whiteout(path: bytes, st: os.stat_result, spaces: Spaces) -> bool:
    """Whether the object at ``path`` is the whiteout of an overlay that is stacked on this one."""
    return is_empty_file(st) and any(has_xattr(path, space.nested_whiteout) for space in spaces)


def is_empty_file(st: os.stat_result) -> bool:
    """Whether ``st`` is of a regular file of no bytes, which is what whiteouts by an attribute are."""
    return st.st_size == 0 and stat.S_ISREG(st.st_mode)


def has_mark(dir_fd: int, name: bytes) -> bool:
    """Whether a mark beside ``name`` hides what the layers below have of it."""
    return len(name) <= NAME_MAX - len(MARK) and _exists(dir_fd, MARK + name)


def is_marked_opaque(dir_fd: int, name: bytes = b"") -> bool:
    """Whether a mark in the directory ``name`` of ``dir_fd``, or in that itself, hides what those below it have."""
    return _exists(dir_fd, name + b"/" + OPAQUE_MARK if name else OPAQUE_MARK)


def _exists(dir_fd: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _ABSENT or error.errno == errno.EACCES:
            return False
        raise
    return True


# -- attributes -----------------------------------------------------------------------------------------------


def read_marks(path: bytes, spaces: Spaces) -> DirMarks:
    """What the attributes of the directory at ``path``, which is not followed at its end, say."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return _NO_MARKS
        raise
    if not names:
        return _NO_MARKS
    opaque = xwhiteouts = impure = nested = False
    redirect: bytes | None = None
    for text in names:
        name = os.fsencode(text)
        if name == FUSE_OVERLAYFS_OPAQUE:
            opaque = opaque or _value(path, name)[:1] == b"y"
            continue
        for space in spaces:
            if name == space.opaque:
                value = _value(path, name)
                opaque = opaque or value[:1] == b"y"
                xwhiteouts = xwhiteouts or value[:1] == b"x"
            elif name == space.redirect:
                if redirect is None or space is spaces[0]:
                    redirect = os.getxattr(path, name, follow_symlinks=False)
            elif name == space.impure:
                impure = True
            elif name == space.nested_opaque:
                nested = nested or _value(path, name)[:1] == b"x"
    return DirMarks(opaque, xwhiteouts, redirect, impure, nested)


def is_metacopy(what: bytes | int, spaces: Spaces) -> bool:
    """Whether the regular file ``what``, given by its path or a descriptor, has metadata only."""
    return any(has_xattr(what, space.metacopy) for space in spaces)


def read_redirect(path: bytes, spaces: Spaces) -> bytes | None:
    """The redirect of the object at ``path``, not checked; None without one."""
    for space in spaces:
        value = read_xattr(path, space.redirect)
        if value is not None:
            return value
    return None


def check_redirect(value: bytes) -> bytes:
    """``value`` of a redirect attribute, if it is one: a single name, or the path from the top after a slash.

    Raises OSError as the kernel does (which takes what comes before a zero): EINVAL for empty components, EACCES for
    ``.`` and ``..``, which could lead out of a layer.
    """
    value = value.partition(b"\0")[0]
    parts = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if any(not part or (b"/" in part) for part in parts):
        raise OSError(errno.EINVAL, "the layer has an invalid redirect", os.fsdecode(value))
    if b"." in parts or b".." in parts:
        raise OSError(errno.EACCES, "the layer has a redirect that leads out of it", os.fsdecode(value))
    return value


def has_xattr(what: bytes | int, name: bytes) -> bool:
    """Whether an object has the attribute ``name``; raises as :func:`read_xattr`."""
    return read_xattr(what, name) is not None


def read_xattr(what: int | bytes, name: bytes, *, follow: bool = False) -> bytes | None:
    """The attribute ``name`` of a descriptor, or of a path that is not followed at its end; None if there is none.

    Other errors are raised: who took them for "none" would show, or keep, something else.
    """
    try:
        return os.getxattr(what, name, follow_symlinks=follow or isinstance(what, int))
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return None
        raise


def _value(path: bytes, name: bytes) -> bytes:
    return read_xattr(path, name) or b""


# -- all of it ------------------------------------------------------------------------------------------------


def probe(dir_fd: int, name: bytes, spaces: Spaces, *, xwhiteouts: bool, last: bool = False) -> Entry:
    """What the directory ``dir_fd`` of a layer says of ``name``.

    ``xwhiteouts`` is of :class:`DirMarks` of that directory. With ``last`` there is nothing below it: then nobody has
    to know of redirects and of what is hidden. Of a directory that it finds the marks *in* it are not looked at: see
    :func:`is_marked_opaque`, for whoever opens it. Raises OSError for an invalid redirect.
    """
    if is_mark(name):
        return Entry(None, False)
    st = stat_entry(dir_fd, name, spaces, xwhiteouts=xwhiteouts)
    if st is WHITEOUT:
        return Entry(None, True)
    hides = not last and has_mark(dir_fd, name)
    if st is None:
        return Entry(None, hides)
    path = entry_path(dir_fd, name)
    if stat.S_ISDIR(st.st_mode):
        marks = read_marks(path, spaces)
        redirect = None if last or marks.opaque else marks.redirect
        if redirect is not None:
            redirect = check_redirect(redirect)
        return Entry(st, hides or marks.opaque, redirect, marks=marks)
    if not stat.S_ISREG(st.st_mode) or not is_metacopy(path, spaces):
        return Entry(st, True)
    redirect = None if last else read_redirect(path, spaces)
    if redirect is not None:
        redirect = check_redirect(redirect)
    return Entry(st, hides, redirect, metacopy=True)
