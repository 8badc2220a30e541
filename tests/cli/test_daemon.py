"""What a caller of the mount program gets back, and what the server takes with it from the caller."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from tests.cli.programs import TIMEOUT_S, layer_options, run, server_of, unionfs_mount
from tests.support.mounts import is_mounted, is_running, mount_program, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def layers(box: Sandbox) -> Sandbox:
    """A sandbox with one lower layer."""
    box.lower().file("name", b"text")
    return box


def test_mount_is_usable_when_the_program_returns(layers: Sandbox) -> None:
    for _ in range(5):
        done = unionfs_mount("-o", layer_options(layers), layers.target)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.listdir(layers.target) == ["name"]
        assert take_down(layers.target, [server_of(layers.target)]) == []


def test_server_keeps_nothing_of_the_caller(layers: Sandbox) -> None:
    lock = os.open(layers.new_dir("caller"), os.O_RDONLY)
    done = run(
        [mount_program(), "-o", layer_options(layers), layers.target],
        cwd=os.path.join(layers.root, "caller"),
        pass_fds=[lock],
    )
    assert done.returncode == 0
    pid = server_of(layers.target)
    try:
        fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert [fds[fd] for fd in "012"] == ["/dev/null"] * 3
        assert f"{layers.root}/caller" not in fds.values()
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert not [path for path in fds.values() if path.startswith(layers.target)]
    finally:
        os.close(lock)
        take_down(layers.target, [pid])


def test_layer_named_by_a_descriptor(layers: Sandbox) -> None:
    fd = os.open(layers.lowers[0], os.O_RDONLY)
    done = unionfs_mount("-o", f"lowerdir=/proc/self/fd/{fd}", layers.target, pass_fds=[fd])
    os.close(fd)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(layers.target) == ["name"]
    finally:
        take_down(layers.target, [server_of(layers.target)])


def test_standard_descriptors_may_be_closed(layers: Sandbox) -> None:
    script = '"$@" <&- >&- 2>&-'
    done = run(["sh", "-c", script, "sh", mount_program(), "-o", layer_options(layers), layers.target])
    try:
        assert done.returncode == 0
        assert os.listdir(layers.target) == ["name"]
    finally:
        take_down(layers.target, [server_of(layers.target)])


def test_limits_and_umask(layers: Sandbox) -> None:
    script = 'umask 077; ulimit -Sn 100; exec "$@"'
    done = run(["sh", "-c", script, "sh", mount_program(), "-o", layer_options(layers), layers.target])
    assert done.returncode == 0
    pid = server_of(layers.target)
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 100
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            assert "Umask:\t0000\n" in status.readlines()
        made = os.open(layers.at("made"), os.O_CREAT | os.O_WRONLY, 0o666)
        os.close(made)
    finally:
        take_down(layers.target, [pid])


def mount_once(layers: Sandbox) -> None:
    """Have Python's compiled modules in its cache: under a limit, it writes the half of one and reads it ever after."""
    assert unionfs_mount("-o", layer_options(layers), layers.target).returncode == 0
    take_down(layers.target, [server_of(layers.target)])


# Executes the words after it with every signal blocked and SIGCHLD ignored.
BLOCKED = """import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])"""


def test_what_hurts_others_is_not_taken_from_the_caller(layers: Sandbox) -> None:
    mount_once(layers)
    limits = "ulimit -Sf 8; ulimit -Sv 8000000; ulimit -Sd 8000000; ulimit -St 100; ulimit -Sn 100; "
    words = [sys.executable, "-c", BLOCKED, mount_program(), "-o", layer_options(layers), layers.target]
    done = run(["sh", "-c", limits + 'exec "$@"', "sh", *words])
    assert (done.returncode, done.stderr) == (0, "")
    pid = server_of(layers.target)
    try:
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CPU):
            soft, hard = resource.prlimit(pid, limit)
            assert soft == hard == resource.getrlimit(limit)[1]
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] > 1000
        with open(layers.at("name"), "ab") as file:
            file.write(bytes(1 << 20))
        assert os.stat(layers.in_upper("name")).st_size > 1 << 20
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: not is_running(pid), 20)
        assert not is_mounted(layers.target)
    finally:
        take_down(layers.target, [pid])


def test_relative_paths(layers: Sandbox) -> None:
    words = ["-o", "lowerdir=lower1,upperdir=upper,workdir=work", "mnt"]
    done = unionfs_mount(*words, cwd=layers.root)
    assert done.returncode == 0, done.stderr
    pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _argv(pid)[-3:] == words]
    try:
        assert os.listdir(layers.target) == ["name"]
    finally:
        take_down(layers.target, pids)
    assert len(pids) == 1


def _argv(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split("\0")[:-1]
    except OSError:
        return []


def test_target_that_is_a_link(layers: Sandbox) -> None:
    link = os.path.join(layers.root, "link")
    os.symlink("mnt", link)
    assert unionfs_mount("-o", layer_options(layers), link).returncode == 0
    try:
        assert os.listdir(layers.target) == ["name"]
    finally:
        take_down(layers.target, [server_of(link)])


def test_mount_ends_when_the_caller_is_gone_before_it_is_ready() -> None:
    """Nobody would know of such a mount."""
    script = """if True:
        import os, sys, time
        from unionfs.host.daemon import daemonize

        def serve(ready):
            print(os.getpid(), flush=True)
            os.kill(os.getppid(), 9)
            time.sleep(0.3)
            try:
                ready()
            except BrokenPipeError:
                open(sys.argv[1], "w").write("told")
            return 0

        daemonize(serve)
    """
    path = f"/tmp/unionfs-test-daemon-{os.getpid()}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, path], stdout=subprocess.PIPE, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == -9
        assert wait_until(lambda: not is_running(int(done.stdout)), 5)
        with open(path, encoding="utf-8") as file:
            assert file.read() == "told"
    finally:
        if os.path.exists(path):
            os.unlink(path)


def test_server_that_is_killed_before_it_is_ready() -> None:
    script = """if True:
        import os, sys
        from unionfs.host.daemon import daemonize
        sys.exit(daemonize(lambda ready: os.kill(os.getpid(), 9)))
    """
    done = run([sys.executable, "-c", script])
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "SIGKILL" in done.stderr
