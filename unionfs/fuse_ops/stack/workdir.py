"""The work directory of a mount: checked, locked, emptied of what a dead server left, marked when volatile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from dataclasses import dataclass
from typing import Final

from unionfs.errors import LayerError
from unionfs.fuse_ops.stack.layer_dir import reason_of
from unionfs.host import syscalls
from unionfs.host.files import remove_tree
from unionfs.host.fs_magic import FsMagic, fs_magic
from unionfs.host.inode_flags import inherit_alike
from unionfs.overlay.format import OverlayXattrs

# Not asked, since a mount should take no longer for them.
_EXCHANGING: Final = frozenset({FsMagic.EXTFS, FsMagic.XFS, FsMagic.BTRFS, FsMagic.TMPFS, FsMagic.F2FS})
_DIR_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_VOLATILE_MARKER: Final = "incompat/volatile"

# A mount is gone before its server knows, and the server then has to write the rest to the disk.
_NOTICES_WITHIN_S: Final = 0.5
_ENDS_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.005


class Claim:
    """An upper directory and its work directory in use, as other servers see it by the locks (flock(2)) on both.

    Exclusive locks say that a mount is served, shared ones that it is gone and its server about to end.
    """

    def __init__(self, workdir_fd: int, upper_fd: int) -> None:
        self.workdir_fd = workdir_fd
        self._fds = (workdir_fd, upper_fd)

    def acquire(self) -> bool:
        """Claim both, waiting for a server that is about to end; False when one goes on to use them."""
        return all(_lock(fd) for fd in self._fds)

    def end_soon(self) -> None:
        """The mount is gone; whoever mounts the same directories now has only to wait."""
        for fd in self._fds:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self) -> None:
        """Give both up."""
        for fd in self._fds:
            os.close(fd)


@dataclass(slots=True)
class WorkDir:
    """``fd`` is of ``<workdir>/work``. Without a ``claim``, another server uses the upper or the work directory."""

    fd: int
    claim: Claim | None
    warnings: list[str]

    def close(self) -> None:
        """Give it up."""
        os.close(self.fd)
        if self.claim is not None:
            self.claim.close()


def prepare_workdir(workdir: str, upperdir: str, *, volatile: bool, exclusive: bool = False) -> WorkDir:
    """Make ``workdir`` ready for a mount of ``upperdir``; raises :class:`LayerError` if it cannot serve.

    Another server that uses one of the directories is warned about: engines mount a running container's directories
    a second time. Only an ``exclusive`` use is refused then.
    """
    with contextlib.ExitStack() as opened:
        lock_fd = _open(f"workdir {workdir}", workdir, "create it beside the upperdir")
        opened.callback(os.close, lock_fd)
        upper_fd = _open(f"upperdir {upperdir}", upperdir, "create it or correct the option")
        opened.callback(os.close, upper_fd)
        _check_placement(workdir, lock_fd, upperdir, upper_fd)
        claim: Claim | None = Claim(lock_fd, upper_fd)
        assert claim is not None
        warnings = []
        if not claim.acquire():
            if exclusive:
                raise LayerError(
                    f"upperdir {upperdir} is in use by another mount; unmount that first, or leave out the option "
                    "exclusive (unionfs mount: add --force)"
                )
            warnings.append(f"upperdir {upperdir} is in use by another mount; changes through both may get mixed up")
            claim = None
        fd = _open_work(workdir, lock_fd)
        opened.callback(os.close, fd)
        _check_marker(workdir, fd)
        if claim is not None:
            _empty(fd)
            _make_neutral(fd, upper_fd)
        if volatile:
            _make_marker(fd)
        opened.pop_all()
    if claim is None:
        os.close(lock_fd)
        os.close(upper_fd)
    return WorkDir(fd, claim, warnings)


def _open(name: str, path: str, step: str) -> int:
    try:
        return os.open(path, _DIR_FLAGS)
    except FileNotFoundError:
        raise LayerError(f"{name}: no such directory; {step}") from None
    except NotADirectoryError:
        raise LayerError(f"{name}: is not a directory") from None
    except OSError as error:
        raise LayerError(f"{name}: {reason_of(error)}") from None


def _check_placement(workdir: str, fd: int, upperdir: str, upper_fd: int) -> None:
    # Files are renamed from one to the other, which needs one mount, not only one file system.
    if syscalls.mount_id(upper_fd) != syscalls.mount_id(fd) or os.fstat(upper_fd).st_dev != os.fstat(fd).st_dev:
        raise LayerError(
            f"workdir {workdir} is not on the file system of upperdir {upperdir}; choose one beside the upperdir"
        )


def _lock(fd: int) -> bool:
    """Lock ``fd`` as the only server that uses it; False when another goes on to."""
    start = time.monotonic()
    while not _try_lock(fd, fcntl.LOCK_EX):
        ending = _try_lock(fd, fcntl.LOCK_SH)
        fcntl.flock(fd, fcntl.LOCK_UN)  # or of two that wait, each would keep the other from its lock
        if time.monotonic() - start > (_ENDS_WITHIN_S if ending else _NOTICES_WITHIN_S):
            return False
        time.sleep(_POLL_S)
    return True


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
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
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise LayerError(f"workdir {workdir}: {workdir}/work cannot be searched: {error.strerror}") from None
    raise LayerError(
        f"workdir {workdir} was used by a volatile mount, so the upperdir may be incomplete after a crash; "
        f"if it is fine, remove {workdir}/work/{_VOLATILE_MARKER}"
    )


def _empty(fd: int) -> None:
    for name in os.listdir(fd):
        with contextlib.suppress(OSError):  # what cannot be removed disturbs nobody: our names are new ones
            remove_tree(fd, os.fsencode(name))


def _make_neutral(fd: int, upper_fd: int) -> None:
    """Have what is made in ``<workdir>/work`` inherit nothing from it that it would not in the upper directory.

    The kernel's overlayfs removes the ACLs and the mode; flags and projects it leaves, so that a copy may not even be
    allowed into the upper directory.
    """
    for name in ("system.posix_acl_default", "system.posix_acl_access"):
        with contextlib.suppress(OSError):
            os.removexattr(fd, name)
    with contextlib.suppress(OSError):
        os.fchmod(fd, 0o700)
    with contextlib.suppress(OSError):
        inherit_alike(fd, upper_fd)


def _make_marker(fd: int) -> None:
    for path in ("incompat", _VOLATILE_MARKER):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=fd)


def can_exchange(dir_fd: int) -> bool:
    """Whether names can be exchanged (renameat2(2), RENAME_EXCHANGE) in the directory ``dir_fd``, which is tried.

    Without that, a directory can neither be replaced by a whiteout nor replace one, so that there is no moment at which
    what was deleted is back. Raises OSError when it cannot be tried.
    """
    if fs_magic(f"/proc/self/fd/{dir_fd}") in _EXCHANGING:
        return True
    names = [b"#check-%x-%d" % (os.getpid(), number) for number in range(2)]
    made = []
    try:
        for name in names:
            os.mkdir(name, 0o700, dir_fd=dir_fd)
            made.append(name)
        syscalls.renameat2(dir_fd, names[0], dir_fd, names[1], syscalls.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        for name in made:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=dir_fd)
    return True


def supports_xattrs(fd: int, names: OverlayXattrs) -> bool:
    """Whether overlay's attributes can be stored in the directory ``fd``; tries with the directory, as the kernel does.

    The value says nothing, so a server that is killed half-way leaves nothing that anybody looks at. Raises OSError
    when that cannot be told: on a full disk, say.
    """
    try:
        os.setxattr(fd, names.opaque, b"0")
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL):
            raise
        return False
    with contextlib.suppress(OSError):  # a second server of the same directory was quicker
        os.removexattr(fd, names.opaque)
    return True
