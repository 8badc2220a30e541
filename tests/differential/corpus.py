"""Operation lists that once showed a difference, kept as tests; the failing test prints them in this form."""

from __future__ import annotations

from tests.differential.operations import (
    Append,
    Check,
    Chmod,
    Chown,
    Close,
    Create,
    Link,
    Mkdir,
    Op,
    Open,
    OpenRead,
    OpenStat,
    OpenWrite,
    Overwrite,
    Remount,
    RemoveTree,
    RemoveXattr,
    Rename,
    Rmdir,
    SetXattr,
    Stat,
    Unlink,
)

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")

PLAIN: dict[str, list[Op]] = {
    "live opaque": [
        RemoveTree(path="d"),
        Mkdir(path="d", mode=0o755),
        Create(path="d/new"),
        Stat(path="d/a"),
        Stat(path="d/e"),
        Check(),
        Remount(),
        Check(),
    ],
    "rename a merged directory twice": [
        Rename(src="d", dst="t/d2"),
        Rename(src="t/d2/e", dst="e"),
        Append(path="e/c", seed=1, length=3),
        Remount(),
        Rename(src="t/d2", dst="d"),
        Check(),
    ],
    "directory in the place of a renamed one": [
        Rename(src="d", dst="moved"),
        Mkdir(path="d"),
        Create(path="d/a"),
        Rename(src="moved/e", dst="d/e"),
        Remount(),
        Check(),
    ],
    "exchange a directory with a file": [
        Rename(src="d", dst="big", flags=2),
        Check(),
        Rename(src="d", dst="only3/x", flags=2),
        Remount(),
        Check(),
    ],
    "reader opened before copy-up": [
        Open(slot=0, path="d/a", flags=0),
        Overwrite(path="d/a", seed=4, length=10),
        OpenRead(slot=0, offset=0, length=100),
        OpenStat(slot=0),
        Unlink(path="d/a"),
        OpenStat(slot=0),
        Close(slot=0),
    ],
    "open file replaced by rename": [
        Open(slot=0, path="d/a", flags=2),
        Create(path="new"),
        Rename(src="new", dst="d/a"),
        OpenWrite(slot=0, offset=10, seed=1, length=10),
        OpenRead(slot=0, offset=0, length=6000),
        OpenStat(slot=0),
    ],
    "rmdir of a directory with whiteouts only": [
        Unlink(path="only2/x"),
        Rmdir(path="only2"),
        Mkdir(path="only2"),
        Chmod(path="only2", mode=0o700),
        Remount(),
    ],
    "take away an ACL that is not there": [
        SetXattr(path="back", name="system.posix_acl_access", value=b""),
        SetXattr(path="d", name="system.posix_acl_default", value=b""),
        RemoveXattr(path="big", name="system.posix_acl_access"),
        Check(),
    ],
    "rename of a directory onto one that is not empty": [
        Mkdir(path="tmp/d", mode=0o755),
        Link(src="tmp/mine", dst="tmp/d/old"),
        Rename(src="etc/empty", dst="tmp/d"),
        Check(),
    ],
    "capabilities given while what was written is in the cache": [
        Open(slot=2, path="opaque/sub/new", flags=66, mode=0o644),
        OpenWrite(slot=2, offset=4097, seed=77, length=4095),
        SetXattr(path="opaque/sub/new", name="security.capability", value=CAPABILITY),
        Check(),
        OpenWrite(slot=2, offset=0, seed=78, length=10),
        Check(),
    ],
    "capabilities before the data is copied": [
        SetXattr(path="attrs", name="security.capability", value=CAPABILITY),
        Append(path="attrs", seed=0, length=0),
        Check(),
    ],
    "root writes to a setuid file with capabilities": [
        Chmod(path="suid", mode=0o6711),
        SetXattr(path="suid", name="security.capability", value=CAPABILITY),
        Append(path="suid", seed=53, length=4096),
        Check(),
        Chown(path="suid", owner=-1, group=-1),
        Check(),
    ],
    "attributes, a crash, and other names": [
        Chown(path="d/a", owner=1, group=2),
        Chown(path="d/e/c", owner=1, group=2),
        Remount(crash=True),
        Check(),
        Chown(path="d/a", owner=3, group=4),
        Rename(src="d", dst="t/d"),
        Chmod(path="t/d/e/c", mode=0o600),
        Remount(crash=True),
        Append(path="t/d/a", seed=1, length=10),
        Remount(crash=True),
        Check(),
    ],
}
LINKED: dict[str, list[Op]] = {
    "copy-up of one name": [
        Append(path="h/1", seed=1, length=5),
        Stat(path="hd"),
        Unlink(path="h/s/3"),
        Check(),
    ],
}

# What only the direct transport does as the kernel: see docs/differences.md.
DIRECT: dict[str, list[Op]] = {
    "setgid without group execute": [
        Chmod(path="suid", mode=0o6666),
        Append(path="suid", seed=1, length=10, uid=1000),
        Stat(path="suid"),
    ],
}
