"""How a mount ends: by signals, by unmounting from outside, and with its users still there."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.cli.programs import layer_options, listed_at, mounted_under, server_of, unionfs_mount
from tests.support.mounts import is_mounted, is_running, mount_program, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import MNT_DETACH, umount2

pytest_plugins = ["tests.support.sandbox"]
needs_root()

END_S = 10.0
# Small enough that the kernel does not start writing by itself at once.
DIRTY = os.urandom(64 * 1024)


@pytest.fixture
def mounted(box: Sandbox) -> Iterator[Sandbox]:
    """A mount whose end is the test's business."""
    box.lower().file("name", b"text").dir("dir")
    # Without passthrough: with it, written data is in the upper file at once, and there is none to lose.
    done = unionfs_mount("-o", layer_options(box) + ",passthrough=0", box.target)
    assert done.returncode == 0, done.stderr
    pid = server_of(box.target)
    try:
        yield box
    finally:
        take_down(box.target, [pid])


@contextlib.contextmanager
def user(box: Sandbox) -> Iterator[int]:
    """A descriptor of a file whose data as a rule only the kernel has."""
    fd = os.open(box.at("dirty"), os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, DIRTY)
        yield fd
    finally:
        # The last close writes, for which a dead server is not there.
        with contextlib.suppress(OSError):
            os.close(fd)


@contextlib.contextmanager
def user_with_dirty_data(box: Sandbox) -> Iterator[int]:
    """As :func:`user`, and the data is not written yet."""
    with user(box) as fd:
        assert in_upper(box) != DIRTY, "nothing was left to lose"
        yield fd


def in_upper(box: Sandbox) -> bytes:
    with open(box.in_upper("dirty"), "rb") as file:
        return file.read()


