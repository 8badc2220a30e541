"""A machine of another Debian release: its root file system and set-up kept in a cache, in namespaces of its own.

Its processes, mounts and host name are gone with its process 1, which ends when the pipe that it reads from is closed,
also by the death of the test run. The network and the control groups are those of this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quickstart_steps import rootfs
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, default_directory

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE = Path("/srv/unionfs")
"""Where the clone of the repository is in a machine."""
SUITES = {"bookworm": "Debian 12 (bookworm)", "trixie": "Debian 13 (trixie)", "sid": "Debian sid"}
"""The releases, and what people call them."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TMP_ON_DISK = ("bookworm",)
"""Where /tmp is not a tmpfs: Debian has it so from 13 on."""
_GONE_S = 60.0
_SET_UP_S = 1800.0

# Process 1. Bash, since it reaps whatever is left to it.
_INIT = r"""
set -eu
directory=$1 lowers=$2 name=$3 tmp=$4
root=$directory/root
mkdir -p "$root" "$directory"/{upper,work,disk/srv,disk/var/tmp,disk/var/cache/unionfs,disk/tmp}
chmod 1777 "$directory"/disk/{tmp,var/tmp}
mount -t overlay -o "lowerdir=$lowers,upperdir=$directory/upper,workdir=$directory/work" system "$root"
# Overlays are to be made in these, and an overlay is no place for them.
for path in srv var/tmp var/cache/unionfs tmp; do
    mkdir -p "$root/$path"
    mount --bind "$directory/disk/$path" "$root/$path"
done
[ "$tmp" = disk ] || mount -t tmpfs -o mode=1777,nosuid,nodev tmp "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 run "$root/run"
mkdir -m 1777 "$root/run/lock"
mount -t tmpfs -o mode=755 dev "$root/dev"
mkdir "$root"/dev/{pts,shm,net,mapper}
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
while read -r node mode numbers; do
    mknod -m "$mode" "$root/dev/$node" $numbers
done <<'NODES'
null 666 c 1 3
zero 666 c 1 5
full 666 c 1 7
random 666 c 1 8
urandom 666 c 1 9
tty 666 c 5 0
fuse 666 c 10 229
kmsg 600 c 1 11
net/tun 666 c 10 200
loop-control 660 c 10 237
NODES
for number in $(seq 0 63); do mknod -m 660 "$root/dev/loop$number" b 7 "$number"; done
ln -s pts/ptmx "$root/dev/ptmx"
for link in fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s "/proc/self/${link#*:}" "$root/dev/${link%%:*}"; done
# As this machine reaches the network.
for file in resolv.conf hosts pip.conf; do
    [ ! -e "/etc/$file" ] || { rm -f "$root/etc/$file"; cat "/etc/$file" >"$root/etc/$file"; }
done
if [ -d /usr/local/share/ca-certificates ]; then
    mkdir -p "$root/usr/local/share/ca-certificates"
    cp /usr/local/share/ca-certificates/* "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
fi
hostname "$name"
echo "$name" >"$root/etc/hostname"
cd "$root"
mkdir -p mnt
pivot_root . mnt
# As with systemd: what is mounted is seen in namespaces made before.
exec chroot . bash -euc 'cd /; umount -l /mnt; mount --make-rshared /; echo ready; read -r _ || true'
"""

# What a fresh root file system lacks of a machine on which somebody clones the repository. No service is to be started.
_BEFORE_SET_UP = """
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends ca-certificates git
update-ca-certificates
"""


class FailedInMachineError(AssertionError):
    """A command in a machine exited non-zero; the message has the end of what it said."""


