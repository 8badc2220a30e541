"""A Docker daemon of the test's own, and images for it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unionfs.layers.identity import diff_id_of

_START_S = 60.0
_DOCKER = "/usr/bin/docker"  # Debian's, of the daemon's version


class Docker:
    """The client of a running daemon."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def __call__(self, *words: str | Path, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            [_DOCKER, "-H", f"unix://{self._socket}", *words], input=stdin, capture_output=True, check=False
        )
        assert done.returncode == 0, (words, done.stderr.decode())
        return done.stdout

    def answers(self) -> bool:
        """Whether it is up."""
        probe = [_DOCKER, "-H", f"unix://{self._socket}", "version"]
        return subprocess.run(probe, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def running_docker(directory: Path, data_root: Path) -> Iterator[Docker]:
    """A daemon with the overlay2 driver over ``data_root``, without any network."""
    directory.mkdir(exist_ok=True)
    socket = directory / "docker.sock"
    with open(directory / "log", "ab") as log:
        daemon = subprocess.Popen(
            [
                "dockerd",
                *("--data-root", data_root, "--exec-root", directory / "exec", "--pidfile", directory / "pid"),
                *("--host", f"unix://{socket}", "--storage-driver", "overlay2"),
                *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"DOCKER_RAMDISK": "1"},
        )
    try:
        docker = Docker(socket)
        end = time.monotonic() + _START_S
        while not docker.answers():
            assert daemon.poll() is None, (directory / "log").read_text()[-2000:]
            assert time.monotonic() < end, (directory / "log").read_text()[-2000:]
            time.sleep(0.2)
        yield docker
    finally:
        daemon.terminate()
        daemon.wait(60)
        for point in _mounts_below(data_root, directory):
            subprocess.run(["umount", "-l", point], check=False)


def _mounts_below(*directories: Path) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        points = [line.split()[4] for line in table]
    return [point for point in points[::-1] if any(Path(point).is_relative_to(one.resolve()) for one in directories)]


def image(name: str, layers: Sequence[bytes]) -> bytes:
    """What ``docker save`` would write for an image of these layers."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/none"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id_of(layer) for layer in layers]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
        }
    ).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": names}]).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in [("config.json", config), ("manifest.json", manifest), *zip(names, layers, strict=True)]:
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
