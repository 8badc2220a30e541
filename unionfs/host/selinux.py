"""SELinux contexts for mounts and directories, on hosts that have SELinux."""

from __future__ import annotations

import errno
import os


def selinux_enabled() -> bool:
    """Whether this kernel runs SELinux: elsewhere a context means nothing, and mount(2) refuses one."""
    return os.path.exists("/sys/fs/selinux/enforce")


def mount_context(mount_label: str) -> str | None:
    """The value for the mount option ``context=``, or None where there is nothing to pass."""
    return mount_label if mount_label and selinux_enabled() else None


def label_directory(path: str, mount_label: str) -> None:
    """Give the directory ``path`` the context ``mount_label``, where the host has SELinux.

    Raises:
        OSError: SELinux refuses the context.
    """
    if not mount_label or not selinux_enabled():
        return
    try:
        os.setxattr(path, "security.selinux", os.fsencode(mount_label) + b"\0", follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
