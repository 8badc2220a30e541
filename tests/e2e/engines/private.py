"""A private root for an engine: its own processes, mounts, network, configuration and users, all gone at the end.

An engine that is tested must not touch the machine's own (``/run/docker``, ``/var/lib/containers``, accounts), and
what it leaves behind must be seen. A `Cell` is a PID, mount, IPC and network namespace around one short directory
below ``/tmp``. Its process 1 only holds it; commands are run in it with ``nsenter``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from tests.support.users import in_child

Result = TypeVar("Result")
REPOSITORY = Path(__file__).resolve().parents[3]
USER = "e2e"
"""The unprivileged user that exists only in the cell."""
USER_ID = 61001
SUB_IDS = (1_200_000, 65536)
"""First and number of the ids that the user may map, as in subuid(5)."""
_COMMAND_S = 120.0
_GONE_S = 60.0  # a server syncs its upper directory at the end, on a disk that others use too
CLONE_NEWNS = 0x20000  # linux/sched.h

# What engines write to outside of the directories that they are told to use.
_HIDDEN = ("/run", "/dev/shm", "/var/tmp", "/var/lib/containers", "/var/lib/docker", "/var/lib/containerd")

# Process 1. Bash, since it reaps whatever is left to it; it ends, and with it everything in the cell, when the pipe
# that it reads from is closed, also by the death of the test run.
_INIT = r"""
set -eu
root=$1 repository=$2 user=$3 id=$4 subids=$5
shift 5
mkdir "$root/private"
mount -t tmpfs -o mode=755 e2e "$root/private"
for hidden; do
    [ -d "$hidden" ] || continue
    mount -t tmpfs -o mode="$(stat -c %a "$hidden")" e2e "$hidden"
done
mkdir -p /run/lock "/run/user/$id"
chown "$id:$id" "/run/user/$id"
chmod 700 "/run/user/$id"

# Accounts and configuration of this cell. All of /etc is private, since a file that is mounted over comes off when
# somebody on the machine puts another in its place, as useradd does with /etc/passwd.
cp -a /etc "$root/private/etc"
mount --bind "$root/private/etc" /etc
rm -f /etc/passwd /etc/group /etc/subuid /etc/subgid
printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534::/:/bin/false >/etc/passwd
printf '%s\n' root:x:0: nogroup:x:65534: >/etc/group
echo "$user:x:$id:$id::$root/home:/bin/sh" >>/etc/passwd
echo "$user:x:$id:" >>/etc/group
echo "$user:$subids" | tee /etc/subuid >/etc/subgid
rm -rf /etc/docker /etc/containerd /etc/containers
mkdir /etc/docker /etc/containers
mount --bind "$root/etc" /etc/containers

# udev lets everybody open it; where there is no udev only root may, and a test must not change that.
mknod -m 666 "$root/private/fuse" c 10 229
mount --bind "$root/private/fuse" /dev/fuse

# A clone that others cannot enter, as in root's home, is shown at the same place in directories that they can.
closed=
IFS=/ read -r -a parts <<<"${repository#/}"
path=
for part in "${parts[@]}"; do
    path=$path/$part
    setpriv --reuid="$id" --regid="$id" --clear-groups test -x "$path" || { closed=$path; break; }
done
if [ -n "$closed" ]; then
    mkdir "$root/private/repository"
    mount --bind "$repository" "$root/private/repository"
    mount -t tmpfs -o mode=755 e2e "$closed"
    for part in .venv unionfs tests; do
        mkdir -p "$repository/$part"
        mount --bind "$root/private/repository/$part" "$repository/$part"
    done
fi
ip link set lo up 2>/dev/null || busybox ip link set lo up
echo ready
read -r _ || true
"""


class CommandFailedError(AssertionError):
    """A command in a cell exited non-zero; the message has what it said."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        words = " ".join(str(word) for word in done.args)
        said = (done.stderr + b"\n" + done.stdout[-2000:]).decode(errors="replace")
        super().__init__(f"exit status {done.returncode}: {words}\n{said}")
        self.done = done


