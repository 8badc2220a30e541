"""Mounts for tests: ours, the kernel's overlayfs, tmpfs and loop devices, always taken down again.

``UNIONFS_TEST_MOUNT_PROGRAM`` names another mount program with fuse-overlayfs' calling convention, or is
``kernel`` for the kernel's overlayfs: a debugging aid, to tell a fault of a test from a fault of ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.syscalls import MNT_DETACH, MS_RDONLY, mount, umount2

SERVER_END_S = 60.0  # a server syncs its upper directory at the end, on a disk that others use too
BUSY_S = 5.0
# pytest-timeout interrupts the test with a signal, which a process waiting for a dead-locked FUSE server does
# not act on. The watchdog kills such a server shortly before, and the waiting call ends with ENOTCONN.
WATCHDOG_S = 270.0


# How the mount table writes spaces, tabs, newlines and backslashes.
_OCTAL = re.compile(r"\\([0-7]{3})")


class MountFailedError(Exception):
    """The mount program exited non-zero; the message is what it said."""

    def __init__(self, returncode: int, stderr: str) -> None:
        super().__init__(f"exit {returncode}: {stderr.strip()}")
        self.returncode = returncode
        self.stderr = stderr


@dataclass(slots=True)
class UnionMount:
    """A mount of ours that is in place."""

    path: str
    server_pids: tuple[int, ...]
    stderr: str = ""
    expect_end: bool = field(default=True)

    @property
    def pid(self) -> int:
        """The server's process id."""
        (pid,) = self.server_pids
        return pid


def mount_program() -> str:
    """The program under test."""
    default = os.path.join(os.path.dirname(sys.executable), "unionfs-mount")
    return os.environ.get("UNIONFS_TEST_MOUNT_PROGRAM", default)


def is_ours() -> bool:
    """Whether the program under test is ours, and not the one of the debugging aid."""
    return "UNIONFS_TEST_MOUNT_PROGRAM" not in os.environ


def transports() -> tuple[str, ...]:
    """The ways in which our server talks to the kernel; every test of the file system runs on each.

    ``UNIONFS_TRANSPORT`` in the environment chooses one, for a shorter run.
    """
    if not is_ours():
        return ("other",)
    chosen = os.environ.get("UNIONFS_TRANSPORT")
    return (chosen,) if chosen else ("direct", "pyfuse3")


def escape(path: str) -> str:
    """A directory as it is written in an option string."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def option_string(
    lowers: Sequence[str], upper: str | None = None, work: str | None = None, options: Sequence[str] = ()
) -> str:
    """``lowerdir=..,upperdir=..,workdir=..`` and the further options."""
    words = ["lowerdir=" + ":".join(escape(low) for low in lowers)]
    if upper is not None:
        words.append("upperdir=" + escape(upper))
    if work is not None:
        words.append("workdir=" + escape(work))
    return ",".join([*words, *options])


def is_mounted(target: str) -> bool:
    """Whether something is mounted at ``target``."""
    # Without a look at the target itself, which would wait for a server that hangs.
    wanted = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    # A table that others change while it is read can lack a line once.
    return any(wanted in _mount_points() for _ in range(3))


def _mount_points() -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        return {_OCTAL.sub(lambda m: chr(int(m[1], 8)), line.split(" ")[4]) for line in f}


def _serves(pid: int, target: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            if os.fsencode(target) not in f.read().split(b"\0"):
                return False
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # gone in the meantime
        return False
    for fd in fds:
        # A file that the server closes meanwhile says nothing about the others.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/fuse":
                return True
    return False


def servers_of(target: str) -> tuple[int, ...]:
    """The processes that hold ``/dev/fuse`` open and were told to mount on ``target``."""
    return tuple(int(name) for name in os.listdir("/proc") if name.isdigit() and _serves(int(name), target))


def is_running(pid: int) -> bool:
    """Whether the process still runs; one that ended and waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for ``condition``; False when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _elsewhere(target: str) -> list[str]:
    """Processes of other mount namespaces in which ``target`` is still mounted: they keep the server alive."""
    found: list[str] = []
    own = os.readlink("/proc/self/ns/mnt")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/mnt") == own:
                continue
            with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
                if any(line.split(" ")[4] == target for line in f):
                    with open(f"/proc/{pid}/cmdline", "rb") as g:
                        found.append(f"{pid} {g.read()[:80]!r}")
    return found


def _waiting_in(pids: Sequence[int]) -> str:
    """Where in the kernel each thread of some processes waits."""
    found: list[str] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/stat") as f, open(f"/proc/{pid}/task/{thread}/wchan") as g:
                    found.append(f"{thread} {f.read().rpartition(')')[2].split()[0]} {g.read()}")
    return ", ".join(found)


