"""Unmounting, also in a process of its own.

A server that unmounts itself must do so from another process. Both syncfs(2) and umount2(2) wait in the kernel,
beyond the reach of any signal, for replies that the server gives. If the server is killed meanwhile and the
waiting thread is its own, the process never ends, so its /dev/fuse is never closed and the thread waits for ever.
With the waiting done elsewhere, the kernel fails the requests as soon as the server is gone.

That process is a fork which executes nothing: the mount may cover the program that would be executed, and
subprocess.Popen keeps Python's lock until it has been.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from typing import Final, NamedTuple

from unionfs.host.daemon import inherited_fds
from unionfs.host.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, syncfs, umount2

_FUSERMOUNT: Final = "fusermount3"
_FUSERMOUNT_IS_IN: Final = ("/usr/bin", "/bin", "/usr/local/bin")


def sync_mount(target: str) -> None:
    """Write what the kernel holds for the file system at ``target`` to its server."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd)
    finally:
        os.close(fd)


def unmount(target: str, *, lazy: bool = False) -> None:
    """Unmount ``target``; ``lazy`` takes it out of sight now and ends it when its last user is gone.

    Raises OSError with EBUSY when something uses it, and with other numbers for other reasons.
    """
    try:
        _umount2(target, lazy)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        _fusermount(target, lazy)


def take_down(target: str, *, lazy: bool = False) -> None:
    """Unmount ``target`` and remove the directory, which takes it out of the other mount namespaces that have it too.

    The kernel detaches what is mounted on a removed directory in every namespace but the remover's, since Linux 3.18
    (``detach_mounts`` in fs/namespace.c). Without that, a copy of the mount that nobody uses keeps it alive.

    Raises OSError as :func:`unmount` does. A directory that cannot be removed, as when more is mounted there, stays.
    """
    unmount(target, lazy=lazy)
    try:
        os.rmdir(target)
    except OSError:
        pass


def _fusermount(target: str, lazy: bool) -> None:
    """Have the setuid program do it: the owner of a FUSE mount may unmount it, but only that way."""
    program = fusermount_path()
    if program is None:
        raise OSError(errno.EPERM, "not permitted, and the program fusermount3 is missing; install fuse3")
    done = subprocess.run(
        [program, "-uz" if lazy else "-u", "--", target],
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise OSError(errno.EBUSY if "busy" in said else errno.EPERM, said or "fusermount3 failed")


def fusermount_path() -> str | None:
    """Where the setuid program is that mounts and unmounts for an ordinary user; also found without ``PATH``."""
    for directory in [*os.environ.get("PATH", "").split(":"), *_FUSERMOUNT_IS_IN]:
        path = os.path.join(directory, _FUSERMOUNT)
        if path.startswith("/") and os.access(path, os.X_OK):
            return path
    return None


def open_fusermount() -> int | None:
    """A descriptor of that program, to execute it when its path may lead elsewhere."""
    found = fusermount_path()
    try:
        return None if found is None else os.open(found, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None


class Helper(NamedTuple):
    """A process that unmounts."""

    pid: int
    pidfd: int
    stderr: int
    """A pipe."""

    def result(self) -> tuple[int, str]:
        """Wait for its end; the errno, 0 for success, and what was said. Can be asked once."""
        said = os.read(self.stderr, 4096).decode(errors="replace").strip()
        os.close(self.stderr)
        os.close(self.pidfd)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return errno.ECHILD, said
        if status < 0:
            return errno.EINTR, said
        if status and "busy" in said:
            return errno.EBUSY, said
        return status, said


def start_helper(action: str, target: str, fusermount: int | None) -> Helper:
    """Do ``action`` to the mount on ``target`` in another process.

    Args:
        action: ``sync``, ``unmount`` or ``detach``.
        target: the mount point, an absolute path.
        fusermount: what :func:`open_fusermount` gave; None for those who may use umount2(2).
    """
    reading, writing = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _help(action, target, fusermount, writing)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(writing)
    return Helper(pid, os.pidfd_open(pid), reading)


def _help(action: str, target: str, fusermount: int | None, stderr: int) -> None:
    """What the forked process does. Other threads' locks may be held for ever here: nothing but system calls."""
    status = errno.EIO
    try:
        os.dup2(stderr, 2)
        for fd in inherited_fds():  # above all /dev/fuse, which has to be closed when the server ends
            if fd != fusermount:
                os.close(fd)
        if action == "sync":
            sync_mount(target)
        else:
            _unmount_or_execute(target, action == "detach", fusermount)
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)


def _unmount_or_execute(target: str, lazy: bool, fusermount: int | None) -> None:
    try:
        _umount2(target, lazy)
    except OSError as error:
        if error.errno != errno.EPERM or fusermount is None:
            raise
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(fusermount, [_FUSERMOUNT, "-uz" if lazy else "-u", "--", target], {"LC_ALL": "C"})


def _umount2(target: str, lazy: bool) -> None:
    umount2(target, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