@dataclass(slots=True)
class Cell:
    """A private root. Use `private_cell` to get one."""

    root: Path
    """Its directory, at most 25 characters, which every user may enter; ``home`` in it belongs to the user."""
    environment: dict[str, str]
    """What commands find in their environment; a test may add to it."""
    _init: subprocess.Popen[bytes]
    _pid: int
    _mounts: frozenset[str] = frozenset()
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(
        self,
        *argv: str | Path,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = _COMMAND_S,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the cell, as root or as ``user`` (`USER`), and wait for its end and that of its output.

        Raises CommandFailedError with ``check``, TimeoutError after ``timeout_s`` seconds, when it and its children
        have been killed.
        """
        process = subprocess.Popen(
            self._argv(argv, user, env, cwd),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                said = error.stderr or b""
                raise TimeoutError(f"{timeout_s:.0f} s were not enough for {argv}: {said[-2000:]!r}") from None
            raise
        done = subprocess.CompletedProcess(argv, process.returncode, out, err)
        if check and done.returncode != 0:
            raise CommandFailedError(done)
        return done

    def shell(self, script: str, *arguments: str | Path, user: str | None = None, timeout_s: float = _COMMAND_S) -> str:
        """Run a bash script, ended by its first error; returns what it wrote."""
        done = self.run("bash", "-euc", script, "bash", *arguments, user=user, timeout_s=timeout_s)
        return done.stdout.decode(errors="surrogateescape")

    def start(
        self, *argv: str | Path, log: Path, user: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a server in the cell, its output going to ``log``; `stop` ends it."""
        with open(log, "ab") as out:
            daemon = subprocess.Popen(
                self._argv(argv, user, env, None),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def stop(self, daemon: subprocess.Popen[bytes], signal_number: int = signal.SIGTERM) -> int:
        """Send a signal to a server that `start` started and wait for its end; returns its exit status.

        Only the server itself is signalled: its children, such as shims, live on.
        """
        # It is the only child of nsenter, which does not pass signals on, and may not have forked yet.
        end = time.monotonic() + _GONE_S
        while daemon.poll() is None and time.monotonic() < end:
            children = _children(daemon.pid)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            if children:
                break
            time.sleep(0.01)
        return daemon.wait(_GONE_S)

    def call(self, work: Callable[[], Result]) -> Result:
        """Call Python code in the cell's mount namespace, in a child process; returns its result.

        The process is not in the PID namespace, so it may look at processes (by the cell's numbers) but not send
        them signals.
        """

        def inside() -> Result:
            fd = os.open(f"/proc/{self._pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNS) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            os.close(fd)
            os.chdir("/")
            return work()

        return in_child(inside, _COMMAND_S)

    def mounts(self) -> list[str]:
        """The mount points in the cell that were not there when it was made."""
        return sorted(_mount_points(self._pid) - self._mounts)

    def processes(self) -> list[str]:
        """The command lines of all processes in the cell but process 1, those in containers too."""
        return self.call(_process_names)

    def files(self) -> list[str]:
        """What lies in the cell's directory, for two levels; without what the cell itself has put there."""
        found = []
        for top in sorted(self.root.iterdir()):
            if top.name in ("private", "etc", "home", "tmp"):
                continue
            found.append(top.name)
            if top.is_dir() and not top.is_symlink():
                found += [f"{top.name}/{name}" for name in sorted(os.listdir(top))]
        return found

    def wait_until_quiet(self, timeout_s: float = _GONE_S) -> tuple[list[str], list[str]]:
        """Wait until no process and no mount is left; returns those that are when the time is over."""
        end = time.monotonic() + timeout_s
        while True:
            left = self.processes(), self.mounts()
            if not any(left) or time.monotonic() > end:
                return left
            time.sleep(0.1)

    def assert_quiet(self) -> None:
        """Fail when a process or mount is left."""
        processes, mounts = self.wait_until_quiet()
        assert not processes, f"processes are left: {processes}"
        assert not mounts, f"mounts are left: {mounts}"

    def close(self) -> None:
        """End everything in the cell and remove its directory. Fails when that cannot be removed."""
        assert self._init.stdin is not None
        self._init.stdin.close()
        try:
            self._init.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            self._init.kill()
            self._init.wait(_GONE_S)
        for daemon in self._daemons:
            daemon.wait(_GONE_S)
        # The mounts went with the namespace; this sees the directories as they are on disk.
        shutil.rmtree(self.root)

    def _argv(
        self, argv: Sequence[str | Path], user: str | None, env: Mapping[str, str] | None, cwd: Path | None
    ) -> list[str]:
        environment = self.environment | (dict(env) if env else {})
        words = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--ipc", "--net"]
        words += [f"--wd={cwd or self.root}", "--"]
        if user is not None:
            words += ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--init-groups", "--"]
            home = self.root / "home"
            environment = {"XDG_RUNTIME_DIR": f"/run/user/{USER_ID}", **environment}
            environment |= {"HOME": f"{home}", "USER": user, "LOGNAME": user}
        else:
            environment = {"HOME": f"{self.root}/tmp", **environment}
        settings = [f"{name}={value}" for name, value in environment.items()]
        return [*words, "env", "-i", *settings, *(os.fspath(word) for word in argv)]


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:  # it has ended
        return []


def _mount_points(pid: int) -> set[str]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return {line.split(" ")[4] for line in table}


def _process_names() -> list[str]:
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid == 1:
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0].decode()
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            found.append(f"{pid} {state} {words[:200]}")
    return found


@contextlib.contextmanager
def private_cell(*, path: Sequence[Path] = (), etc: Mapping[str, str] | None = None) -> Iterator[Cell]:
    """A private root until the end of the block.

    Args:
        path: directories that come before all others in ``PATH``; our own commands are in it anyway.
        etc: files for ``/etc/containers``, which is empty otherwise but for a policy that trusts every image.

    Raises:
        AssertionError: a mount below the directory survived, or the directory cannot be removed.
    """
    root = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    root.chmod(0o755)
    for name in ("etc", "home", "tmp"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    os.chown(root / "home", USER_ID, USER_ID)
    (root / "etc/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}\n')
    for name, text in (etc or {}).items():
        (root / "etc" / name).write_text(text)
    # Signal handling: --kill-child ends the cell when unshare is killed, the closed pipe when the test run is.
    argv = ["unshare", "--mount", "--pid", "--ipc", "--net", "--fork", "--kill-child", "--mount-proc"]
    argv += ["--propagation", "private", "bash", "-c", _INIT, "cell", str(root), str(REPOSITORY), USER, str(USER_ID)]
    argv += [f"{SUB_IDS[0]}:{SUB_IDS[1]}", *_HIDDEN]
    init = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert _first_line(init.stdout) == b"ready\n", "a private root could not be made; see what is said above"
        (pid,) = _children(init.pid)
        words = [*map(str, path), f"{REPOSITORY}/.venv/bin", "/usr/local/sbin", "/usr/local/bin"]
        words += ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        environment = {"PATH": ":".join(words), "TMPDIR": f"{root}/tmp", "LANG": "C.UTF-8"}
        cell = Cell(root, environment, init, pid, frozenset(_mount_points(pid)))
    except BaseException:
        init.kill()
        init.wait()
        shutil.rmtree(root, ignore_errors=True)
        raise
    try:
        yield cell
    finally:
        cell.close()


def _first_line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()