def take_down(target: str, pids: Sequence[int] = ()) -> list[str]:
    """Unmount ``target`` and see its servers end, by force where needed; returns what was not as it should."""
    faults: list[str] = []
    deadline = time.monotonic() + BUSY_S
    while is_mounted(target):
        try:
            umount2(target)
        except OSError as error:
            if time.monotonic() < deadline and is_mounted(target):
                time.sleep(0.05)
                continue
            faults.append(f"umount {target}: {error.strerror}")
            with contextlib.suppress(OSError):
                umount2(target, MNT_DETACH)
            break
    if not wait_until(lambda: not any(is_running(p) for p in pids), 1.0 if faults else SERVER_END_S):
        faults.append(f"server of {target} still runs after unmount: {_waiting_in(pids)}; {_elsewhere(target)}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_running(p) for p in pids), 5.0)
    return faults


@contextlib.contextmanager
def mounted_program(
    argv: Sequence[str], target: str, *, cwd: str | None = None, watchdog_s: float = WATCHDOG_S
) -> Iterator[UnionMount]:
    """Run a mount program that puts itself into the background, as an engine does."""
    try:
        # Captured, because an engine waits for the end of both pipes too: a server that keeps one open hangs here.
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False, cwd=cwd, text=True
        )
        if done.returncode != 0:
            raise MountFailedError(done.returncode, done.stderr)
    except BaseException:
        take_down(target, servers_of(target))
        raise
    pids = servers_of(target)

    def kill() -> None:
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)

    watchdog = threading.Timer(watchdog_s, kill)
    watchdog.daemon = True
    watchdog.start()
    here = UnionMount(target, pids, done.stderr)
    try:
        if not is_mounted(target):
            raise AssertionError(f"{argv[0]} exited 0 and nothing is mounted on {target}: {done.stderr}")
        assert pids, f"no server process found for {target}"
        yield here
    except BaseException:
        take_down(target, pids)
        raise
    else:
        alive = all(is_running(p) for p in pids)
        faults = take_down(target, pids)
        if here.expect_end:
            assert alive, f"the server of {target} died"
            assert not faults, "; ".join(faults)
    finally:
        watchdog.cancel()


@contextlib.contextmanager
def mounted_union(
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
    target: str,
    options: Sequence[str] = (),
    *,
    watchdog_s: float = WATCHDOG_S,
) -> Iterator[UnionMount]:
    """Our union on ``target``, top layer first."""
    if mount_program() == "kernel":
        passed = ["redirect_dir=on"] * ("redirect_dir=off" not in options and upper is not None)
        passed += [o for o in options if o.partition("=")[0] in KERNEL_WORDS and o not in passed]
        with mounted_overlay(lowers, upper, work, target, passed):
            yield UnionMount(target, ())
        return
    if not is_ours():
        options = [o for o in options if not o.startswith(("redirect_dir=", "index="))]
    argv = [mount_program(), "-o", option_string(lowers, upper, work, options), target]
    with mounted_program(argv, target, watchdog_s=watchdog_s) as here:
        yield here


KERNEL_WORDS = ("redirect_dir", "metacopy", "index", "xino", "volatile", "userxattr")
KERNEL_OPTIONS = ("redirect_dir=on", "index=off", "metacopy=off")


@contextlib.contextmanager
def mounted_overlay(
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
    target: str,
    options: Sequence[str] = KERNEL_OPTIONS,
) -> Iterator[str]:
    """The kernel's overlayfs on ``target``."""
    if upper is None and len(lowers) == 1:
        lowers = [*lowers, lowers[0] + ".none"]  # it wants two layers, or an upper one
        os.makedirs(lowers[1], exist_ok=True)
    mount("overlay", target, "overlay", 0, option_string(lowers, upper, work, options))
    try:
        yield target
    finally:
        faults = take_down(target)
    assert not faults, "; ".join(faults)


@contextlib.contextmanager
def mounted_tmpfs(target: str, options: str = "") -> Iterator[str]:
    """A file system of its own in memory."""
    os.makedirs(target, exist_ok=True)
    mount("tmpfs", target, "tmpfs", 0, options)
    try:
        yield target
    finally:
        take_down(target)


@contextlib.contextmanager
def mounted_image(
    image: str, target: str, fstype: str = "ext4", size_bytes: int = 64 << 20, read_only: bool = False
) -> Iterator[str]:
    """A fresh file system in a file, mounted through a loop device."""
    os.makedirs(target, exist_ok=True)
    with open(image, "wb") as f:
        f.truncate(size_bytes)
    subprocess.run(["mkfs." + fstype, "-q", image], check=True, stdout=subprocess.DEVNULL)
    words = ["mount", "-o", "loop" + (",ro" if read_only else ""), "-t", fstype, image, target]
    subprocess.run(words, check=True)
    try:
        yield target
    finally:
        take_down(target)
        os.unlink(image)


def bind_read_only(source: str, target: str) -> None:
    """Bind ``source`` read-only on ``target``."""
    mount(source, target, "", 4096)
    mount("none", target, "", 4096 | 32 | MS_RDONLY)


@contextlib.contextmanager
def other_namespace(script: str = "") -> Iterator[int]:
    """A process in a mount namespace of its own, which has a copy of every mount; what it does first is ``script``."""
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", f"{script} echo ready; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def mounted_elsewhere(pid: int, path: str) -> bool:
    """Whether something is mounted on ``path`` in the mount namespace of a process."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return any(line.split()[4] == path for line in lines)
