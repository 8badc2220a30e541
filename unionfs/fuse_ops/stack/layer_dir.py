"""One layer directory, held by descriptor: nothing above it can name a file outside of it, or write into a lower one.

A lower layer is opened through a private, detached, read-only clone of its mount. The kernel then refuses every
write that comes through it with EROFS, whoever asks and by whatever path, including opens that FUSE passthrough
makes on its own. Inside a layer only plain names relative to a directory descriptor are used, and paths of several
components are resolved by openat2(2) without following links.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict

from unionfs.errors import LayerError
from unionfs.host import syscalls
from unionfs.host.files import open_confined
from unionfs.host.processes import too_many_files

_DIR_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DescriptorCache:
    """The most recently used directory descriptors of all layers of a mount.

    ``limit`` bounds how many are kept, so that a stack of 500 layers leaves descriptors for open files. A descriptor
    that falls out is closed by :meth:`trim` only: the operation that is going on may still use it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(limit, 64)
        self._open: OrderedDict[object, int] = OrderedDict()
        self._evicted: list[int] = []

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: object) -> int | None:
        fd = self._open.get(key)
        if fd is not None:
            self._open.move_to_end(key)
        return fd

    def put(self, key: object, fd: int) -> int:
        self._open[key] = fd
        if len(self._open) > self._limit:
            self._evicted.append(self._open.popitem(last=False)[1])
        return fd

    def discard(self, key: object) -> None:
        fd = self._open.pop(key, None)
        if fd is not None:
            self._evicted.append(fd)

    def trim(self) -> None:
        """Close what fell out; called where no operation is going on."""
        while self._evicted:
            os.close(self._evicted.pop())

    def close(self) -> None:
        self.trim()
        while self._open:
            os.close(self._open.popitem()[1])


class LayerDir:
    """A layer of the stack, addressed by paths relative to its top such as ``b"usr/bin"`` (``b""``: the top)."""

    __slots__ = ("_cache", "device", "fd", "filesystem_uuid", "index", "path", "readable_fd")

    def __init__(self, fd: int, path: str, index: int, cache: DescriptorCache) -> None:
        self.fd = fd
        self.path = path
        self.index = index
        self.device = os.stat(fd).st_dev
        self._cache = cache
        # Some calls refuse O_PATH descriptors: ioctl(2), open_by_handle_at(2).
        self.readable_fd = os.open(b"/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.filesystem_uuid = syscalls.filesystem_uuid(self.readable_fd)

    def __repr__(self) -> str:
        return f"<LayerDir {self.index} {self.path}>"

    def dir_fd(self, path: bytes) -> int:
        """An O_PATH descriptor of the directory ``path``. It belongs to the cache: use it at once, do not keep it."""
        if not path:
            return self.fd
        key = (self.index, path)
        fd = self._cache.get(key)
        if fd is None:
            head, _, name = path.rpartition(b"/")
            parent_fd = self._cache.get((self.index, head)) if head else self.fd
            if parent_fd is None:
                fd = open_confined(self.fd, path, _DIR_FLAGS)
            else:
                fd = open_confined(parent_fd, name, _DIR_FLAGS)
            self._cache.put(key, fd)
        return fd

    def locate(self, path: bytes) -> tuple[int, bytes]:
        """Directory descriptor and name for ``path``, as the ``*at`` calls want them."""
        head, _, name = path.rpartition(b"/")
        return self.dir_fd(head), name or b"."

    def stat(self, path: bytes) -> os.stat_result:
        """lstat(2) of ``path``."""
        if not path:
            return os.stat(self.fd)
        head, _, name = path.rpartition(b"/")
        return os.stat(name, dir_fd=self.dir_fd(head), follow_symlinks=False)

    def open(self, path: bytes, flags: int) -> int:
        """Open the file ``path``; never follows a link."""
        dir_fd, name = self.locate(path)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)

    def proc_path(self, path: bytes) -> bytes:
        """A path for calls that take no descriptor (the xattr family); its last component must not be followed."""
        dir_fd, name = self.locate(path)
        return b"/proc/self/fd/%d/%s" % (dir_fd, name)

    def close(self) -> None:
        os.close(self.readable_fd)
        os.close(self.fd)


def _open_directory(path: str, role: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LayerError(f"{role} {path}: no such directory; create it or correct the option") from None
    except NotADirectoryError:
        raise LayerError(f"{role} {path}: is not a directory; a layer is an unpacked directory tree") from None
    except OSError as error:
        raise LayerError(f"{role} {path}: {reason_of(error)}") from None


def reason_of(error: OSError) -> str:
    """Why a directory cannot be opened, and what is to be done about it."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return too_many_files(error)
    if error.errno == errno.EACCES:
        return "permission denied; it must be readable for you, and the directories above it searchable"
    return f"{error.strerror}; check the path and its permissions"


def open_lower(path: str, index: int, cache: DescriptorCache) -> LayerDir:
    """Hold ``path`` as a read-only layer; raises :class:`LayerError` with the reason if it cannot be one."""
    plain = _open_directory(path, "lower layer")
    try:
        clone = syscalls.clone_mount_read_only(path)
    except OSError as error:
        # Without CAP_SYS_ADMIN (an ordinary user outside of a user namespace) there is no clone: the layer is then
        # protected only by our never opening it for writing. EINVAL: a mount that may not be cloned, for example
        # because it is not in our mount namespace.
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            os.close(plain)
            what = too_many_files(error) if error.errno == errno.EMFILE else f"{error.strerror}; cannot clone its mount"
            raise LayerError(f"lower layer {path}: {what}") from None
        return _held(plain, "lower layer", path, index, cache)
    os.close(plain)
    return _held(clone, "lower layer", path, index, cache)


def open_upper(path: str, cache: DescriptorCache) -> LayerDir:
    """Hold ``path`` as the writable layer. It is not cloned: renames between upper and work need one mount."""
    return _held(_open_directory(path, "upperdir"), "upperdir", path, -1, cache)


def _held(fd: int, role: str, path: str, index: int, cache: DescriptorCache) -> LayerDir:
    try:
        return LayerDir(fd, path, index, cache)
    except OSError as error:
        os.close(fd)
        raise LayerError(f"{role} {path}: {reason_of(error)}") from None
