"""The work directory: who may use it, and what it hands on to the files that are made in it."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.programs import layer_options, server_of
from tests.drivers.xfs import mounted_xfs
from tests.support.mounts import is_running, mount_program, mounted_image, servers_of, take_down
from tests.support.sandbox import Sandbox, needs_root
from unionfs.drivers.union import check_filesystem
from unionfs.errors import IncompatibleFilesystemError, LayerError
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.option_text import parse_options
from unionfs.fuse_ops.stack import workdir
from unionfs.fuse_ops.stack.workdir import WorkDir, prepare_workdir
from unionfs.host import inode_flags, syscalls

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``upper`` and ``work`` with an ``other`` of each."""
    for name in ("upper", "other-upper", "work", "other-work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def first(place: Path) -> Iterator[WorkDir]:
    """A server's use of ``upper`` and ``work``."""
    used = prepare_workdir("work", "upper", volatile=False)
    assert used.claim is not None
    assert used.warnings == []
    yield used


@pytest.mark.parametrize(("work", "upper"), [("work", "upper"), ("other-work", "upper"), ("work", "other-upper")])
def test_second_use_is_warned_of(first: WorkDir, work: str, upper: str) -> None:
    second = prepare_workdir(work, upper, volatile=False)
    assert second.claim is None
    (warning,) = second.warnings
    assert f"upperdir {upper} is in use" in warning
    second.close()
    with pytest.raises(LayerError, match="in use by another mount"):
        prepare_workdir(work, upper, volatile=False, exclusive=True)
    first.close()
    third = prepare_workdir(work, upper, volatile=False, exclusive=True)
    assert (third.claim is not None, third.warnings) == (True, [])
    third.close()


def test_server_that_ends_is_waited_for(first: WorkDir) -> None:
    """Its mount is gone, and it still writes; longer than one takes to notice that its mount is gone."""
    assert first.claim is not None
    first.claim.end_soon()
    ended = threading.Event()

    def end() -> None:
        ended.set()
        first.close()

    timer = threading.Timer(1.0, end)
    timer.start()
    second = prepare_workdir("work", "upper", volatile=False)
    assert ended.is_set()
    assert (second.claim is not None, second.warnings) == (True, [])
    second.close()


def test_of_two_that_wait_one_gets_it(first: WorkDir) -> None:
    assert first.claim is not None
    first.claim.end_soon()
    seen: list[list[str]] = []

    def use() -> None:
        used = prepare_workdir("work", "upper", volatile=False)
        seen.append(used.warnings)
        if used.claim is not None:
            used.claim.end_soon()
        used.close()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    first.close()
    for thread in threads:
        thread.join()
    assert seen == [[]] * 4


def test_mount_again_at_once(box: Sandbox) -> None:
    """umount(8) does not wait for the server; the next mount does."""
    box.lower().file("name", b"text").file("other", b"text")
    with mounted_image(f"{box.root}/image", f"{box.root}/disk") as disk:
        box.upper, box.work = box.new_dir("disk/upper"), box.new_dir("disk/work")
        command = [mount_program(), "-o", layer_options(box), box.target]
        subprocess.run(command, check=True)
        server = server_of(box.target)
        os.unlink(box.at("name"))  # so that there is something left in the work directory, to be removed at the end
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
        try:
            subprocess.run(["umount", box.target], check=True)
            again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            time.sleep(1)
            waited = again.poll() is None and is_running(server)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
        said = again.communicate()[1]
        assert (again.returncode, said, waited) == (0, "", True)
        assert os.listdir(box.target) == ["other"]
        assert take_down(box.target, servers_of(box.target)) == []


# What a shell does to a work directory "$1", of which nothing may get onto a file.
INHERITABLE = {
    "default ACL": "setfacl -d -m u:1234:rwx,o::rwx $1",
    "both ACLs": "setfacl -d -m u:1234:rwx $1; setfacl -m u:1234:rwx $1",
    "inner one with ACLs": "mkdir $1/work; setfacl -d -m u:1234:rwx $1/work; setfacl -m u:1234:rwx $1/work",
    "setgid": "chgrp 77 $1; chmod 2777 $1",
    "inner one with everything": "mkdir $1/work; chown 5:6 $1/work; chmod 7777 $1/work",
    "flags": "chattr +Ad $1",
}

# Copies, and objects made where there was a lower one: those of which the work directory is the first parent.
MAKE = """
    echo more >> file; touch dir/new; chown 5:6 dir/deep/file; rm gone; echo again > gone; rmdir empty; mkdir empty
    mkdir empty/in; rm fifo; mkfifo fifo; chown 7:8 other-fifo; mv dir/deep dir/moved; chmod 711 dir
"""

Looks = dict[str, tuple[str, int, int, list[str], int | None, int | None]]


def looks(upper: str) -> Looks:
    """Mode, owner, group, ACLs, flags and project of everything in an upper directory."""
    found: Looks = {}
    for base, directories, names in os.walk(upper):
        for name in (*directories, *names):
            path = os.path.join(base, name)
            st = os.lstat(path)
            acls = [name for name in os.listxattr(path, follow_symlinks=False) if "acl" in name]
            flags: int | None = None
            project: int | None = None
            if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
                fd = os.open(path, os.O_RDONLY)
                flags, project = inode_flags.get_flags(fd), inode_flags.get_extended(fd).project
                os.close(fd)
            found[os.path.relpath(path, upper)] = (oct(st.st_mode), st.st_uid, st.st_gid, acls, flags, project)
    return found


def fill(box: Sandbox) -> None:
    low = box.lower().file("file", "text", mode=0o600).file("gone", "text").dir("empty", mode=0o700)
    low.file("dir/deep/file", "text", mode=0o640).dir("dir", mode=0o700)
    low.node("fifo", stat.S_IFIFO).node("other-fifo", stat.S_IFIFO)


def prepare(box: Sandbox, upper: str, commands: str) -> None:
    """Go on with a fresh upper directory, for whose work directory a shell runs ``commands``."""
    box.fresh_upper(upper)
    subprocess.run(["sh", "-ec", commands, "sh", str(box.work)], cwd=str(box.upper), check=True)


def make_all(box: Sandbox) -> Looks:
    subprocess.run(["sh", "-ec", MAKE], cwd=box.target, check=True)
    return looks(str(box.upper))


def test_nothing_is_inherited_from_the_work_directory(box: Sandbox) -> None:
    fill(box)
    with box.kernel():
        expected = make_all(box)
    assert len(expected) > 8
    for number, way in enumerate(INHERITABLE):
        prepare(box, f"upper-{number}", INHERITABLE[way])
        with box.mount():
            assert make_all(box) == expected, way
        if way != "flags":  # which the kernel hands on
            prepare(box, f"upper-{number}-kernel", INHERITABLE[way])
            with box.kernel():
                assert make_all(box) == expected, way


def test_upper_directory_hands_its_flags_on(box: Sandbox) -> None:
    fill(box)
    prepare(box, "flagged", "chattr +Ad .")
    with box.mount():
        found = make_all(box)
    assert {seen[4] & 0xC0 for seen in found.values() if seen[4] is not None} == {0xC0}


@pytest.mark.parametrize("projects", [(9, 0), (0, 9), (9, 9), (9, 8)], ids=str)
def test_projects(box: Sandbox, tmp_path: Path, projects: tuple[int, int]) -> None:
    """What gets into a directory with a project has to be in it, or XFS and ext4 refuse it with EXDEV."""
    fill(box)
    with mounted_xfs(tmp_path / "image", tmp_path / "xfs"):
        box.upper, box.work = str(tmp_path / "xfs/upper"), str(tmp_path / "xfs/work")
        for directory, project in zip((box.upper, box.work), projects, strict=True):
            os.mkdir(directory)
            fd = os.open(directory, os.O_RDONLY)
            inode_flags.set_project(fd, project, inherit=bool(project))
            os.close(fd)
        with box.mount():
            found = make_all(box)
        assert {seen[5] for seen in found.values() if seen[5] is not None} == {projects[0]}


def test_file_system_that_cannot_exchange_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bindfs, encfs, NFS: with them, what was deleted could be back after a crash. The kernel refuses them too."""
    asked: list[int] = []

    def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
        asked.append(flags)
        raise OSError(errno.EINVAL, "Invalid argument")

    (place / "lower").mkdir()
    options = parse_options(["lowerdir=lower,upperdir=upper,workdir=work"]).options
    monkeypatch.setattr(workdir, "_EXCHANGING", frozenset())
    open_tree(options).close()
    check_filesystem(str(place))
    monkeypatch.setattr(syscalls, "renameat2", renameat2)
    with pytest.raises(LayerError, match=r"upperdir .*/upper: its file system .* cannot exchange two names"):
        open_tree(options)
    with pytest.raises(IncompatibleFilesystemError, match="cannot exchange two names"):
        check_filesystem(str(place))
    assert asked == [syscalls.RENAME_EXCHANGE] * 2
    assert os.listdir("work/work") == []
    assert sorted(os.listdir()) == ["lower", "other-upper", "other-work", "upper", "work"]
    # A disk that is full says nothing about that.
    mkdir = os.mkdir

    def full(path: str | bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if os.fsencode(path).startswith(b"#check"):
            raise OSError(errno.ENOSPC, "No space left on device")
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", full)
    open_tree(options).close()