@dataclass(slots=True)
class Machine:
    """A running machine. Use `machine` to get one."""

    suite: str
    directory: Path
    """On this machine; what is in ``disk/srv`` in it is in ``/srv`` there."""
    _pid: int
    _init: subprocess.Popen[bytes]
    _set_up: str | None = None

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, timeout_s: float = 600.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the clone, and wait for its end; its two outputs are one.

        Raises FailedInMachineError with ``check``, subprocess.TimeoutExpired after ``timeout_s`` seconds.
        """
        words = [*_entered(self._pid), "--", "env", "-i", f"--chdir={SOURCE}"]
        words += [f"{name}={value}" for name, value in (_environment() | dict(env or {})).items()]
        done = subprocess.run(
            [*words, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            timeout=timeout_s,
            start_new_session=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise FailedInMachineError(
                f"{self.suite}: exit status {done.returncode}: {' '.join(argv)}\n{done.stdout[-6000:]}"
            )
        return done

    def shell(self, script: str, timeout_s: float = 600.0) -> str:
        """Run a bash script, ended by its first error; returns what it wrote."""
        return self.run("bash", "-euo", "pipefail", "-c", script, timeout_s=timeout_s).stdout

    def set_up(self, *, compiled: bool) -> str:
        """Run ``scripts/setup --dev`` unless that was the last; returns what it said."""
        wanted = "1" if compiled else "0"
        if self._set_up == wanted:
            return ""
        self._set_up = None
        said = self.run("scripts/setup", "--dev", env={"UNIONFS_COMPILE": wanted}, timeout_s=_SET_UP_S).stdout
        self._set_up = wanted
        return said


def _environment() -> dict[str, str]:
    """What commands in a machine find: how to reach the network is as here, the rest as after a login."""
    found = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    found |= {name: value for name, value in os.environ.items() if name.startswith("PIP_") and name != "PIP_FIND_LINKS"}
    return {
        **found,
        "PATH": PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
    }


def _entered(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--mount", "--pid", "--ipc", "--uts"]


@contextlib.contextmanager
def _started(suite: str, directory: Path, lowers: list[Path]) -> Iterator[Machine]:
    tmp = "disk" if suite in _TMP_ON_DISK else "tmpfs"
    argv = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
    argv += ["bash", "-c", _INIT, "machine", str(directory), ":".join(map(str, lowers)), suite, tmp]
    init = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert init.stdin is not None
    assert init.stdout is not None
    try:
        assert init.stdout.readline() == b"ready\n", f"no machine of {suite} could be made; see what is said above"
        with open(f"/proc/{init.pid}/task/{init.pid}/children", encoding="ascii") as file:
            (pid,) = (int(word) for word in file.read().split())
        machine = Machine(suite, directory, pid, init)
        clone(directory / "disk" / SOURCE.relative_to("/"))
        yield machine
    finally:
        init.stdin.close()
        try:
            init.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            init.kill()
            init.wait(_GONE_S)
        init.stdout.close()


def clone(to: Path) -> None:
    """What a clone of the repository has, with what is changed and not yet committed."""
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        check=True,
        capture_output=True,
    ).stdout
    for name in filter(None, listed.split(b"\0")):
        source, target = (Path(os.fsdecode(os.path.join(os.fsencode(top), name))) for top in (REPOSITORY, to))
        if not os.path.lexists(source):  # deleted, not committed
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)


def _storage() -> Storage:
    return Storage(default_directory())


def prepared(suite: str, storage: Storage, *, refresh: bool = False) -> list[Path]:
    """The directories of a root file system in which ``scripts/setup --dev`` has been, the top one first; cached."""
    with Sandbox() as sandbox:
        base = Path(rootfs.debian(suite, storage, sandbox, refresh=refresh).path)
    key = hashlib.sha256(storage.contents(base.name).encode())
    for name in ("scripts/setup", "pyproject.toml"):
        key.update((REPOSITORY / name).read_bytes())
    key.update(_BEFORE_SET_UP.encode())

    def make(target: str) -> None:
        os.mkdir(target, 0o755)
        with _started(suite, Path(target), [base]) as machine:
            machine.shell(_BEFORE_SET_UP, timeout_s=_SET_UP_S)
            machine.set_up(compiled=False)
        for name in ("root", "work", "disk"):
            shutil.rmtree(os.path.join(target, name))

    return [Path(storage.cached(f"{base.name}-developer-{key.hexdigest()[:8]}", make, refresh=refresh)) / "upper", base]


@contextlib.contextmanager
def machine(suite: str) -> Iterator[Machine]:
    """A machine of a Debian suite with a clean clone of the repository, until the end of the block."""
    storage = _storage()
    lowers = prepared(suite, storage)
    with storage.run_directory(keep=False) as directory, _started(suite, Path(directory), lowers) as started:
        yield started
