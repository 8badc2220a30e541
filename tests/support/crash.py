"""A crash of a server, or of the machine, as its files show it afterwards."""

from __future__ import annotations

import os
import signal

from tests.support.mounts import UnionMount, is_running, wait_until
from tests.support.syscalls import MNT_DETACH, umount2
from unionfs.overlay.format import UNSYNCED

_MARK = "trusted.overlay.metacopy"
_CAPABILITY = "security.capability"


def mark_of(path: str | bytes) -> bytes | None:
    """The attribute by which a copy says that its data is elsewhere, or not on the disk yet."""
    return _attribute(path, _MARK)


def kill(here: UnionMount) -> None:
    """End the server without a chance to do anything, and unmount what is left."""
    here.expect_end = False
    os.kill(here.pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(here.pid), 10)
    umount2(here.path, MNT_DETACH)


def lose_unsynced(upper: str) -> int:
    """Take the data that may not have been on the disk: blocks are there, with anything in them. Returns from how many.

    What the file system has in the same inode as the attribute (owner, mode, times, other attributes) stays.
    """
    found = [os.path.join(base, name) for base, _, names in os.walk(upper.encode()) for name in names]
    lost = [path for path in found if mark_of(path) == UNSYNCED]
    for path in lost:
        st = os.stat(path)
        capability = _attribute(path, _CAPABILITY)
        with open(path, "r+b") as f:
            f.write(b"\0" * st.st_size)
        if capability is not None:
            os.setxattr(path, _CAPABILITY, capability)
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    return len(lost)


def _attribute(path: str | bytes, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
