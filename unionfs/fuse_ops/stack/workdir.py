"""The work directory of a mount: checked, locked, emptied of what a dead server left, marked when volatile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass

from unionfs.errors import LayerError
from unionfs.fuse_ops.speedups.late_sync.unsynced import was_noted
from unionfs.host import syscalls
from unionfs.host.files import remove_tree
from unionfs.overlay.format import OverlayXattrs

_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_VOLATILE_MARKER = "incompat/volatile"


@dataclass(slots=True)
class WorkDir:
    """``fd`` is of ``<workdir>/work``, ``lock_fd`` of ``<workdir>``, with the lock, or -1 if another server has it."""

    fd: int
    lock_fd: int
    warnings: list[str]
    unsynced: bool  # a server has ended before its copies were on the disk


def prepare_workdir(workdir: str, upperdir: str, *, volatile: bool) -> WorkDir:
    """Make ``workdir`` ready for a mount of ``upperdir``; raises :class:`LayerError` if it cannot serve.

    Another server that uses the directory is warned about, not refused: engines mount a running container's
    directories a second time.
    """
    try:
        lock_fd = os.open(workdir, _DIR_FLAGS)
    except FileNotFoundError:
        raise LayerError(f"workdir {workdir}: no such directory; create it beside the upperdir") from None
    except NotADirectoryError:
        raise LayerError(f"workdir {workdir}: is not a directory") from None
    except OSError as error:
        raise LayerError(f"workdir {workdir}: {error.strerror}; check the path and its permissions") from None
    try:
        _check_placement(workdir, lock_fd, upperdir)
        warnings = []
        owned = _lock(lock_fd)
        if not owned:
            warnings.append(f"workdir {workdir} is in use by another mount; changes through both may get mixed up")
        fd = _open_work(workdir, lock_fd)
        try:
            _check_marker(workdir, fd)
            unsynced = owned and was_noted(lock_fd)
            if owned:
                _empty(fd)
            if volatile:
                _make_marker(fd)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        os.close(lock_fd)
        raise
    if not owned:
        os.close(lock_fd)
        lock_fd = -1
    return WorkDir(fd, lock_fd, warnings, unsynced)


def _check_placement(workdir: str, fd: int, upperdir: str) -> None:
    upper_fd = os.open(upperdir, _DIR_FLAGS)
    try:
        # Files are renamed from one to the other, which needs one mount, not only one file system.
        same = syscalls.mount_id(upper_fd) == syscalls.mount_id(fd) and os.fstat(upper_fd).st_dev == os.fstat(fd).st_dev
    finally:
        os.close(upper_fd)
    if not same:
        raise LayerError(
            f"workdir {workdir} is not on the file system of upperdir {upperdir}; choose one beside the upperdir"
        )


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF):
            return True  # a network file system without locks: behave as if alone, like the kernel
        raise
    return True


def _open_work(workdir: str, lock_fd: int) -> int:
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir("work", 0o700, dir_fd=lock_fd)
        return os.open("work", _DIR_FLAGS | os.O_NOFOLLOW, dir_fd=lock_fd)
    except OSError as error:
        raise LayerError(
            f"workdir {workdir}: cannot make {workdir}/work: {error.strerror}; the workdir must be writable"
        ) from None


def _check_marker(workdir: str, fd: int) -> None:
    try:
        os.stat(_VOLATILE_MARKER, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return
    raise LayerError(
        f"workdir {workdir} was used by a volatile mount, so the upperdir may be incomplete after a crash; "
        f"if it is fine, remove {workdir}/work/{_VOLATILE_MARKER}"
    )


def _empty(fd: int) -> None:
    for name in os.listdir(fd):
        with contextlib.suppress(OSError):  # what cannot be removed disturbs nobody: our names are new ones
            remove_tree(fd, os.fsencode(name))


def _make_marker(fd: int) -> None:
    for path in ("incompat", _VOLATILE_MARKER):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=fd)


def supports_xattrs(fd: int, names: OverlayXattrs) -> bool:
    """Whether overlay's attributes can be stored in the directory ``fd``; tries with the directory, as the kernel does.

    The value says nothing, so a server that is killed half-way leaves nothing that anybody looks at.
    """
    try:
        os.setxattr(fd, names.opaque, b"0")
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a second server of the same directory was quicker
        os.removexattr(fd, names.opaque)
    return True
