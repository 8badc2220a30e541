"""The operations that are done on both mounts: each a value that can be printed, replayed and compared."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.snapshot import kind_of
from tests.support.syscalls import renameat2

Answer = tuple[object, ...]
FILLER = bytes(range(256)) * 4


def filled(seed: int, length: int) -> bytes:
    """Recognisable data: each seed and position has its own bytes."""
    start = seed % 256
    return (FILLER[start:] + FILLER * (length // 1024 + 1))[:length]


@dataclass(slots=True)
class Side:
    """One of the two mounts, and the files that the operations hold open on it."""

    name: str
    root: str
    began_ns: int
    new_times_only: bool = False
    """All times count as those of this run. For metacopies: opening one for writing gives it a new time in the
    kernel, although nothing is written yet."""
    handles: dict[int, int] = field(default_factory=dict)

    def at(self, path: str) -> str:
        """The path in this mount."""
        return f"{self.root}/{path}"

    def when(self, ns: int) -> int:
        """A time as both sides must show it: those of this run are all the same."""
        return ns if ns < self.began_ns and not self.new_times_only else -1

    def handle(self, slot: int) -> int:
        """An open file; EBADF when the slot is empty."""
        if slot not in self.handles:
            raise OSError(errno.EBADF, "no such handle")
        return self.handles[slot]

    def close_all(self) -> None:
        """Close every handle."""
        for fd in self.handles.values():
            os.close(fd)
        self.handles.clear()

    def attributes(self, st: os.stat_result) -> Answer:
        """The parts of stat(2) that both sides must agree on."""
        kind = kind_of(st.st_mode)
        is_dir = kind == "dir"
        return (
            kind,
            oct(stat.S_IMODE(st.st_mode)),
            st.st_uid,
            st.st_gid,
            None if is_dir else st.st_size,
            None if is_dir else st.st_nlink,
            st.st_rdev if kind in ("char", "block") else 0,
            self.when(st.st_mtime_ns),
        )


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Make system calls with the rights of ``uid``."""
    if uid == 0:
        yield
        return
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation; ``uid`` is who does it."""

    uid: int = 0

    def run(self, side: Side) -> Answer:
        """Do it, and return the result or the name of the errno."""
        try:
            with acting_as(self.uid):
                return ("ok", *self.do(side))
        except OSError as error:
            return ("error", errno.errorcode.get(error.errno or 0, str(error.errno)))

    def do(self, side: Side) -> Answer:
        """The system calls."""
        raise NotImplementedError

    def paths(self) -> tuple[str, ...]:
        """The names that it may change, to be compared right after."""
        return tuple(getattr(self, f) for f in ("path", "src", "dst") if hasattr(self, f))


def _once(path: str, flags: int, mode: int = 0o666) -> int:
    # O_NONBLOCK, because a fifo is among the files
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)


@dataclass(frozen=True, slots=True)
class Create(Op):
    path: str
    mode: int = 0o644
    exclusive: bool = False

    def do(self, side: Side) -> Answer:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if self.exclusive else 0)
        os.close(_once(side.at(self.path), flags, self.mode))
        return ()


@dataclass(frozen=True, slots=True)
class Write(Op):
    path: str
    offset: int
    seed: int
    length: int

    def do(self, side: Side) -> Answer:
        fd = _once(side.at(self.path), os.O_WRONLY)
        try:
            return (os.pwrite(fd, filled(self.seed, self.length), self.offset),)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Append(Op):
    path: str
    seed: int
    length: int

    def do(self, side: Side) -> Answer:
        fd = _once(side.at(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            return (os.write(fd, filled(self.seed, self.length)),)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Overwrite(Op):
    """open(O_TRUNC) and a write, as ``>`` in a shell."""

    path: str
    seed: int
    length: int

    def do(self, side: Side) -> Answer:
        fd = _once(side.at(self.path), os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o640)
        try:
            return (os.write(fd, filled(self.seed, self.length)),)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Truncate(Op):
    """truncate(2); to the size that the file has already, in two steps, see ``docs/differences.md``."""

    path: str
    size: int

    def do(self, side: Side) -> Answer:
        path = side.at(self.path)
        if os.stat(path).st_size == self.size:
            os.truncate(path, self.size + 1)
        os.truncate(path, self.size)
        return ()


@dataclass(frozen=True, slots=True)
class Read(Op):
    path: str

    def do(self, side: Side) -> Answer:
        fd = _once(side.at(self.path), os.O_RDONLY)
        try:
            return (hash(os.read(fd, 1 << 22)),)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Rename(Op):
    src: str
    dst: str
    flags: int = 0

    def do(self, side: Side) -> Answer:
        try:
            renameat2(side.at(self.src), side.at(self.dst), self.flags)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                # The kernel has prepared the directory by then, which gives its parent a new time; we have not.
                os.utime(side.at(os.path.dirname(self.src) or "."), ns=(0, 0))
            raise
        return ()


@dataclass(frozen=True, slots=True)
class Link(Op):
    src: str
    dst: str

    def do(self, side: Side) -> Answer:
        os.link(side.at(self.src), side.at(self.dst), follow_symlinks=False)
        return ()


@dataclass(frozen=True, slots=True)
class Unlink(Op):
    path: str

    def do(self, side: Side) -> Answer:
        os.unlink(side.at(self.path))
        return ()


@dataclass(frozen=True, slots=True)
class Rmdir(Op):
    path: str

    def do(self, side: Side) -> Answer:
        os.rmdir(side.at(self.path))
        return ()


@dataclass(frozen=True, slots=True)
class RemoveTree(Op):
    """``rm -r``: with single calls a directory with content is hardly ever removed and made anew."""

    path: str

    def do(self, side: Side) -> Answer:
        def empty(path: str) -> int:
            count = 0
            for name in sorted(os.listdir(path)):
                child = f"{path}/{name}"
                count += 1
                if stat.S_ISDIR(os.lstat(child).st_mode):
                    count += empty(child)
                    os.rmdir(child)
                else:
                    os.unlink(child)
            return count

        count = empty(side.at(self.path))
        os.rmdir(side.at(self.path))
        return (count,)


@dataclass(frozen=True, slots=True)
class Mkdir(Op):
    path: str
    mode: int = 0o755

    def do(self, side: Side) -> Answer:
        os.mkdir(side.at(self.path), self.mode)
        return ()


@dataclass(frozen=True, slots=True)
class Symlink(Op):
    target: str
    path: str

    def do(self, side: Side) -> Answer:
        os.symlink(self.target, side.at(self.path))
        return ()


@dataclass(frozen=True, slots=True)
class Mknod(Op):
    path: str
    kind: int
    major: int = 0
    minor: int = 0

    def do(self, side: Side) -> Answer:
        os.mknod(side.at(self.path), self.kind | 0o640, os.makedev(self.major, self.minor))
        return ()


@dataclass(frozen=True, slots=True)
class Chmod(Op):
    path: str
    mode: int

    def do(self, side: Side) -> Answer:
        os.chmod(side.at(self.path), self.mode)
        return ()


@dataclass(frozen=True, slots=True)
class Chown(Op):
    path: str
    owner: int
    group: int

    def do(self, side: Side) -> Answer:
        os.lchown(side.at(self.path), self.owner, self.group)
        return ()


@dataclass(frozen=True, slots=True)
class Utimens(Op):
    path: str
    atime_ns: int
    mtime_ns: int

    def do(self, side: Side) -> Answer:
        os.utime(side.at(self.path), ns=(self.atime_ns, self.mtime_ns), follow_symlinks=False)
        return ()


@dataclass(frozen=True, slots=True)
class SetXattr(Op):
    path: str
    name: str
    value: bytes
    flags: int = 0

    def do(self, side: Side) -> Answer:
        os.setxattr(side.at(self.path), self.name, self.value, self.flags, follow_symlinks=False)
        return ()


@dataclass(frozen=True, slots=True)
class RemoveXattr(Op):
    path: str
    name: str

    def do(self, side: Side) -> Answer:
        os.removexattr(side.at(self.path), self.name, follow_symlinks=False)
        return ()


@dataclass(frozen=True, slots=True)
class GetXattr(Op):
    path: str
    name: str

    def do(self, side: Side) -> Answer:
        return (os.getxattr(side.at(self.path), self.name, follow_symlinks=False),)


@dataclass(frozen=True, slots=True)
class Stat(Op):
    path: str
    follow: bool = False

    def do(self, side: Side) -> Answer:
        return side.attributes(os.stat(side.at(self.path), follow_symlinks=self.follow))


@dataclass(frozen=True, slots=True)
class ListDir(Op):
    path: str

    def do(self, side: Side) -> Answer:
        return tuple(sorted(os.listdir(side.at(self.path))))


@dataclass(frozen=True, slots=True)
class Open(Op):
    """Open a file or directory and keep it open."""

    slot: int
    path: str
    flags: int
    mode: int = 0o644

    def do(self, side: Side) -> Answer:
        fd = _once(side.at(self.path), self.flags, self.mode)
        if self.slot in side.handles:
            os.close(side.handles[self.slot])
        side.handles[self.slot] = fd
        return ()


@dataclass(frozen=True, slots=True)
class OpenRead(Op):
    slot: int
    offset: int
    length: int

    def do(self, side: Side) -> Answer:
        return (hash(os.pread(side.handle(self.slot), self.length, self.offset)),)


@dataclass(frozen=True, slots=True)
class OpenWrite(Op):
    """write(2) at an offset, or at the end with O_APPEND."""

    slot: int
    offset: int
    seed: int
    length: int

    def do(self, side: Side) -> Answer:
        return (os.pwrite(side.handle(self.slot), filled(self.seed, self.length), self.offset),)


@dataclass(frozen=True, slots=True)
class OpenStat(Op):
    slot: int

    def do(self, side: Side) -> Answer:
        attributes = side.attributes(os.fstat(side.handle(self.slot)))
        # The kernel goes on to count a lower file's name after it was unlinked, and so does not its own upper one.
        return attributes[:5] + attributes[6:]


@dataclass(frozen=True, slots=True)
class OpenTruncate(Op):
    """ftruncate(2), as :class:`Truncate`."""

    slot: int
    size: int

    def do(self, side: Side) -> Answer:
        fd = side.handle(self.slot)
        if os.fstat(fd).st_size == self.size:
            os.ftruncate(fd, self.size + 1)
        os.ftruncate(fd, self.size)
        return ()


@dataclass(frozen=True, slots=True)
class OpenChmod(Op):
    slot: int
    mode: int

    def do(self, side: Side) -> Answer:
        os.fchmod(side.handle(self.slot), self.mode)
        return ()


@dataclass(frozen=True, slots=True)
class OpenChown(Op):
    slot: int
    owner: int
    group: int

    def do(self, side: Side) -> Answer:
        os.fchown(side.handle(self.slot), self.owner, self.group)
        return ()


@dataclass(frozen=True, slots=True)
class OpenUtimens(Op):
    slot: int
    mtime_ns: int

    def do(self, side: Side) -> Answer:
        os.utime(side.handle(self.slot), ns=(self.mtime_ns, self.mtime_ns))
        return ()


@dataclass(frozen=True, slots=True)
class OpenSetXattr(Op):
    slot: int
    name: str
    value: bytes

    def do(self, side: Side) -> Answer:
        os.setxattr(side.handle(self.slot), self.name, self.value)
        return ()


@dataclass(frozen=True, slots=True)
class OpenSync(Op):
    slot: int

    def do(self, side: Side) -> Answer:
        os.fsync(side.handle(self.slot))
        return ()


@dataclass(frozen=True, slots=True)
class OpenList(Op):
    slot: int

    def do(self, side: Side) -> Answer:
        fd = side.handle(self.slot)
        os.lseek(fd, 0, os.SEEK_SET)
        return tuple(sorted(os.listdir(fd)))


@dataclass(frozen=True, slots=True)
class Close(Op):
    slot: int

    def do(self, side: Side) -> Answer:
        os.close(side.handle(self.slot))
        del side.handles[self.slot]
        return ()


@dataclass(frozen=True, slots=True)
class Forget(Op):
    """Make the kernel forget what it does not use; nothing changes by that."""

    def do(self, side: Side) -> Answer:
        if side.name == "ours":
            with open("/proc/sys/vm/drop_caches", "w") as f:
                f.write("2")
        return ()


@dataclass(frozen=True, slots=True)
class Remount(Op):
    """Unmount and mount both again; the rig does it. ``crash``: ours is killed, and loses what was not synced."""

    crash: bool = False


@dataclass(frozen=True, slots=True)
class Check(Op):
    """Compare the whole trees; the rig does it."""
