"""Who asks for a mount, and becoming like that process.

The rule: a server that the supervisor starts may do exactly what the caller could have done himself. So whoever asks
has to have our user, capabilities and process namespace, and we take over the rest from him: mount namespace, root
and working directory, groups, limits. What cannot be taken over means that the caller is declined.

Nothing of this is believed because the caller says so. The kernel says which process is at the other end
(SO_PEERPIDFD, SO_PEERCRED), and /proc what that process is.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from unionfs.fuse_ops.session.supervisor.client import DeclinedError
from unionfs.host import syscalls
from unionfs.host.processes import SHED_LIMITS, has_ended

_SO_PEERPIDFD: Final = 77  # linux/asm-generic/socket.h, Linux 6.5
_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid

# Lines of /proc/PID/status that have to be the same for the caller and for us; all of them are in every Linux >= 4.10.
_EQUAL: Final = ("Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
_LIMITS: Final = range(16)  # RLIM_NLIMITS


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides about what a process may do, and cannot be taken over: the same for both, or there is no mount."""

    status: Mapping[str, str]
    label: bytes | None
    user_namespace: tuple[int, int]
    process_namespace: tuple[int, int]

    @classmethod
    def of(cls, pid: int) -> Identity:
        """That of the process ``pid``; raises OSError when there is no such process."""
        return cls(_status(pid), _label(pid), _namespace(pid, "user"), _namespace(pid, "pid"))

    def compare(self, caller: Identity) -> None:
        """Raise :class:`DeclinedError` for a caller who is somebody else."""
        for name in _EQUAL:
            if caller.status[name] != self.status[name]:
                raise DeclinedError(f"{name} of the caller is {caller.status[name]}, ours is {self.status[name]}")
        if caller.label != self.label:
            raise DeclinedError("the caller has another security label")
        if caller.user_namespace != self.user_namespace:
            raise DeclinedError("the caller is in another user namespace")
        if caller.process_namespace != self.process_namespace:
            raise DeclinedError("the caller is in another pid namespace")


@dataclass(frozen=True, slots=True)
class Caller:
    """What is taken over from the process that asks; the descriptors are ours."""

    root: int
    cwd: int
    mount_namespace: int | None
    """None when it is ours too."""
    groups: frozenset[int]
    limits: tuple[tuple[int, int], ...]
    oom_score_adj: int
    niceness: int
    processors: frozenset[int]

    def become(self) -> None:
        """Take everything over; raises :class:`DeclinedError` when the kernel does not permit it."""
        try:
            self._become()
        except (OSError, ValueError) as error:
            raise DeclinedError(f"cannot become like the caller: {error}") from None

    def _become(self) -> None:
        # First what is reached through our own /proc.
        _set_oom_score_adj(self.oom_score_adj)
        if self.groups != frozenset(os.getgroups()):
            os.setgroups(list(self.groups))
        if self.mount_namespace is not None:
            syscalls.setns(self.mount_namespace, syscalls.CLONE_NEWNS)
            os.close(self.mount_namespace)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if _place(root) != _place(self.root):
            os.fchdir(self.root)
            os.chroot(".")
        os.fchdir(self.cwd)
        for fd in (root, self.root, self.cwd):
            os.close(fd)
        for number, limits in zip(_LIMITS, self.limits, strict=True):
            ours = resource.getrlimit(number)
            # A limit that a server sheds would bind all who use the mount, and the caller may be unable to raise it.
            if ours != limits and not (number in SHED_LIMITS and ours[1] == resource.RLIM_INFINITY):
                resource.setrlimit(number, limits)
        if os.getpriority(os.PRIO_PROCESS, 0) != self.niceness:
            os.setpriority(os.PRIO_PROCESS, 0, self.niceness)
        if frozenset(os.sched_getaffinity(0)) != self.processors:
            os.sched_setaffinity(0, self.processors)


def examine(connection: socket.socket, namespaces: tuple[int, int], ours: Identity) -> Caller:
    """Look at the process at the other end of ``connection``.

    Args:
        connection: a stream socket of the family AF_UNIX, accepted.
        ours: who this process is.
        namespaces: the inode numbers of the mount and user namespace that the caller says it is in. A thread may be
            in others than its process, and such a caller is declined.

    Raises :class:`DeclinedError` for a caller that has to do it himself.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if (uid, gid) != (os.geteuid(), os.getegid()):
        raise DeclinedError(f"user {uid} is not us")
    if pid <= 0:
        raise DeclinedError("the caller cannot be seen from this process namespace")
    with ExitStack() as opened:
        try:
            pidfd = _peer_pidfd(connection, pid)
            opened.callback(os.close, pidfd)
            caller = _examine(pid, namespaces, ours, opened)
            # The number may have been given to another process, but not while this one has not ended.
            ended = has_ended(pidfd, 0)
        except (OSError, ValueError, KeyError) as error:
            raise DeclinedError(f"the caller cannot be examined: {error!r}") from None
        if ended:
            raise DeclinedError("the caller has ended")
        opened.pop_all()
        os.close(pidfd)
        return caller


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    with suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    # Before Linux 6.5. The number could only be another process' by now if the caller had ended between his
    # connect(2) and this, and all numbers had been used up since.
    return os.pidfd_open(pid)


def _examine(pid: int, namespaces: tuple[int, int], ours: Identity, opened: ExitStack) -> Caller:
    theirs = Identity.of(pid)
    ours.compare(theirs)
    mounts = _namespace(pid, "mnt")
    if (mounts[1], theirs.user_namespace[1]) != namespaces:
        raise DeclinedError("the calling thread is in other namespaces than its process")
    mount_namespace = None
    if mounts != _namespace(os.getpid(), "mnt"):
        mount_namespace = _open(f"/proc/{pid}/ns/mnt", os.O_RDONLY, opened)
    root = _open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY, opened)
    cwd = _open(f"/proc/{pid}/cwd", os.O_PATH | os.O_DIRECTORY, opened)
    with open(f"/proc/{pid}/oom_score_adj", encoding="ascii") as file:
        oom_score_adj = int(file.read())
    return Caller(
        root=root,
        cwd=cwd,
        mount_namespace=mount_namespace,
        groups=frozenset(map(int, theirs.status["Groups"].split())),
        limits=tuple(resource.prlimit(pid, number) for number in _LIMITS),
        oom_score_adj=oom_score_adj,
        niceness=os.getpriority(os.PRIO_PROCESS, pid),
        processors=frozenset(os.sched_getaffinity(pid)),
    )


def _open(path: str, flags: int, opened: ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _label(pid: int) -> bytes | None:
    """What SELinux or AppArmor call the process; None where there is neither."""
    try:
        with open(f"/proc/{pid}/attr/current", "rb") as file:
            return file.read()
    except PermissionError:
        raise
    except OSError:
        return None


def _namespace(pid: int, kind: str) -> tuple[int, int]:
    info = os.stat(f"/proc/{pid}/ns/{kind}")
    return info.st_dev, info.st_ino


def _place(fd: int) -> tuple[int, int, int]:
    """Tells a directory from every other, and from itself on another mount."""
    info = os.fstat(fd)
    return syscalls.mount_id(fd), info.st_dev, info.st_ino


def _set_oom_score_adj(value: int) -> None:
    with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        if int(file.read()) != value:
            file.seek(0)
            file.write(str(value))
