"""The session's promise: however it ends, nothing stays mounted and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from tests.support.mounts import is_mounted, is_running, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()

# A file system of one file, whose handlers go wrong as the first argument says.
SERVER = """if True:
    import errno, logging, os, stat, sys
    import pyfuse3, trio
    from unionfs.fuse_ops.options import MountOptions
    from unionfs.fuse_ops.transports.pyfuse3 import Pyfuse3Transport
    from unionfs.fuse_ops.session.session import run_session

    mode, target = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="log: %(message)s")

    class Wrong(pyfuse3.Operations):
        enable_writeback_cache = True

        def init(self):
            if mode == "slow start":
                import time
                time.sleep(0.5)

        async def getattr(self, inode, ctx):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
            return entry

        async def lookup(self, parent, name, ctx):
            if name == b"raise":
                raise ZeroDivisionError("in a handler")
            if name == b"file":
                return await self.getattr(2, ctx)
            raise pyfuse3.FUSEError(errno.ENOENT)

        async def setattr(self, inode, attr, fields, fh, ctx):
            return await self.getattr(inode, ctx)

        async def open(self, inode, flags, ctx):
            return pyfuse3.FileInfo(fh=inode)

        async def opendir(self, inode, ctx):
            return inode

        async def write(self, fh, off, buf):
            await trio.sleep_forever()

        async def flush(self, fh):
            pass

        async def release(self, fh):
            pass

        async def statfs(self, ctx):
            return pyfuse3.StatvfsData()

    if mode == "early signal":
        mount = pyfuse3.init

        def mount_and_signal(*args):
            mount(*args)
            os.kill(os.getpid(), 15)

        pyfuse3.init = mount_and_signal

    options = MountOptions(lowerdirs=("/",), debug=False)
    print("start", flush=True)
    try:
        run_session(Pyfuse3Transport(Wrong(), options), options, target, ready=lambda: print("ready", flush=True),
                    statistics=lambda: {"nodes": 3, "handles": 0})
    except BaseExceptionGroup as group:
        print("raised", repr(group.exceptions[0]), flush=True)
    except Exception as error:
        print("raised", repr(error), flush=True)
    else:
        print("returned", flush=True)
"""


class Server:
    """The server as a child process, and what it says."""

    def __init__(self, mode: str, target: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, mode, target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.line() == "start"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def rest(self) -> list[str]:
        # Not communicate(), which does not see what readline() has read ahead.
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        self.process.wait(20)
        return lines


@pytest.fixture(autouse=True)
def nothing_stays(box: Sandbox) -> None:
    """Every test here ends without a mount; the sandbox checks it."""


def test_exception_in_a_handler_unmounts(box: Sandbox) -> None:
    server = Server("", box.target)
    assert server.line() == "ready"
    assert is_mounted(box.target)
    with pytest.raises(OSError, match=r"not connected|Software caused|No such"):
        os.stat(box.at("raise"))
    assert server.rest()[-1].startswith("raised ")
    assert not is_mounted(box.target)


def test_ready_means_that_a_request_is_answered(box: Sandbox) -> None:
    """The kernel lets requests wait until the session is accepted, here half a second after the mount."""
    server = Server("slow start", box.target)
    assert wait_until(lambda: is_mounted(box.target), 10)
    assert server.line() == "ready"
    assert stat.S_ISDIR(os.stat(box.target).st_mode)
    server.process.terminate()
    assert server.rest()[-1] == "returned"


def test_signal_right_after_the_mount(box: Sandbox) -> None:
    """Before anybody listens for signals, its default would leave a dead mount."""
    server = Server("early signal", box.target)
    said = server.rest()
    assert server.process.returncode == 0
    assert said[-1] == "returned" or "raised MountError" in said[-1]
    assert not is_mounted(box.target)


def test_second_signal_ends_a_sync_that_hangs(box: Sandbox) -> None:
    """The upper's disk may never answer; the one who asks twice gets an end."""
    server = Server("", box.target)
    assert server.line() == "ready"
    writer = subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={box.at('file')}", "bs=4096", "count=1", "conv=notrunc"], stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until(lambda: not is_running(writer.pid) or _waits(writer.pid), 10)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1.0)
        server.process.send_signal(signal.SIGTERM)
        assert "log: second signal: ending at once" in server.rest()
        assert not is_mounted(box.target)
        writer.wait(10)
    finally:
        server.process.kill()
        take_down(box.target, [server.process.pid])
        writer.wait(10)


def _waits(pid: int) -> bool:
    with open(f"/proc/{pid}/wchan", encoding="ascii") as file:
        return "wait" in file.read()


def test_counters(box: Sandbox) -> None:
    server = Server("", box.target)
    assert server.line() == "ready"
    server.process.send_signal(signal.SIGUSR1)
    assert server.line() == "log: counters: nodes=3 handles=0"
    server.process.terminate()
    assert server.rest() == ["returned"]


def test_mount_that_is_refused(box: Sandbox) -> None:
    server = Server("", f"{box.root}/none")
    (said,) = server.rest()
    assert said.startswith("raised MountError(")
    assert f"{box.root}/none" in said
    assert "\\n" not in said
