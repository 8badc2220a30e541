"""A real dockerd in its own process and mount namespace, so that nothing of it outlives a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

from tests.support.snapshot import Snapshot, snapshot

_START = """\
set -eu
mkdir -p {root}/exec /run/docker
mount -t tmpfs tmpfs /run/docker
dockerd --data-root {root}/root --exec-root {root}/exec -p {root}/pid --iptables=false --ip6tables=false \\
    --bridge=none --experimental -H unix://{root}/docker.sock {options} >>{root}/log 2>&1 &
docker() {{ /usr/bin/docker -H unix://{root}/docker.sock "$@"; }}
tries=0
until docker info >/dev/null 2>&1; do
    tries=$((tries + 1)); [ $tries -lt 300 ] || {{ tail -5 {root}/log >&2; exit 1; }}
    sleep 0.1
done
export DOCKER_BUILDKIT=0
cd {root}
"""
_STOP = """
kill %1
wait %1 || true
"""


def run_docker(root: Path, script: str, options: str = "--storage-driver overlay2") -> None:
    """Start dockerd with everything below ``root``, run ``script`` in bash with a function ``docker``, and stop it."""
    (root / "root").mkdir(parents=True, exist_ok=True)
    whole = _START.format(root=root, options=options) + script + _STOP
    command = ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "--propagation", "private", "bash", "-c"]
    done = subprocess.run([*command, whole], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def make_rootfs(root: Path) -> None:
    """What a container needs: one program."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is missing; run scripts/setup --dev"
    for directory in ("bin", "etc", "proc", "dev", "sys", "tmp", "usr/share/doc/deep"):
        (root / directory).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    applets = "sh cat chmod chown cp echo ln ls mkdir mkfifo mknod mv rm sleep touch true"
    for applet in applets.split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "usr/share/doc/readme").write_text("read me\n")
    (root / "usr/share/doc/deep/er").write_text("deeper\n")


def pack(directory: Path, archive: Path) -> None:
    """A tar of a directory, made by tar(1)."""
    subprocess.run(["tar", "-C", directory, "-cf", archive, "."], check=True)


def unpack(archive: Path, directory: Path) -> None:
    """Unpack with tar(1), as root would."""
    directory.mkdir()
    subprocess.run(["tar", "-C", directory, "--numeric-owner", "-xpf", archive], check=True)


def tree(root: str | os.PathLike[str]) -> Snapshot:
    """A tree as an archive can carry it: whole seconds, the root's own attributes left out.

    The link count is left out too, since an overlay shows that of the layer which has the file; the names that share
    a file are compared.
    """
    found = snapshot(os.fspath(root), check_ino=False, xattrs=False, mtime=lambda ns: ns // 10**9)
    del found["."]
    return {path: replace(entry, nlink=0) for path, entry in found.items()}


def extract_member(archive: Path, name: str) -> bytes:
    """The contents of one file in a tar."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()
