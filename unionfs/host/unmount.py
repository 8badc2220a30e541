"""Unmounting, also as a small program of its own.

A server that unmounts itself must do so from another process. Both syncfs(2) and umount2(2) wait in the kernel,
beyond the reach of any signal, for replies that the server gives. If the server is killed meanwhile and the
waiting thread is its own, the process never ends, so its /dev/fuse is never closed and the thread waits for ever.
With the waiting done elsewhere, the kernel fails the requests as soon as the server is gone.

Only the standard library is imported, so that ``python -I -S unmount.py`` starts at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


def sync_mount(target: str) -> None:
    """Write what the kernel holds for the file system at ``target`` to its server."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _call("syncfs", fd)
    finally:
        os.close(fd)


def unmount(target: str, *, lazy: bool = False) -> None:
    """Unmount ``target``; ``lazy`` takes it out of sight now and ends it when its last user is gone.

    Raises OSError with EBUSY when something uses it, and with other numbers for other reasons.
    """
    try:
        _call("umount2", os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        _fusermount(target, lazy)


def _fusermount(target: str, lazy: bool) -> None:
    """Have the setuid program do it: the owner of a FUSE mount may unmount it, but only that way."""
    try:
        done = subprocess.run(
            ["fusermount3", "-uz" if lazy else "-u", "--", target],
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise OSError(errno.EPERM, "not permitted, and the program fusermount3 is missing; install fuse3") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise OSError(errno.EBUSY if "busy" in said else errno.EPERM, said or "fusermount3 failed")


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(arguments: list[str]) -> int:
    """``unmount.py sync|unmount|detach TARGET``: the exit status is the errno."""
    action, target = arguments
    try:
        if action == "sync":
            sync_mount(target)
        else:
            unmount(target, lazy=action == "detach")
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return error.errno or 255
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
