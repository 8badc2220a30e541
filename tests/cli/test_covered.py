"""A mount that covers what its server is made of: Python, this package, the directories of sockets and records."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.cli.programs import layer_options
from tests.support.mounts import is_mounted, is_running, mount_program, wait_until
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()

REPOSITORY = str(Path(__file__).resolve().parents[2])

# What is asked of a server while its mount covers "$1": requests, its counters, its end.
COVER = """
"$2" -o "$3" "$1" && echo mounted && read pid || exit 1
ls -l "$1" >/dev/null
mkdir "$1/made" && echo new > "$1/made/file" && sync "$1/made/file"
kill -USR1 $pid
cat "$1/made/file"
kill -TERM $pid
while test -d /proc/$pid; do sleep 0.05; done
! grep -F " $1 fuse" /proc/self/mountinfo
"""


@pytest.mark.parametrize("covered", [REPOSITORY, "/usr", "/run", "/dev"])
def test_server_goes_on_and_ends(box: Sandbox, covered: str) -> None:
    words = f"lowerdir={covered},upperdir={box.upper},workdir={box.work},dev"
    shell = ["unshare", "--mount", "--propagation", "private", "sh", "-c", COVER, "sh", covered, mount_program(), words]
    with subprocess.Popen(
        shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    ) as process:
        watchdog = threading.Timer(30, kill_servers, [box])
        watchdog.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mounted\n"
            (server,) = servers(box)
            said, _ = process.communicate(f"{server}\n")
        finally:
            watchdog.cancel()
            process.kill()
            kill_servers(box)
    assert (said, process.returncode) == ("new\n", 0)
    assert Path(box.in_upper("made/file")).read_text() == "new\n"


def servers(box: Sandbox) -> list[int]:
    """The processes that were told to serve the sandbox' upper directory."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            told = f"upperdir={box.upper},".encode() in Path(f"/proc/{name}/cmdline").read_bytes()
            if told and os.readlink(f"/proc/{name}/exe") == os.path.realpath(sys.executable):  # not the shell
                found.append(int(name))
    return found


def kill_servers(box: Sandbox) -> None:
    for pid in servers(box):
        os.kill(pid, signal.SIGKILL)


# The mount program in the foreground, telling at its end which paths were named to the kernel after the mount. Those
# below /proc are its own, and relative ones belong to a descriptor.
WATCHED = """
    import os, sys

    from unionfs.fuse_ops.session import mount_server
    from unionfs.fuse_ops.transports import choice

    mounted = False
    named = []

    def hook(event, args):
        if not mounted or event not in EVENTS:
            return
        what = args[0] if event != "socket.connect" else args[1]
        text = os.fsdecode(what) if isinstance(what, (str, bytes)) else ""
        if event in ("import", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            named.append(f"{event} {what}")
        elif text.startswith("/") and not text.startswith("/proc/"):
            named.append(f"{event} {text}")

    EVENTS = {"import", "open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.chmod",
              "os.chdir", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "ctypes.dlopen"}

    class Watched:
        def __init__(self, inner):
            self._inner = inner

        name = property(lambda self: self._inner.name)

        def mount(self, target):
            global mounted
            self._inner.mount(target)
            mounted = True

        def serve(self, accepted, gone):
            return self._inner.serve(accepted, gone)

        def close(self):
            self._inner.close()

    choose = choice.choose_transport
    choice.choose_transport = lambda *args: Watched(choose(*args))
    sys.addaudithook(hook)
    status = mount_server.main(sys.argv[1:])
    mounted = False
    print(*named, sep=chr(10))
    sys.exit(status)
"""


@pytest.mark.parametrize("options", [(), ("quota=1000000000",), ("metacopy=on", "xattr_permissions=2")], ids=str)
def test_no_path_is_named_after_the_mount(box: Sandbox, options: tuple[str, ...]) -> None:
    box.lower().file("f", b"text").file("big", bytes(5 << 20)).file("d/x", b"x").symlink("l", "f").link("f2", "f")
    words = ["-f", "-o", ",".join([layer_options(box), *options]), box.target]
    command = [sys.executable, "-c", textwrap.dedent(WATCHED), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert wait_until(lambda: is_mounted(box.target), 20)
            subprocess.run(["sh", "-ec", EVERYTHING], cwd=box.target, check=True, capture_output=True)
            server.send_signal(signal.SIGUSR1)
            os.stat(box.target)
            server.terminate()
            said, complaints = server.communicate(timeout=60)
        finally:
            server.kill()
    assert not is_running(server.pid)
    assert (said, server.returncode) == ("\n", 0), complaints


EVERYTHING = """
ls -lR . && cat f l && head -c 100 big
echo more >> f2 && echo x >> big && truncate -s 3 d/x && chown 5:5 f && chmod 600 d
mkdir m && mv d d2 && mv f m/g && ln m/g m/h && ln -s g m/i && mkfifo m/p && mknod m/n b 7 250
cp big m/copy && dd if=/dev/zero of=m/z bs=1M count=3 conv=fsync && (fallocate -l 1M m/fa || true) && sync m
setfattr -n user.t -v 1 m/g && getfattr -d m/g && setfattr -x user.t m/g && chattr +A m/z || true
rm -r d2 l m/h && rmdir m/none || true
stat -f . && touch -d 2001-01-01 m && lsattr m/z || true
"""
