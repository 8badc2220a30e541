"""Layers on id-mapped mounts, as podman hands them to a mount program that it tells to map ids as well."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.mounts import MountFailedError, wait_until
from tests.support.sandbox import Sandbox, needs_root
from tests.support.snapshot import snapshot
from tests.support.syscalls import MNT_DETACH, mount, umount2
from unionfs.fuse_ops.stack.locations import path_without_idmap
from unionfs.host.mounts import top_mount

pytest_plugins = ["tests.support.sandbox"]
needs_root()

# The same numbers on every architecture, as of all system calls since Linux 5.1.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOUNT_ATTR_IDMAP = 1, 4, 0x100000
MAPPING = "uidmapping=0:200000:65536,gidmapping=0:200000:65536"


def call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextlib.contextmanager
def id_mapped(source: str, target: str) -> Iterator[str]:
    """``source`` mounted on ``target`` with the owners 0..65535 shown as 200000.. (mount_setattr(2))."""
    with subprocess.Popen(["unshare", "--user", "sleep", "1000"]) as holder:
        try:
            own = os.readlink("/proc/self/ns/user")
            assert wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/user") != own, 20)
            for kind in ("uid", "gid"):
                with open(f"/proc/{holder.pid}/{kind}_map", "w") as file:
                    file.write("0 200000 65536\n")
            namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
        finally:
            holder.kill()
    tree = call(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_IDMAP, 0, 0, namespace)
    call(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes)))
    call(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)
    os.close(namespace)
    try:
        yield target
    finally:
        umount2(target, MNT_DETACH)


def test_ids_are_mapped_once(box: Sandbox) -> None:
    low = box.lower().file("root").file("dir/owned", owner=(5, 6))
    store = os.path.dirname(low.root)
    with id_mapped(store, box.new_dir("mapped")) as mapped:
        through = f"{mapped}/{os.path.basename(low.root)}"
        assert os.stat(f"{through}/dir/owned").st_uid == 200005
        box.freeze()
        with box.mount(MAPPING, lowers=[through]):
            shown = snapshot(box.target)
            assert (shown["root"].uid, shown["root"].gid) == (200000, 200000)
            assert (shown["dir/owned"].uid, shown["dir/owned"].gid) == (200005, 200006)
            os.chmod(box.at("dir/owned"), 0o600)
            os.chown(box.at("root"), 200007, 200008)
            assert (os.stat(box.at("dir/owned")).st_uid, os.stat(box.at("root")).st_uid) == (200005, 200007)
        assert os.lstat(box.in_upper("dir/owned")).st_uid == 5
        assert os.lstat(box.in_upper("root")).st_gid == 8
        # Without a mapping of ours, the kernel's is what shows.
        box.upper = box.work = None
        with box.mount(lowers=[through]):
            assert os.stat(box.at("dir/owned")).st_uid == 200005


def test_the_other_path_is_the_same_directory(box: Sandbox) -> None:
    low = box.lower().dir("a/b")
    assert path_without_idmap(low.root) == low.root
    assert path_without_idmap("/no/such/directory") == "/no/such/directory"
    box.freeze()
    link = box.new_dir("links") + "/short"
    with id_mapped(low.root, box.new_dir("mapped")) as mapped:
        found = top_mount(mapped)
        assert found is not None
        assert found.id_mapped
        os.symlink(f"{mapped}/a/b", link)
        for path in (link, f"{mapped}/a/b", f"{mapped}/a/../a/b"):
            assert path_without_idmap(path) == low.at("a/b")
        # Where something lies over the directory, the way leads through nothing.
        mount("tmpfs", low.at("a"), "tmpfs")
        try:
            with pytest.raises(MountFailedError, match="maps ids"), box.mount(MAPPING, lowers=[f"{mapped}/a/b"]):
                pass
        finally:
            umount2(low.at("a"))
