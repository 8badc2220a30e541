"""Mounting /dev/fuse without libfuse: by mount(2) for who may, by fusermount3 for everybody else.

Source: mount.fuse(8), fuse(4); what fusermount3 expects is in util/fusermount.c of libfuse: it sends the descriptor
of /dev/fuse over the socket that the variable _FUSE_COMMFD names.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
from collections.abc import Iterable
from typing import Final

from unionfs.errors import MountError
from unionfs.host import syscalls
from unionfs.host.mounts import OUR_TYPE, SUBTYPE, Mount
from unionfs.host.unmount import fusermount_path

_DEVICE: Final = "/dev/fuse"

# sys/mount.h
_FLAGS: Final = {
    "ro": (1, True),
    "rw": (1, False),
    "nosuid": (2, True),
    "suid": (2, False),
    "nodev": (4, True),
    "dev": (4, False),
    "noexec": (8, True),
    "exec": (8, False),
    "sync": (16, True),
    "async": (16, False),
    "dirsync": (128, True),
    "noatime": (1024, True),
    "atime": (1024, False),
    "nodiratime": (2048, True),
    "diratime": (2048, False),
}
_NOSUID_NODEV: Final = 2 | 4
_REMOUNT: Final = 32
_KERNEL_OPTIONS: Final = re.compile(r"default_permissions|allow_other|max_read=\d+|blksize=\d+")


def mount(target: str, options: Iterable[str], source: str) -> int:
    """Mount a FUSE file system of the type ``fuse.unionfs-mount`` on ``target`` and return its /dev/fuse.

    ``options`` are mount options of the kernel and of fusermount3; others are left out. Raises :class:`MountError`.
    Whether this process may mount by itself is tried: user 0 may lack the capability, and others may have it.
    """
    options = list(options)
    try:
        return _mount(target, options, source)
    except OSError as error:
        # One who may open the device and not mount, or not even that, is the one whom fusermount3 is for.
        if os.geteuid() != 0 and error.errno in (errno.EPERM, errno.EACCES):
            return _mount_by_fusermount(target, options, source)
        if error.filename == _DEVICE:
            missing = error.errno == errno.ENOENT
            said = "device not found" if missing else f"{_DEVICE}: {error.strerror}"
        else:
            said = str(error.strerror)
        raise MountError(f"cannot mount on {target}: {explained(said)}") from None


def _mount(target: str, options: Iterable[str], source: str) -> int:
    """By mount(2); raises OSError, with the name of the device if that cannot be opened."""
    fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    flags = _NOSUID_NODEV
    data = [f"fd={fd}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    for option in options:
        if option in _FLAGS:
            bit, on = _FLAGS[option]
            flags = flags | bit if on else flags & ~bit
        elif _KERNEL_OPTIONS.fullmatch(option):
            data.append(option)
    try:
        syscalls.mount(source, target, OUR_TYPE.encode(), flags, ",".join(data).encode())
    except OSError:
        os.close(fd)
        raise
    return fd


def remount(mount: Mount, options: Iterable[str]) -> None:
    """Change the flags of ``mount`` that ``options`` name, and nothing else; raises :class:`MountError`."""
    options = list(options)
    # mount(8) names all that there are to be, from the mount table, in which only flags that are off are left out.
    is_complete = any(option.startswith("user_id=") for option in options)
    flags = _REMOUNT
    for option in options if is_complete else (*mount.options, *options):
        if option in _FLAGS:
            bit, on = _FLAGS[option]
            flags = flags | bit if on else flags & ~bit
    # What other options say was agreed between the kernel and the server when it began.
    try:
        syscalls.mount("", mount.mount_point, b"", flags, b"")
    except OSError as error:
        raise MountError(
            f"cannot remount {mount.mount_point}: {error.strerror}; unmount it and mount it anew"
        ) from error


def _mount_by_fusermount(target: str, options: Iterable[str], source: str) -> int:
    program = fusermount_path()
    if program is None:
        raise MountError(f"cannot mount on {target}: there is no fusermount3; install fuse3")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    escaped = re.sub(r"[\\,]", r"\\\g<0>", source)
    kept = [o for o in options if o in _FLAGS or _KERNEL_OPTIONS.fullmatch(o) or o == "allow_root"]
    text = ",".join([*kept, f"fsname={escaped}", f"subtype={SUBTYPE}"])
    with ours, theirs:
        result = subprocess.run(
            [program, "-o", text, "--", target],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        if result.returncode == 0:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            if fds:
                os.set_inheritable(fds[0], False)
                return fds[0]
        said = " ".join(result.stderr.split())
        raise MountError(f"cannot mount on {target}: {explained(said)}")


_NEXT_STEPS = (
    # What libfuse, fusermount3 or the kernel says, and what a person can do about it.
    ("user_allow_other", "add the line user_allow_other to /etc/fuse.conf, or leave out allow_other"),
    ("device not found", "load the kernel module with: modprobe fuse"),
    ("/dev/fuse", "give this user access, for example with: chmod 666 /dev/fuse"),
    ("write access", "mount on a directory that this user owns"),
    ("No such file or directory", "install fuse3, which has the program fusermount3"),
    ("not permitted", "run as root, or install fuse3 for fusermount3"),
    ("unknown option", "leave that option out"),
)


def explained(said: str) -> str:
    """What was said about a failed mount, with what to do next."""
    step = next((step for sign, step in _NEXT_STEPS if sign in said), "see the kernel log (dmesg)")
    return f"{said or 'the kernel refused it'}; {step}"