def ended(pid: int) -> bool:
    return wait_until(lambda: not is_running(pid), END_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts_an_idle_mount(mounted: Sandbox, number: int) -> None:
    pid = server_of(mounted.target)
    os.kill(pid, number)
    assert ended(pid)
    assert mounted_under(mounted.root) == []


def test_sigterm_loses_nothing_and_serves_the_last_user(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    with user_with_dirty_data(mounted) as fd:
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not is_mounted(mounted.target), END_S)
        # Written before it went out of sight, although the file is still open...
        assert in_upper(mounted) == DIRTY
        # ... and can still be used.
        assert is_running(pid)
        os.pwrite(fd, b"later", 0)
        assert os.pread(fd, 6, 0) == b"later" + DIRTY[5:6]
        time.sleep(0.3)
        assert is_running(pid)
    assert ended(pid)
    assert in_upper(mounted) == b"later" + DIRTY[5:]
    assert mounted_under(mounted.root) == []


def test_many_dirty_files_survive_sigterm(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    fds = []
    for number in range(200):
        fds.append(os.open(mounted.at(f"f{number}"), os.O_RDWR | os.O_CREAT))
        os.write(fds[-1], b"%d" % number * 1000)
    os.kill(pid, signal.SIGTERM)
    assert wait_until(lambda: not is_mounted(mounted.target), END_S)
    for number, fd in enumerate(fds):
        with open(mounted.in_upper(f"f{number}"), "rb") as file:
            assert file.read() == b"%d" % number * 1000
        os.close(fd)
    assert ended(pid)


def test_second_signal_ends_at_once(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    with user_with_dirty_data(mounted) as fd:
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not is_mounted(mounted.target), END_S)
        os.kill(pid, signal.SIGTERM)
        assert ended(pid)
        with pytest.raises(OSError, match="not connected"):
            os.fstatvfs(fd)  # the one question that the kernel never answers from memory
    assert in_upper(mounted) == DIRTY


def test_lazy_unmount_serves_the_last_user(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    with user_with_dirty_data(mounted):
        here = os.open(mounted.at("dir"), os.O_RDONLY)
        umount2(mounted.target, MNT_DETACH)
        assert not is_mounted(mounted.target)
        with open(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
            file.write(b"made later")
        assert os.listdir(here) == ["new"]
        listed = listed_at(mounted.target)
        assert listed is not None
        assert listed["state"] == "detached"
        os.close(here)
        assert is_running(pid)
    assert ended(pid)
    assert in_upper(mounted) == DIRTY
    with open(mounted.in_upper("dir/new"), "rb") as file:
        assert file.read() == b"made later"
    assert listed_at(mounted.target) is None


def test_unmount_from_outside_ends_the_server(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    umount2(mounted.target)
    assert ended(pid)
    assert listed_at(mounted.target) is None


def test_bind_mount_keeps_the_server(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    other = mounted.new_dir("other")
    subprocess.run(["mount", "--bind", mounted.target, other], check=True)
    try:
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not is_mounted(mounted.target), END_S)
        time.sleep(0.3)
        assert os.listdir(other) == ["dir", "name"] or set(os.listdir(other)) == {"dir", "name"}
        assert is_running(pid)
    finally:
        umount2(other)
    assert ended(pid)


def test_moved_mount_is_unmounted_where_it_is(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    private, moved = mounted.new_dir("private"), mounted.new_dir("private/moved")
    # A mount can only be moved out of a private one; the root file system may be shared.
    subprocess.run(["mount", "--bind", "--make-private", private, private], check=True)
    try:
        os.mkdir(f"{private}/first")
        subprocess.run(["mount", "--move", mounted.target, moved], check=True)
        os.kill(pid, signal.SIGTERM)
        assert ended(pid)
        assert mounted_under(mounted.root) == [private]
    finally:
        umount2(private, MNT_DETACH)


def test_covered_mount_is_not_confused_with_its_cover(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    subprocess.run(["mount", "-t", "tmpfs", "cover", mounted.target], check=True)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    assert mounted_under(mounted.root) == [mounted.target, mounted.target]
    umount2(mounted.target)
    assert is_running(pid)
    umount2(mounted.target)
    assert ended(pid)


def test_hangup_is_ignored(mounted: Sandbox) -> None:
    pid = server_of(mounted.target)
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.3)
    assert is_running(pid)
    assert os.path.exists(mounted.at("name"))


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
            found += map(int, file.read().split())
    return found


def test_killed_while_it_unmounts_leaves_nobody_waiting(box: Sandbox) -> None:
    """The trap: a server that waits in the kernel for itself can never be killed."""
    box.lower().file("name", b"text")
    for _ in range(50):
        assert unionfs_mount("-o", layer_options(box) + ",passthrough=0", box.target).returncode == 0
        pid = server_of(box.target)
        try:
            with user(box) as fd:
                os.kill(pid, signal.SIGTERM)
                helpers: list[int] = []
                while not helpers and is_mounted(box.target):
                    helpers = children(pid)
                # The helper asks the server something. As a rule it is answered in no time, so it takes some attempts.
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.1)
                caught = bool(helpers) and is_running(helpers[0])
                os.kill(pid, signal.SIGKILL)
                assert ended(pid)
                assert all(ended(helper) for helper in helpers)
                with pytest.raises(OSError, match="not connected"):
                    os.fstatvfs(fd)
        finally:
            take_down(box.target, [pid])
        if caught:
            return
    raise AssertionError("no helper was seen to wait for the server")


def foreground(box: Sandbox, *words: str) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [mount_program(), *words, "-o", layer_options(box), box.target],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: listed_at(box.target) is not None, END_S)
    return server


def test_foreground_ends_well(box: Sandbox) -> None:
    box.lower().file("name", b"text")
    server = foreground(box, "-f")
    assert server_of(box.target) == server.pid
    assert os.path.exists(box.at("name"))
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=END_S)
    assert (server.returncode, out, err) == (0, "", "")
    assert mounted_under(box.root) == []


def test_counters_are_logged(box: Sandbox) -> None:
    box.lower().file("name", b"text")
    server = foreground(box, "-f")
    try:
        server.send_signal(signal.SIGUSR1)
        assert server.stderr is not None
        assert select.select([server.stderr], [], [], END_S)[0]
        assert server.stderr.readline().startswith("unionfs-mount: counters: ")
        assert is_running(server.pid)
    finally:
        server.terminate()
        server.communicate(timeout=END_S)


def test_debug_tells_requests(box: Sandbox) -> None:
    box.lower().file("name", b"text")
    server = foreground(box, "-d")
    os.stat(box.at("name"))
    server.terminate()
    _, err = server.communicate(timeout=END_S)
    assert server.returncode == 0
    assert "lookup" in err.lower()
