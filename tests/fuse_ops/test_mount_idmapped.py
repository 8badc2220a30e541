"""An id-mapped mount of our mount: what a container's own user namespace needs, without changing a file."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import idmapped_clone, move_mount, umount2
from tests.support.users import as_user

pytest_plugins = ["tests.support.sandbox"]
needs_root()

_FIRST = 100_000


@pytest.fixture
def mapped(direct_box: Sandbox) -> Iterator[Sandbox]:
    """A mount whose ids from 0 are shown as those from 100000 at ``<root>/mapped``."""
    box = direct_box
    box.lower().file("root", "r", mode=0o4755).file("seven", "s", mode=0o640, owner=(7, 8)).dir("d", owner=(7, 8))
    box.new_dir("mapped")
    with box.mount(), _user_namespace() as namespace:
        target = os.path.join(box.root, "mapped")
        fd = idmapped_clone(box.target, namespace)
        try:
            move_mount(fd, target)
        finally:
            os.close(fd)
        try:
            yield box
        finally:
            umount2(target)


@contextlib.contextmanager
def _user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace with the ids from 0 at those from 100000."""
    with subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo; read end"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdout.readline()
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{holder.pid}/{kind}", "w") as file:
                file.write(f"0 {_FIRST} 65536")
        fd = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
            holder.stdin.close()


def owner(path: str) -> tuple[int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid


def test_owners_are_shown_and_stored_through_the_map(mapped: Sandbox) -> None:
    box = mapped
    there = os.path.join(box.root, "mapped")
    assert owner(f"{there}/root") == (_FIRST, _FIRST)
    assert owner(f"{there}/seven") == (_FIRST + 7, _FIRST + 8)
    os.chown(f"{there}/root", _FIRST + 3, _FIRST + 4)
    assert owner(box.at("root")) == (3, 4) == owner(box.in_upper("root"))

    def create() -> None:
        with open(f"{there}/d/new", "w") as file:
            file.write("n")
        os.mkdir(f"{there}/d/dir")
        os.symlink("x", f"{there}/d/link")
        os.mkfifo(f"{there}/d/fifo")

    as_user(_FIRST + 7, create, gid=_FIRST + 8)
    for name in ("new", "dir", "link", "fifo"):
        assert owner(f"{there}/d/{name}") == (_FIRST + 7, _FIRST + 8)
        assert owner(box.in_upper(f"d/{name}")) == (7, 8)


def test_permissions_are_those_of_the_mapped_ids(mapped: Sandbox) -> None:
    there = os.path.join(mapped.root, "mapped")

    def read() -> None:
        with open(f"{there}/seven") as file:
            assert file.read() == "s"

    as_user(_FIRST + 7, read, gid=1)

    def refused() -> None:
        with pytest.raises(PermissionError):
            read()

    as_user(7, refused, gid=8)


def test_callers_that_the_kernel_does_not_name_are_found(mapped: Sandbox) -> None:
    box = mapped
    there = os.path.join(box.root, "mapped")
    os.setxattr(f"{there}/seven", "trusted.secret", b"1")
    os.setxattr(f"{there}/seven", "user.open", b"1")
    assert {"trusted.secret", "user.open"} <= set(os.listxattr(f"{there}/seven"))

    def user_lists() -> None:
        assert os.listxattr(f"{there}/seven") == ["user.open"]

    as_user(_FIRST + 7, user_lists, gid=_FIRST + 8)

    # Setuid goes when its owner, without privilege, truncates it; and stays when root does.
    os.chown(f"{there}/root", _FIRST + 7, _FIRST + 8)
    os.chmod(f"{there}/root", 0o4755)
    os.truncate(f"{there}/root", 1)
    assert os.lstat(f"{there}/root").st_mode & 0o7777 == 0o4755
    as_user(_FIRST + 7, lambda: os.truncate(f"{there}/root", 0), gid=_FIRST + 8)
    assert os.lstat(f"{there}/root").st_mode & 0o7777 == 0o755
